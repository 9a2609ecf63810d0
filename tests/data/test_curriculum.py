from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithwood.data.curriculum import Curriculum, Stage
from pithwood.data.order import sample_order

pytestmark = pytest.mark.quick

HALVES = (Fraction(1, 2), Fraction(1, 2))


def everything(course: Curriculum, steps: range) -> list[tuple[int, int, int]]:
    """(part, first token, length) of each sample that the steps read, in order."""
    read = []
    for step in steps:
        stage = course.stages[course.stage_index(step)]
        for micro in range(stage.samples_per_step // stage.samples_per_batch):
            parts, starts = course.samples(step, micro)
            read += [(part, start, stage.seq_len) for part, start in zip(parts.tolist(), starts.tolist(), strict=True)]
    return read


def test_one_corpus_at_one_length_is_read_in_the_order_of_epochs():
    course = Curriculum([1000], [""], [Stage(1, 16, 6, 2)], seed=3)
    read = [start // 16 for _, start, _ in everything(course, range(40))]
    assert course.num_spans == [62]
    assert read == sample_order(np.arange(240), 62, key=3).tolist()


def test_the_order_is_the_same_on_every_machine_and_version():
    # Changing these values breaks the exact resumption of every run that exists.
    plain = Curriculum([1000], [""], [Stage(9, 16, 4, 2)], seed=3)
    assert [start for _, start, _ in everything(plain, range(2))] == [448, 368, 336, 848, 864, 720, 480, 544]
    stages = [Stage(2, 8, 8, 4, HALVES), Stage(9, 16, 4, 2, HALVES)]
    mixed = Curriculum([1000, 500], ["a", "b"], stages, seed=3)
    assert [(part, start) for part, start, _ in everything(mixed, range(1, 3))] == [
        (0, 824), (1, 48), (0, 880), (1, 320), (0, 888), (1, 328), (0, 584), (1, 136),
        (0, 832), (1, 64), (0, 512), (1, 176),
    ]  # fmt: skip


@given(
    num_tokens=st.lists(st.integers(70, 900), min_size=1, max_size=4),
    lengths=st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    batch=st.sampled_from([64, 128, 192]),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=80)
def test_no_token_is_read_twice_before_all_of_its_part_were_read_at_whatever_length(
    num_tokens, lengths, steps, batch, weights, seed
):
    shares = tuple(Fraction(w, sum(weights[: len(num_tokens)])) for w in weights[: len(num_tokens)])
    ends = np.cumsum(steps[: len(lengths)]).tolist()
    stages = [Stage(end, n, 2 * batch // n, batch // n, shares) for end, n in zip(ends, lengths, strict=True)]
    course = Curriculum(num_tokens, [f"p{i}" for i in range(len(num_tokens))], stages, seed)
    total = ends[-1]
    read = everything(course, range(total))
    usage = course.usage(total)
    for part, tokens in enumerate(num_tokens):
        times = np.zeros(tokens, dtype=int)
        for _, start, n in (entry for entry in read if entry[0] == part):
            times[start : start + n] += 1
        used = course.num_spans[part] * course.span_len
        assert times[used:].sum() == 0
        assert usage[part].tokens == times.sum()
        assert sum(usage[part].samples) == sum(entry[0] == part for entry in read)
        # What stages left unread at their ends, less than a span each, is all that may be missing from an epoch.
        assert times.max() <= np.ceil(usage[part].epochs)
        missing = np.maximum(np.floor(usage[part].epochs) - times[:used], 0).sum()
        assert missing < len(stages) * course.span_len
        assert usage[part].epochs * used - times.sum() < len(stages) * course.span_len


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=30)
def test_a_step_holds_the_same_samples_however_it_is_divided(step, per_batch):
    def course(per: int) -> Curriculum:
        stages = [Stage(7, 4, 8, per, HALVES), Stage(9, 8, 8, per, HALVES)]
        return Curriculum([900, 300], ["a", "b"], stages, seed=1)

    for at in (step % 9, step):
        assert everything(course(per_batch), range(at, at + 1)) == everything(course(8), range(at, at + 1))


def test_samples_do_not_depend_on_what_was_asked_before():
    def course() -> Curriculum:
        mostly_a = (Fraction(9, 10), Fraction(1, 10))
        stages = [Stage(5, 4, 16, 4, HALVES), Stage(9, 16, 4, 1, mostly_a), Stage(11, 8, 8, 2, HALVES)]
        return Curriculum([2000, 700], ["a", "b"], stages, seed=7)

    asked = [(step, micro) for step in [*range(12), 10**7, 10**7 + 1] for micro in range(4)]
    first = {place: course().samples(*place) for place in asked}
    shuffled = course()
    for place in random.Random(1).sample(asked, len(asked)):
        assert all(np.array_equal(a, b) for a, b in zip(shuffled.samples(*place), first[place], strict=True))


def test_samples_of_a_stage_are_shuffled_across_its_spans():
    course = Curriculum([64 * 500 + 1], [""], [Stage(100, 8, 8, 8), Stage(200, 64, 1, 1)], seed=0)
    spans = [start // 64 for _, start, _ in everything(course, range(100))]
    pairs = sum(a == b for a, b in itertools.pairwise(spans))
    # 100 spans of 8 pieces: a neighbour is from the same span with probability 7 / 799.
    assert pairs < 25
    assert len(set(spans)) == 100


def test_parts_have_orders_of_their_own_by_name_and_seed():
    def starts(name: str, seed: int) -> list[int]:
        return [start for _, start, _ in everything(Curriculum([5000], [name], [Stage(9, 8, 8, 8)], seed), range(9))]

    assert len({tuple(starts(name, seed)) for name in ("a", "b", "") for seed in (0, 1)}) == 6


def test_a_stage_that_leaves_a_part_out_does_not_read_it():
    stages = [Stage(4, 8, 4, 4, (Fraction(1), Fraction(0))), Stage(8, 8, 4, 4, HALVES)]
    course = Curriculum([500, 500], ["a", "b"], stages, seed=0)
    assert {part for part, _, _ in everything(course, range(4))} == {0}
    assert [usage.samples for usage in course.usage(8)] == [(16, 8), (0, 8)]
    assert course.usage(4)[1].epochs == 0


def test_usage_counts_as_far_as_the_run_goes():
    course = Curriculum([8 * 10 + 1], [""], [Stage(5, 4, 2, 2), Stage(50, 8, 1, 1)], seed=0)
    epochs = [round(course.usage(steps)[0].epochs, 6) for steps in (0, 1, 4, 5, 6, 15, 60)]
    assert epochs == [0, 0.1, 0.4, 0.5, 0.6, 1.5, 6]


def test_the_end_of_the_last_stage_changes_nothing():
    def read(until: int) -> list[tuple[int, int, int]]:
        stages = [Stage(5, 8, 4, 4, HALVES), Stage(until, 4, 8, 8, HALVES)]
        return everything(Curriculum([700, 300], ["a", "b"], stages, seed=0), range(40))

    assert read(6) == read(1000)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(5, 48, 4, 4), Stage(9, 64, 4, 4)], r"seq_len=48 must divide the longest .* run, 64.*try 32 or 64"),
        ([Stage(5, 8, 4, 4), Stage(5, 8, 4, 4)], r"rising until_step, given \[5, 5\]"),
        ([Stage(5, 8, 4, 3)], r"samples_per_step=4 must be a multiple of samples_per_micro_batch=3"),
        ([Stage(5, 0, 4, 4)], r"seq_len=0 must be at least 1"),
        ([Stage(5, 128, 4, 4)], r"seq_len=128 needs 129 tokens, but the train split of part 'a' has 100"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Curriculum([100], ["a"], stages, seed=0)


def test_far_out_steps_of_a_mixture_are_cheap():
    import time

    stages = [Stage(10**6, 4, 64, 64, HALVES), Stage(10**9, 16, 16, 16, HALVES)]
    course = Curriculum([10**12, 10**9], ["a", "b"], stages, seed=0)
    course.samples(0)
    started = time.perf_counter()
    for step in range(10**7, 10**7 + 50):
        course.samples(step)
    assert time.perf_counter() - started < 1  # about 10 ms
