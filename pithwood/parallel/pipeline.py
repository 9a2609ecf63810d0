"""Runs a pipeline's schedule: each process its own stages' passes, and what travels between stages.

A stage is a function of the micro-batch's number, its input and the carry. Whoever writes it reads its own columns of
the micro-batch there; only x and the named tensors of the carry come from the stage before, and their gradients from
the stage after. The graph of a pass is held from its forward to its backward pass, cut from its neighbours' at the
stage's input. Stages of one process hand tensors to each other directly.

Receives are posted one action ahead, in the order of the sender's list, and sends are never waited for within a step:
a process waits only for tensors that another has yet to compute.

Legend: T packed tokens of this process, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pithwood.ops.master import Deferred, deferred_gradients, run_deferred
from pithwood.parallel.links import Links
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.schedule import Action, Pair, forward_actions, parts_of, pipeline_actions

Outcome = tuple[Tensor, dict[str, Tensor]] | Tensor
"""(x [T, D], carry) of a stage; of the last stage the loss, a scalar."""
Parts = Generator[Sequence[Tensor], list[Tensor], Outcome]
Stage = Callable[[int, Tensor | None, dict[str, Tensor]], Outcome | Parts]
"""`stage(micro, x or None, carry)`, None for the first stage. A plain function returns its outcome.

One that is to be interleaved with another pass (`Pair`) is a generator. At each yield its graph is cut and the other
pass may run: it yields all tensors of the graph that it uses after the yield, but for those that it got for an earlier
one, and goes on with what it gets for them, in the same order. An exchange begun before a yield and waited for after it
runs under the other pass; cut between both, its backward pass does so too.
"""


class Travels(NamedTuple):
    """A tensor between two stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Message(NamedTuple):
    """What a stage waits for: its input, or the gradient of its output."""

    what: Literal["input", "gradient"]
    stage: int
    micro: int


@dataclass
class _Part:
    """A piece of a pass's graph between two cuts."""

    leaves: list[Tensor]
    """Where it begins."""
    ends: list[Any] = field(default_factory=list)
    """Where it ends: the edge of each tensor, None for one without gradient."""


@dataclass
class _Pass:
    """What is held of one micro-batch in one stage."""

    parts: list[_Part]
    loss: Tensor | None = None
    """Of the last stage."""
    deferred: Deferred = field(default_factory=list)


class _Plan(NamedTuple):
    """One step's work, by the number of micro-batches."""

    steps: list[Action | Pair]
    arrivals: dict[int, list[_Message]]
    """What each other process sends to this one, in its order."""
    place: dict[_Message, tuple[int, int]]
    """The sender of a message and its place in that order."""


class PipelineExecutor:
    """Runs optimizer steps' forward and backward passes over `mesh.pp`; made by all processes of the mesh together."""

    def __init__(self, mesh: Mesh, stages: Mapping[int, Stage], boundaries: Sequence[Mapping[str, Travels]]) -> None:
        """Links to the neighbours are made here.

        stages      this process's, by their place in the pipeline: `mesh.cfg.stages_of_process(mesh.pp.rank)`
        boundaries  what travels from each stage to the next, one entry less than stages: "x", and the names of the
                    carry that any later stage reads. Gradients of those of a floating dtype travel back
        raises      ValueError if these are not the mesh's stages
        """
        cfg = mesh.cfg
        own = cfg.stages_of_process(mesh.pp.rank)
        if sorted(stages) != sorted(own) or len(boundaries) != cfg.num_stages - 1:
            raise ValueError(
                f"process {mesh.pp.rank} of mesh.pp={cfg.pp} with schedule={cfg.schedule} runs stages {sorted(own)} "
                f"with {cfg.num_stages - 1} boundaries between all; given {sorted(stages)} and {len(boundaries)}"
            )
        self.mesh, self.stages, self.boundaries = mesh, stages, boundaries
        self._last = cfg.num_stages - 1
        self._owner = {stage: rank for rank in range(cfg.pp) for stage in cfg.stages_of_process(rank)}
        self._links = Links(mesh, ring=cfg.schedule == "interleaved")
        self._plans: dict[tuple[int, bool], _Plan] = {}
        self._held: dict[tuple[int, int], _Pass] = {}
        self._inbox: dict[_Message, tuple[list[Tensor], list[Any]]] = {}
        self._posted: dict[int, int] = {}
        self._outbox: dict[_Message, list[Tensor]] = {}
        self._due: deque[_Message] = deque()
        self._results: list[Any] = []

    def run(self, micro_batches: int) -> list[Tensor]:
        """Run all passes of a step; adds gradients to the parameters' `.grad`.

        returns  the losses of the micro-batches, detached, in the process that holds the last stage; else nothing
        raises   ValueError if a stage's output is not what the boundary says, or the schedule needs more micro-batches
        """
        return self._run(self._plan(micro_batches, forward_only=False))

    @torch.no_grad()
    def run_forward(self, micro_batches: int) -> list[Any]:
        """Run the forward passes alone, without graphs; what the last stage returns, whatever it is, as in `run`."""
        return self._run(self._plan(micro_batches, forward_only=True))

    def _run(self, plan: _Plan) -> list[Any]:
        self._results, self._posted = [], dict.fromkeys(plan.arrivals, 0)
        self._held.clear()
        self._inbox.clear()
        self._outbox.clear()
        self._due.clear()
        for index, step in enumerate(plan.steps):
            for near in plan.steps[index : index + 2]:
                self._post(plan, near)
            parts = parts_of(step)
            self._due.extend(message for part in parts if (message := self._made_by(part)) is not None)
            with torch.profiler.record_function(" + ".join(f"{part.kind} {part.stage}.{part.micro}" for part in parts)):
                _in_turns([self._forward(part) if part.kind == "forward" else self._backward(part) for part in parts])
        self._links.flush()
        return self._results

    def _plan(self, micro_batches: int, forward_only: bool) -> _Plan:
        key = micro_batches, forward_only
        if key not in self._plans:
            order = forward_actions if forward_only else pipeline_actions
            arrivals: dict[int, list[_Message]] = {}
            for rank in range(self.mesh.pp.size):
                if rank != self.mesh.pp.rank:
                    parts = [part for step in order(self.mesh.cfg, rank, micro_batches) for part in parts_of(step)]
                    sent = [message for part in parts if (message := self._made_by(part)) is not None]
                    arrivals[rank] = [message for message in sent if self._owner[message.stage] == self.mesh.pp.rank]
            place = {message: (rank, at) for rank, sent in arrivals.items() for at, message in enumerate(sent)}
            self._plans[key] = _Plan(order(self.mesh.cfg, self.mesh.pp.rank, micro_batches), arrivals, place)
        return self._plans[key]

    def _made_by(self, action: Action) -> _Message | None:
        """What an action makes for another stage."""
        if action.kind == "forward":
            return _Message("input", action.stage + 1, action.micro) if action.stage < self._last else None
        if action.kind == "weights" or action.stage == 0:
            return None
        return _Message("gradient", action.stage - 1, action.micro)

    def _needed_by(self, action: Action) -> _Message | None:
        """What an action needs of another stage."""
        if action.kind == "forward":
            return _Message("input", action.stage, action.micro) if action.stage else None
        if action.kind == "weights" or action.stage == self._last:
            return None
        return _Message("gradient", action.stage, action.micro)

    def _travelling(self, message: _Message) -> dict[str, Travels]:
        """The tensors of a message by name: those of the boundary, or of these the ones that have gradients."""
        if message.what == "input":
            return dict(self.boundaries[message.stage - 1])
        return {name: kind for name, kind in self.boundaries[message.stage].items() if kind.dtype.is_floating_point}

    def _post(self, plan: _Plan, step: Action | Pair) -> None:
        """Begin to receive what an entry needs, and all that its sender sends before."""
        for part in parts_of(step):
            needed = self._needed_by(part)
            if needed is None or needed not in plan.place:
                continue
            source, at = plan.place[needed]
            while self._posted[source] <= at:
                message = plan.arrivals[source][self._posted[source]]
                kinds = self._travelling(message).values()
                tensors = [torch.empty(kind.shape, dtype=kind.dtype, device=self.mesh.device) for kind in kinds]
                self._inbox[message] = tensors, self._links.receive(source, tensors)
                self._posted[source] += 1

    def _take(self, message: _Message) -> dict[str, Tensor]:
        """A message's tensors by name, once they are there."""
        tensors, works = self._inbox.pop(message)
        for work in works:
            work.wait()
        return dict(zip(self._travelling(message), tensors, strict=True))

    def _hand_on(self, message: _Message, named: Mapping[str, Tensor]) -> None:
        """Send a message's tensors to the process of its stage, or leave them for this one."""
        tensors = []
        for name, kind in self._travelling(message).items():
            tensor = named.get(name)
            if tensor is None or (tuple(tensor.shape), tensor.dtype) != (tuple(kind.shape), kind.dtype):
                found = "not there" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                raise ValueError(
                    f"the {message.what} {name!r} of stage {message.stage}, micro-batch {message.micro}, is {found}, "
                    f"but was declared as {list(kind.shape)} {kind.dtype}"
                )
            tensors.append(tensor.detach())
        self._outbox[message] = tensors
        # of two passes in turns the second may be ready first: the receiver goes by the list
        while self._due and self._due[0] in self._outbox:
            message = self._due.popleft()
            tensors, owner = self._outbox.pop(message), self._owner[message.stage]
            if owner == self.mesh.pp.rank:
                self._inbox[message] = tensors, []
            else:
                self._links.send(owner, [tensor.contiguous() for tensor in tensors])

    def _forward(self, action: Action) -> Iterator[None]:
        """Run a forward pass, pausing at its cuts."""
        stage, micro = action.stage, action.micro
        needed = self._needed_by(action)
        given = {} if needed is None else {name: _leaf(tensor) for name, tensor in self._take(needed).items()}
        held = _Pass([_Part(list(given.values()))])
        x, carry = given.get("x"), {name: tensor for name, tensor in given.items() if name != "x"}
        del given
        outcome = self.stages[stage](micro, x, carry)
        del x, carry
        if isinstance(outcome, Generator):
            outcome = yield from _through_cuts(outcome, held)
        made = self._made_by(action)
        if made is None:
            if torch.is_grad_enabled():
                assert isinstance(outcome, Tensor), "the last stage returns the loss"
                held.loss, held.parts[-1].ends = outcome.detach(), [_edge(outcome)]
            self._results.append(outcome.detach() if isinstance(outcome, Tensor) else outcome)
        else:
            assert isinstance(outcome, tuple), "a stage before the last returns (x, carry)"
            named = {"x": outcome[0], **outcome[1]}
            self._hand_on(made, named)
            # edges and not tensors: what was sent is not kept for its backward pass
            held.parts[-1].ends = [_edge(named[name]) for name in self._travelling(_Message("gradient", stage, micro))]
        if torch.is_grad_enabled():
            self._held[stage, micro] = held

    def _backward(self, action: Action) -> Iterator[None]:
        """Run a backward pass or a part of it, pausing at the cuts of its forward pass."""
        key = action.stage, action.micro
        if action.kind == "weights":
            run_deferred(self._held.pop(key).deferred)
            return
        held, needed = self._held[key], self._needed_by(action)
        grads: list[Tensor | None]
        if needed is not None:
            grads = list(self._take(needed).values())
        else:
            assert held.loss is not None
            grads = [torch.ones_like(held.loss)]
        split = action.kind == "inputs"
        while held.parts:
            part = held.parts.pop()
            # where it pauses, the exchange that a part ends with goes out before the weights' gradients are made
            _backward_through(part, grads, held.deferred if split or held.parts else None)
            grads = [leaf.grad for leaf in part.leaves]
            if held.parts:
                if not split:
                    run_deferred(held.deferred)
                yield
        made = self._made_by(action)
        if made is not None:
            # the first part's leaves are what the boundary names, in its order
            named = zip(self.boundaries[made.stage], part.leaves, grads, strict=True)
            pairs = ((name, leaf, grad) for name, leaf, grad in named if leaf.requires_grad)
            self._hand_on(made, {name: torch.zeros_like(x) if grad is None else grad for name, x, grad in pairs})
        if not split:
            del self._held[key]


def _in_turns(passes: list[Iterator[None]]) -> None:
    """Run passes to their ends, each to its next pause in turn."""
    ended = object()
    while passes:
        passes = [each for each in passes if next(each, ended) is not ended]


def _through_cuts(parts: Parts, held: _Pass) -> Generator[None, None, Outcome]:
    """Run a stage that pauses and cut its graph at each pause; what the stage returns."""
    try:
        cut = next(parts)
        while True:
            held.parts[-1].ends = [_edge(tensor) for tensor in cut]
            held.parts.append(_Part([_leaf(tensor) for tensor in cut]))
            yield
            cut = parts.send(held.parts[-1].leaves)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor as the beginning of a graph."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() and torch.is_grad_enabled())


def _edge(tensor: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(tensor) if tensor.requires_grad else None


def _backward_through(part: _Part, grads: Sequence[Tensor | None], deferred: Deferred | None) -> None:
    """Take gradients from a part's ends to its leaves and weights; weights' products wait in `deferred`, if given."""
    pairs = [(end, grad) for end, grad in zip(part.ends, grads, strict=True) if end is not None and grad is not None]
    if pairs:
        with nullcontext() if deferred is None else deferred_gradients(deferred):
            torch.autograd.backward([end for end, _ in pairs], [grad for _, grad in pairs])
