"""In which order each process of a pipeline runs its stages' forward and backward passes.

A schedule is a list of actions per process, a pure function of the mesh's pp, schedule, stages_per_process and overlap
and of the number of micro-batches. Nothing here sends, waits or computes: `pipeline.py` runs the lists, `simulate` says
what they would take.

Of one stage every kind of pass takes the micro-batches in order. Times below are those of one stage: F forward, B
backward with respect to the inputs, W of the weights.

1f1b            PipeDream-flush (Narayanan et al. 2021, arXiv 2006.09503): idle (pp - 1)(F + B + W), up to pp
                micro-batches alive
interleaved     Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): as 1f1b with stages shorter by
                their number per process, more micro-batches alive
zero_bubble_v   ZB-V (Qi et al. 2024, arXiv 2405.15362): with F = B = W no process idles between its first and its last
                action, with the activations of 1f1b
dualpipe_v      DualPipeV (DeepSeek 2025, github.com/deepseek-ai/DualPipe; Qi et al. 2025, "DualPipe could be better
                without the Dual"): DualPipe (arXiv 2412.19437) on a V; idle (pp - 1)(F + 2B - W) with pairs that
                take F + B + W, up to 2 pp + 1 stage passes alive
without a pipeline, with overlap=pairs: F0, (F1, B0), (F2, B1), ..., B[M - 1] of the one stage; two passes alive
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pithwood.parallel.config import MeshConfig

Kind = Literal["forward", "backward", "inputs", "weights"]
"""forward; backward: the whole backward pass; inputs: its part that earlier stages wait for, the gradients of the
inputs; weights: the rest of it, after inputs."""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro: int


class Pair(NamedTuple):
    """A forward pass and another micro-batch's whole backward pass, to be run together."""

    forward: Action
    backward: Action


def parts_of(step: Action | Pair) -> tuple[Action, ...]:
    """The actions that one entry of a list consists of."""
    return (step,) if isinstance(step, Action) else (step.forward, step.backward)


def pipeline_actions(cfg: MeshConfig, pp_rank: int, micro_batches: int) -> list[Action | Pair]:
    """What the pp_rank-th process of a pipeline runs in one optimizer step, in order.

    raises  ValueError if the schedule needs more micro-batches (`MeshConfig.check` refuses such a run at its start)
    """
    least = cfg.least_micro_batches
    if micro_batches < least:
        asks = f"overlap={cfg.overlap}" if cfg.pp == 1 else f"schedule={cfg.schedule}"
        raise ValueError(f"{asks} with mesh.pp={cfg.pp} needs {least} micro-batches: {micro_batches}")
    out = _Actions(micro_batches)
    if cfg.pp == 1 and cfg.overlap == "pairs":
        _pairs(out)
    elif cfg.pp == 1 or cfg.schedule == "1f1b":
        _one_forward_one_backward(out, cfg.pp, pp_rank)
    elif cfg.schedule == "interleaved":
        _interleaved(out, cfg.pp, cfg.stages_of_process(pp_rank), pp_rank)
    elif cfg.schedule == "zero_bubble_v":
        _zero_bubble_v(out, cfg.pp, pp_rank)
    else:
        _dualpipe_v(out, cfg.pp, pp_rank)
    return out.steps


def forward_actions(cfg: MeshConfig, pp_rank: int, micro_batches: int) -> list[Action | Pair]:
    """The forward passes alone, for evaluation: in the order in which they could begin if each took one unit."""
    passes = [
        (micro + stage, stage, micro) for stage in cfg.stages_of_process(pp_rank) for micro in range(micro_batches)
    ]
    return [Action("forward", stage, micro) for _, stage, micro in sorted(passes)]


class _Actions:
    """A list in the making; each kind of pass of a stage takes the next micro-batch."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.steps: list[Action | Pair] = []
        self.waiting: deque[Action] = deque()
        """Weight gradients whose inputs' part was added, oldest first."""
        self._taken: Counter[tuple[str, int]] = Counter()

    def next(self, kind: Kind, stage: int) -> Action:
        # whole passes and those of inputs alone take from the same row
        row = ("forward" if kind == "forward" else "backward", stage)
        self._taken[row] += 1
        return Action(kind, stage, self._taken[row] - 1)

    def add(self, kind: Kind, stage: int) -> None:
        """The stage's next pass; none where its micro-batches are used up."""
        action = self.next(kind, stage)
        if action.micro < self.micro_batches:
            self.steps.append(action)
            if kind == "inputs":
                self.waiting.append(action._replace(kind="weights"))

    def add_weights(self, stage: int | None = None) -> None:
        """The oldest weight gradients that wait, of this stage or of any; nothing if none wait."""
        for action in self.waiting:
            if stage is None or action.stage == stage:
                self.waiting.remove(action)
                self.steps.append(action)
                return

    def pair(self, forward: int, backward: int) -> None:
        self.steps.append(Pair(self.next("forward", forward), self.next("backward", backward)))


def _pairs(out: _Actions) -> None:
    """Each forward pass but the first beside the backward pass of the micro-batch before."""
    out.add("forward", 0)
    for _ in range(out.micro_batches - 1):
        out.pair(0, 0)
    out.add("backward", 0)


def _one_forward_one_backward(out: _Actions, pp: int, rank: int) -> None:
    ahead = min(pp - 1 - rank, out.micro_batches)
    for _ in range(ahead):
        out.add("forward", rank)
    for _ in range(out.micro_batches - ahead):
        out.add("forward", rank)
        out.add("backward", rank)
    for _ in range(ahead):
        out.add("backward", rank)


def _interleaved(out: _Actions, pp: int, stages: Sequence[int], rank: int) -> None:
    """Micro-batches go in groups of pp through one stage after the other; the first group takes the remainder too."""
    groups = [pp] * (out.micro_batches // pp)
    groups[0] += out.micro_batches % pp
    forward = [stage for size in groups for stage in stages for _ in range(size)]
    backward = [stage for size in groups for stage in reversed(stages) for _ in range(size)]
    ahead = min((len(stages) - 1) * groups[0] + 2 * (pp - 1 - rank), len(forward))
    for stage in forward[:ahead]:
        out.add("forward", stage)
    for one, other in zip(forward[ahead:], backward, strict=False):
        out.add("forward", one)
        out.add("backward", other)
    for stage in backward[len(forward) - ahead :]:
        out.add("backward", stage)


def _zero_bubble_v(out: _Actions, pp: int, rank: int) -> None:
    down, up = rank, 2 * pp - 1 - rank
    # a V takes 2 pp - 1 micro-batches to fill; of fewer, the passes of those that are not there are left out
    rounds = max(out.micro_batches, 2 * pp - 1) - pp
    for _ in range(2 * (pp - rank) - 1):
        out.add("forward", down)
    for _ in range(rank):
        out.add("forward", up)
        out.add("forward", down)
    for _ in range(pp - rank):
        _forward_inputs_weights(out, up)
    for _ in range(rounds):
        _forward_inputs_weights(out, down)
        _forward_inputs_weights(out, up)
    for _ in range(rank):
        out.add("inputs", down)
        out.add("inputs", up)
    for _ in range(pp - rank):
        out.add("inputs", down)
        out.add_weights(down)
    while out.waiting:
        out.add_weights()


def _forward_inputs_weights(out: _Actions, stage: int) -> None:
    out.add("forward", stage)
    out.add("inputs", stage)
    out.add_weights(stage)


def _dualpipe_v(out: _Actions, pp: int, rank: int) -> None:
    down, up = rank, 2 * pp - 1 - rank
    later = pp - 1 - rank
    for _ in range(2 * later):
        out.add("forward", down)
    for _ in range(rank + 1):
        out.add("forward", down)
        out.add("forward", up)
    for _ in range(later):
        out.add("inputs", up)
        out.add_weights()
        out.add("forward", up)
    for turn in range(out.micro_batches - 2 * pp + rank + 1):
        if turn == 0 and later == 0:
            # the turn of the V: the forward pass is what the next pair of this process waits for
            out.add("forward", down)
            out.add("backward", up)
        else:
            out.pair(down, up)
        out.pair(up, down)
    for _ in range(later):
        out.add("backward", up)
        out.pair(up, down)
    # once nothing is left to run forward, weight gradients fill the gaps
    for turn in range(2 * (rank + 1)):
        out.add("backward" if turn <= rank else "inputs", (up, down)[turn % 2])
    for _ in range(later):
        out.add_weights()
        out.add("inputs", down)
    while out.waiting:
        out.add_weights()


@dataclass(frozen=True)
class Timeline:
    """What lists of actions would take if every pass took the time that it is said to."""

    spans: list[list[tuple[float, float]]]
    """Beginning and end of each entry of each process's list."""
    total: float
    """From the first beginning to the last end."""
    busy: list[float]
    """Time that each process computes."""
    alive: list[int]
    """Most stage passes of each process whose activations are held at a time: forward begun, backward not ended."""

    @property
    def bubble(self) -> list[float]:
        """Time in which each process computes nothing, of the whole."""
        return [self.total - busy for busy in self.busy]


def simulate(
    lists: Sequence[Sequence[Action | Pair]], seconds: Callable[[Action | Pair], float], transfer: float = 0.0
) -> Timeline:
    """When each action would run if it began as soon as its process and its inputs were ready.

    lists     one per process of the pipeline, as `pipeline_actions` gives them
    seconds   of an entry; that of a pair is for both
    transfer  seconds that a tensor takes to another process; senders do not wait
    raises    AssertionError, with what each process waits for, if they wait for each other forever
    """
    owner = {part.stage: rank for rank, steps in enumerate(lists) for step in steps for part in parts_of(step)}
    last = max(owner)
    done: dict[Action, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in lists]

    def ready(rank: int, step: Action | Pair) -> float | None:
        """When the inputs of an entry are there; None if not all will be yet."""
        at = 0.0
        for part in parts_of(step):
            for needed in needs(part, last):
                found = [done[other] for other in needed if other in done]
                if not found:
                    return None
                at = max(at, found[0] + (transfer if owner[needed[0].stage] != rank else 0.0))
        return at

    while any(len(span) < len(steps) for span, steps in zip(spans, lists, strict=True)):
        moved = False
        for rank, steps in enumerate(lists):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                at = ready(rank, step)
                if at is None:
                    break
                begin = max(at, spans[rank][-1][1] if spans[rank] else 0.0)
                end = begin + seconds(step)
                spans[rank].append((begin, end))
                done |= dict.fromkeys(parts_of(step), end)
                moved = True
        if not moved:
            stuck = [
                f"{rank}: {steps[len(span)]}"
                for rank, (span, steps) in enumerate(zip(spans, lists, strict=True))
                if len(span) < len(steps)
            ]
            raise AssertionError(f"processes wait for each other: {'; '.join(stuck)}")
    ends = [span[-1][1] for span in spans if span]
    busy = [sum(end - begin for begin, end in span) for span in spans]
    return Timeline(spans, max(ends), busy, [most_alive(steps) for steps in lists])


def needs(action: Action, last: int) -> list[tuple[Action, ...]]:
    """What must have ended before an action begins, each as the actions any one of which will do."""
    kind, stage, micro = action
    if kind == "forward":
        return [(Action("forward", stage - 1, micro),)] if stage else []
    if kind == "weights":
        return [(Action("inputs", stage, micro),)]
    own: list[tuple[Action, ...]] = [(Action("forward", stage, micro),)]
    if stage < last:
        own.append((Action("backward", stage + 1, micro), Action("inputs", stage + 1, micro)))
    return own


def most_alive(steps: Sequence[Action | Pair]) -> int:
    """Most (stage, micro-batch) passes of one process's list that are held at a time."""
    alive = most = 0
    for step in steps:
        kinds = [part.kind for part in parts_of(step)]
        alive += kinds.count("forward")
        most = max(most, alive)
        alive -= kinds.count("backward") + kinds.count("weights")
    return most
