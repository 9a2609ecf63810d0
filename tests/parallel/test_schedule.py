"""Schedules as lists: every pass once and in order, no process waits forever, idle time and memory as published."""

from __future__ import annotations

from itertools import product

import pytest

from pithwood.parallel.config import MeshConfig, Schedule
from pithwood.parallel.schedule import (
    Action,
    Pair,
    forward_actions,
    most_alive,
    needs,
    parts_of,
    pipeline_actions,
    simulate,
)

pytestmark = pytest.mark.quick

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble_v", "dualpipe_v")
FORWARD, INPUTS, WEIGHTS = 1.0, 1.0, 1.0


def seconds(step: Action | Pair) -> float:
    times = {"forward": FORWARD, "backward": INPUTS + WEIGHTS, "inputs": INPUTS, "weights": WEIGHTS}
    return sum(times[part.kind] for part in parts_of(step))


def least(cfg: MeshConfig) -> int:
    return {"interleaved": cfg.pp, "dualpipe_v": 2 * cfg.pp}.get(cfg.schedule, 1)


def cases() -> list[tuple[MeshConfig, int]]:
    made = []
    for schedule, pp in product(SCHEDULES, (2, 3, 4, 6, 8)):
        for each in (2, 3) if schedule == "interleaved" else (2,):
            cfg = MeshConfig(pp=pp, schedule=schedule, stages_per_process=each)
            made += [(cfg, count) for count in (*range(1, 14), 24, 32) if count >= least(cfg)]
    return made


CASES = cases()


def lists_of(cfg: MeshConfig, micro_batches: int) -> list[list[Action | Pair]]:
    return [pipeline_actions(cfg, rank, micro_batches) for rank in range(cfg.pp)]


def test_every_micro_batch_passes_every_stage_once_each_way_in_order():
    for cfg, count in CASES:
        for rank, steps in enumerate(lists_of(cfg, count)):
            parts = [part for step in steps for part in parts_of(step)]
            assert {part.stage for part in parts} == set(cfg.stages_of_process(rank))
            for stage in cfg.stages_of_process(rank):
                own = [part for part in parts if part.stage == stage]
                forward = [part.micro for part in own if part.kind == "forward"]
                backward = [part.micro for part in own if part.kind in ("backward", "inputs")]
                weights = [part.micro for part in own if part.kind in ("backward", "weights")]
                assert forward == backward == list(range(count)), (cfg, count, rank)
                assert sorted(weights) == list(range(count))


def test_nothing_begins_before_what_it_needs_and_nobody_waits_forever():
    for cfg, count in CASES:
        lists = lists_of(cfg, count)
        timeline = simulate(lists, seconds, transfer=0.25)
        last = cfg.num_stages - 1
        ended = {
            part: end
            for steps, spans in zip(lists, timeline.spans, strict=True)
            for step, (_, end) in zip(steps, spans, strict=True)
            for part in parts_of(step)
        }
        for steps, spans in zip(lists, timeline.spans, strict=True):
            for step, (begin, _) in zip(steps, spans, strict=True):
                for needed in (needed for part in parts_of(step) for needed in needs(part, last)):
                    assert any(ended[other] <= begin for other in needed if other in ended), (cfg, count, step)


def test_lists_that_wait_for_each_other_are_found():
    lists: list[list[Action | Pair]] = [
        [Action("forward", 0, 0), Action("backward", 0, 0), Action("forward", 0, 1), Action("backward", 0, 1)],
        [Action("forward", 1, 0), Action("forward", 1, 1), Action("backward", 1, 0), Action("backward", 1, 1)],
    ]
    with pytest.raises(AssertionError, match=r"wait for each other: 0: Action.*backward.*1: Action.*forward"):
        simulate(lists, seconds)


def sends(step: Action | Pair, owner: dict[int, int], last: int) -> list[tuple[int, tuple[str, int, int]]]:
    """(receiver, message) of what an entry makes for other processes, in order."""
    made = []
    for part in parts_of(step):
        to = part.stage + (1 if part.kind == "forward" else -1)
        if part.kind != "weights" and 0 <= to <= last and owner[to] != owner[part.stage]:
            made.append((owner[to], ("input" if part.kind == "forward" else "gradient", to, part.micro)))
    return made


def wants(step: Action | Pair, last: int) -> list[tuple[str, int, int]]:
    kinds = {"forward": "input", "backward": "gradient", "inputs": "gradient"}
    return [(kinds[part.kind], part.stage, part.micro) for part in parts_of(step) if part.kind in kinds]


def test_without_a_pipeline_each_forward_pass_runs_beside_the_backward_pass_before_it():
    cfg = MeshConfig(dp_shard=2, ep=2, overlap="pairs")
    for count in (2, 3, 8):
        pairs = [Pair(Action("forward", 0, micro), Action("backward", 0, micro - 1)) for micro in range(1, count)]
        steps = pipeline_actions(cfg, 0, count)
        assert steps == [Action("forward", 0, 0), *pairs, Action("backward", 0, count - 1)]
        assert most_alive(steps) == 2


def test_nobody_waits_forever_where_receives_are_posted_one_action_ahead_in_the_order_of_the_sender():
    """A line hands over its messages in order, each once it is made and its receive is posted."""
    for cfg, count in CASES:
        lists, last = lists_of(cfg, count), cfg.num_stages - 1
        owner = {stage: rank for rank in range(cfg.pp) for stage in cfg.stages_of_process(rank)}
        lines = {
            (source, to): [message for step in lists[source] for by, message in sends(step, owner, last) if by == to]
            for source, to in product(range(cfg.pp), repeat=2)
        }
        place = {message: (line, index) for line, sent in lines.items() for index, message in enumerate(sent)}
        made, posted = dict.fromkeys(lines, 0), dict.fromkeys(lines, 0)
        at = [0] * cfg.pp
        before = None
        while before != (before := (list(at), dict(posted), dict(made))):
            for rank, steps in enumerate(lists):
                for near in steps[at[rank] : at[rank] + 2]:
                    for line, index in (place[message] for message in wants(near, last) if message in place):
                        posted[line] = max(posted[line], index + 1)
                for step in steps[at[rank] : at[rank] + 1]:
                    waits = [place[message] for message in wants(step, last) if message in place]
                    if all(index < min(made[line], posted[line]) for line, index in waits):
                        for to, _ in sends(step, owner, last):
                            made[rank, to] += 1
                        at[rank] += 1
        assert at == [len(steps) for steps in lists], (cfg, count)
        assert made == posted


def test_idle_times_are_those_published():
    for cfg, count in CASES:
        timeline = simulate(lists_of(cfg, count), seconds)
        whole = FORWARD + INPUTS + WEIGHTS
        assert max(timeline.busy) == count * cfg.num_stages / cfg.pp * whole
        if cfg.schedule in ("1f1b", "interleaved"):
            assert timeline.bubble == [(cfg.pp - 1) * whole] * cfg.pp
        elif cfg.schedule == "dualpipe_v":
            assert timeline.bubble == [(cfg.pp - 1) * (FORWARD + 2 * INPUTS - WEIGHTS)] * cfg.pp
        elif count >= 2 * cfg.pp - 1:
            for spans, busy in zip(timeline.spans, timeline.busy, strict=True):
                assert spans[-1][1] - spans[0][0] == busy


def test_no_more_micro_batches_are_alive_than_published():
    for cfg, count in CASES:
        alive = [most_alive(steps) for steps in lists_of(cfg, count)]
        assert max(alive) <= count * cfg.num_stages / cfg.pp
        if cfg.schedule == "1f1b":
            assert alive == [min(cfg.pp - rank, count) for rank in range(cfg.pp)]
        elif cfg.schedule == "interleaved":
            group = cfg.pp + (count % cfg.pp if count >= cfg.pp else 0)
            assert max(alive) <= 2 * (cfg.pp - 1) + (cfg.stages_per_process - 1) * group + 1
        elif cfg.schedule == "zero_bubble_v":
            # stages are half as long as those of 1f1b
            assert max(alive) <= 2 * cfg.pp
        else:
            assert max(alive) <= 2 * cfg.pp + 1


def test_dualpipe_pairs_every_forward_pass_but_those_that_fill_the_pipeline():
    for cfg, count in CASES:
        if cfg.schedule == "dualpipe_v":
            for rank, steps in enumerate(lists_of(cfg, count)):
                pairs = [step for step in steps if isinstance(step, Pair)]
                turn = int(rank == cfg.pp - 1)
                assert len(pairs) == 2 * (count - 2 * cfg.pp + rank + 1) - turn + (cfg.pp - 1 - rank)
                assert all(pair.forward.micro != pair.backward.micro for pair in pairs)


def test_too_few_micro_batches_are_refused():
    with pytest.raises(ValueError, match=r"overlap=pairs with mesh.pp=1 needs 2 micro-batches: 1"):
        pipeline_actions(MeshConfig(dp_shard=2, ep=2, overlap="pairs"), 0, 1)
    with pytest.raises(ValueError, match=r"schedule=dualpipe_v with mesh.pp=4 needs 8 micro-batches: 7"):
        pipeline_actions(MeshConfig(pp=4, schedule="dualpipe_v"), 0, 7)


def test_forward_passes_alone_find_their_inputs_on_every_layout():
    for cfg, _ in CASES:
        lists = [forward_actions(cfg, rank, 5) for rank in range(cfg.pp)]
        parts = [step for steps in lists for step in steps]
        assert sorted(parts) == [
            Action("forward", stage, micro) for stage in range(cfg.num_stages) for micro in range(5)
        ]
        simulate(lists, seconds)


@pytest.mark.parametrize(
    ("schedule", "split", "share"),
    [
        ("1f1b", (6, 6), 0.77),
        ("1f1b", (7, 5), 0.84),
        ("interleaved", (3, 3, 3, 3), 0.79),
        ("interleaved", (3, 4, 4, 1), 0.89),
        ("zero_bubble_v", (3, 3, 3, 3), 0.83),
        ("zero_bubble_v", (4, 3, 4, 1), 0.93),
        ("dualpipe_v", (3, 3, 3, 3), 0.82),
        ("dualpipe_v", (4, 4, 3, 1), 0.92),
    ],
)
def test_shares_of_computing_in_the_documentation_are_those_of_the_simulation(
    schedule: Schedule, split: tuple[int, ...], share: float
):
    """12 layers of Qwen3-30B-A3B on two GPUs, 131,072 tokens in 8 micro-batches, milliseconds a step of an H200's
    breakdown: 133.5 a layer, 389 the head, all of it in its forward pass. 0.3 are added per action, 0.5 per transfer.
    """
    layer, head, count = 133.5, 389.0, 8
    cfg = MeshConfig(pp=2, schedule=schedule, layers_per_stage=split)
    parts = {"forward": 0.3, "backward": 0.7, "inputs": 0.45, "weights": 0.25}

    def times(step: Action | Pair) -> float:
        total = 0.3
        for part in parts_of(step):
            total += split[part.stage] * layer * parts[part.kind] / count
            if part.kind == "forward" and part.stage == cfg.num_stages - 1:
                total += head / count
        return total

    timeline = simulate(lists_of(cfg, count), times, transfer=0.5)
    assert (12 * layer + head) / 2 / timeline.total == pytest.approx(share, abs=0.005)
