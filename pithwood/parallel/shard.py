"""Weights divided between processes: gathered before a block runs, gradients added up and divided after it.

A process keeps of each divided weight a flat fp32 piece, which is all that the optimizer sees of it. The parameter in
the module has the whole shape and no memory but while it is gathered: in the products' dtype, as the copy that
`ops.master` serves to them, or in fp32 where a weight is used as it is. Its whole fp32 gradient is written by the
products themselves (`ops.master.gradient_sink`), over as many micro-batches as `mesh.reduce` says, and then scattered.
Gathering of the next block and scattering of the last one run beside the compute of this one, and so does what replicas
add up of each other's pieces, a block at a time in the last micro-batch's backward pass. Weights of fewer than two
dimensions (norms, biases) are held whole by all.

Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054; Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277. FSDP2 of torch is
not used: it gathers what autograd sees, so that every micro-batch's gradient of a bf16 weight is rounded to bf16 before
it is added in fp32, by a pass of its own; the products here add to fp32 as they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pithwood.ops.master import keep_copies, when_added
from pithwood.parallel.mesh import Group, Mesh
from pithwood.parallel.pieces import Piece


class Weight:
    """One parameter: what the module computes with, and the piece of it that this process keeps."""

    def __init__(self, name: str, param: nn.Parameter, piece: Piece, group: Group, low: torch.dtype | None) -> None:
        """piece: what the processes of `group` hold together of the whole tensor, all of `param`. low: the dtype of the
        products that take it; None gathers it in fp32."""
        self.name, self.param, self.group = name, param, group
        self.cut = group.size > 1 and param.dim() >= 2 and piece.numel % group.size == 0
        self.low = low if self.cut else None
        self.piece = piece.part(group.rank, group.size) if self.cut else piece
        self.kept: nn.Parameter = param
        """fp32, what the optimizer updates: the parameter itself, or this process's flat piece of it."""
        if self.cut:
            begin = self.piece.start - piece.start
            flat = param.detach().reshape(-1)[begin : begin + self.piece.numel].clone()
            self.kept = nn.Parameter(flat, requires_grad=param.requires_grad)
            self.release()
        self.holders = [] if self.cut or group.size == 1 else [group]
        """Who holds the same piece besides its replicas."""
        self.writes = not self.holders or group.rank == 0
        """Whether this process saves it, if it is the first of its replicas."""

    def buffers(self) -> tuple[Tensor, Tensor]:
        """(what to gather into, this process's part of it), both flat: the parameter is there once that is done."""
        if self.low is not None:
            keep_copies([self.kept], self.low)
            whole = torch.empty(self.param.shape, dtype=self.low, device=self.kept.device)
            # the version is that of the parameter, which nothing changes: `in_dtype` takes the copy as fresh
            self.param.kept_copy = (whole, self.param._version)  # type: ignore[attr-defined]
            return whole.view(-1), self.kept.kept_copy[0]  # type: ignore[attr-defined]
        self.param.untyped_storage().resize_(self.param.numel() * self.param.element_size())
        # `data` has a version of its own: a graph that holds the parameter finds the same values in it again, and is
        # not told of the writing
        return self.param.data.view(-1), self.kept.detach()

    def release(self) -> None:
        """Give up the memory of the gathered parameter."""
        if hasattr(self.param, "kept_copy"):
            del self.param.kept_copy
        self.param.untyped_storage().resize_(0)


class Unit:
    """Weights that are gathered and scattered together, those of a block for instance."""

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        self.cut = [weight for weight in weights if weight.cut]
        """Those that are divided."""
        self.by_group: list[tuple[Group, list[Weight]]] = []
        """The same, by those who divide them: they travel together."""
        for weight in self.cut:
            with_it = [others for group, others in self.by_group if group.ranks == weight.group.ranks]
            if with_it:
                with_it[0].append(weight)
            else:
                self.by_group.append((weight.group, [weight]))
        self.works: list[Any] = []
        """Of a gathering that was begun and not waited for."""
        self.gathered = False
        """Whether the weights are there, or on their way."""
        self.backwards = 0
        """Backward passes of this step that are done."""
        self.replicated = False
        """Whether its pieces' gradients are being added up between replicas: those of all micro-batches are in them."""
        self.wanted: set[int] = set()
        """The passes that are in the unit or will be next: 1 a forward pass, -1 a backward pass. Two that take turns
        may both be in it, and neither takes the weights from the other."""

    def begin_gather(self) -> None:
        """Begin to fill the parameters, in one exchange per group of processes."""
        for group, weights in self.by_group:
            wholes, parts = zip(*(weight.buffers() for weight in weights), strict=True)
            self.works.append(group.all_gather_several(list(wholes), list(parts)))
        self.gathered = True

    def wait(self) -> None:
        """Until the parameters are there."""
        for work in self.works:
            if work is not None:
                work.wait()
        self.works = []


class Shards:
    """All weights of this process's part of the model.

    begin_step   before the first forward pass of a step
    run          one unit's forward pass; its backward pass follows by itself
    finish_step  after the last backward pass: every `kept` weight has the whole step's gradient then
    """

    def __init__(self, mesh: Mesh, low: torch.dtype | None = None) -> None:
        """low: the dtype in which weights of products are gathered (their copies', on a GPU); None: fp32."""
        self.mesh, self.low = mesh, low
        self.units: dict[str, Unit] = {}
        """In the order of a forward pass."""
        self.micro_batches = 1
        self.tell_output: Callable[[str, Tensor], None] = lambda key, x: None
        """Told every unit's output, in a forward pass proper."""
        self._neighbours: dict[str, dict[int, Unit]] = {}
        """The unit before (-1) and after (1) each, where there is one."""
        self._scattering: list[tuple[Any, list[Weight], list[Tensor], list[Tensor]]] = []
        """Work, its weights, where the results will be, and what they are made of."""
        self._complete: list[Unit] = []
        """Of whose pieces the step's gradients are complete once all of that is there."""
        self._adding: list[Any] = []
        """Work of replicas."""

    def add(
        self, key: str, parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]], products: set[str]
    ) -> None:
        """Take over the parameters of a unit; the memory of those that are divided is released.

        parameters  by full name
        shapes      the whole shape of those of which this process has a part along the first dimension (its experts)
        products    names of those that are used by products in the activations' dtype alone
        """
        weights = []
        for name, param in parameters.items():
            group, piece = self.mesh.shard, Piece.whole(tuple(param.shape))
            if name in shapes:
                group = self.mesh.expert_shard
                piece = Piece.whole(shapes[name]).part(self.mesh.ep.rank, self.mesh.ep.size)
            weights.append(Weight(name, param, piece, group, self.low if name in products else None))
        unit = Unit(weights)
        if self.units:
            last = next(reversed(self.units))
            self._neighbours[last][1] = unit
            self._neighbours[key] = {-1: self.units[last]}
        else:
            self._neighbours[key] = {}
        self.units[key] = unit

    def weights(self) -> Iterator[Weight]:
        for unit in self.units.values():
            yield from unit.weights

    def names(self) -> set[str]:
        """Of all weights that were taken over."""
        return {weight.name for weight in self.weights()}

    def kept(self) -> dict[str, Tensor]:
        """What the optimizer updates, by name."""
        return {weight.name: weight.kept for weight in self.weights()}

    def pieces(self) -> dict[str, Piece]:
        """Which elements of the whole tensors those are."""
        return {weight.name: weight.piece for weight in self.weights()}

    def follow(self) -> None:
        """Let the parameters train, or not, as the optimizer decided for the pieces."""
        for weight in self.weights():
            weight.param.requires_grad_(weight.kept.requires_grad)

    def begin_step(self, micro_batches: int) -> None:
        """Begin a step of so many backward passes; weights gathered before it are forgotten."""
        self.micro_batches = micro_batches
        self.release()
        for unit in self.units.values():
            unit.backwards, unit.replicated = 0, False

    def run(self, key: str, call: Callable[..., Any], *inputs: Any) -> Any:
        """`call(*inputs)` with the unit's weights there, in the backward pass too; tensors among inputs and outputs
        (a tensor, or a tuple of a tensor and a dictionary of tensors) carry its gradients."""
        return self.leave(key, call(*self.enter(key, *inputs)))

    def enter(self, key: str, *inputs: Any) -> tuple[Any, ...]:
        """The first half of `run`, for a call that pauses: wait for the unit's weights; the inputs to go on with."""
        unit = self.units[key]
        if not unit.cut and not self._reduces:
            return inputs
        self._gather(unit, 1)
        self._prefetch(key, 1)

        def after_backward() -> None:
            # a pipeline may make the products of the unit's weights later
            when_added(lambda: self._after_backward(unit))

        return tuple(_gate(x, after_backward) if isinstance(x, Tensor) else x for x in inputs)

    def leave(self, key: str, out: Any) -> Any:
        """The second half of `run`: the output to hand on."""
        unit = self.units[key]
        self.tell_output(key, out if isinstance(out, Tensor) else out[0])
        if not unit.cut and not self._reduces:
            return out
        unit.wanted.discard(1)
        # the last unit's backward pass follows at once
        if not torch.is_grad_enabled() or key != next(reversed(self.units)):
            self._drop(unit)
        if not torch.is_grad_enabled():
            return out

        def before_backward() -> None:
            self._gather(unit, -1)
            self._prefetch(key, -1)

        if isinstance(out, Tensor):
            return _gate(out, before_backward)
        x, carry = out
        return _gate(x, before_backward), {name: _gate(value, before_backward) for name, value in carry.items()}

    def available(self, key: str) -> None:
        """Wait until the unit's weights are there, and begin to gather the next one's. They stay until the step's end,
        as does the unit's whole gradient."""
        self._gather(self.units[key], 1)
        self._prefetch(key, 1)

    def finish_step(self) -> None:
        """Add up and scatter what is left of the step's gradients, and wait for all of it."""
        for unit in self.units.values():
            self._scatter(unit)
        self._settle()
        self._add_small()
        self._add_replicas(
            [weight for unit in self.units.values() for weight in unit.weights if weight.holders or not unit.replicated]
        )
        for work in self._adding:
            if work is not None:
                work.wait()
        self._adding.clear()
        self.release()

    def release(self) -> None:
        """Forget what is gathered: the pieces have changed, or memory is wanted."""
        for unit in self.units.values():
            unit.wanted.clear()
            self._release(unit)

    @property
    def _reduces(self) -> bool:
        return self.mesh.tokens.size > 1

    def _gather(self, unit: Unit, direction: int) -> None:
        unit.wanted.add(direction)
        if not unit.gathered:
            unit.begin_gather()
        unit.wait()

    def _prefetch(self, key: str, direction: int) -> None:
        unit = self._neighbours[key].get(direction)
        if unit is not None:
            unit.wanted.add(direction)
            if not unit.gathered:
                unit.begin_gather()

    def _release(self, unit: Unit) -> None:
        if unit.gathered:
            unit.wait()
            unit.gathered = False
            for weight in unit.cut:
                weight.release()

    def _drop(self, unit: Unit) -> None:
        """Release a unit that a pass has left, if weights are gathered for each pass and no other wants it."""
        if self.mesh.cfg.gather == "forward" and not unit.wanted:
            self._release(unit)

    def _after_backward(self, unit: Unit) -> None:
        unit.backwards += 1
        unit.wanted.discard(-1)
        last = unit.backwards == self.micro_batches
        if last or self.mesh.cfg.reduce == "micro_batch":
            self._settle()
            self._scatter(unit)
        if last and self.mesh.replicate.size > 1:
            self._complete.append(unit)
            if not self._scattering:
                self._begin_replicas()
        if last:
            self._release(unit)
        self._drop(unit)

    def _scatter(self, unit: Unit) -> None:
        """Begin to add up the whole gradients of a unit's divided weights, in one exchange per group of processes."""
        for group, weights in unit.by_group:
            given = [weight for weight in weights if weight.param.requires_grad
                     and (weight.param.grad is not None or weight.kept.grad is None)]  # fmt: skip
            if not given:
                continue
            assert not unit.replicated, f"{given[0].name} has a gradient after its last backward pass"
            wholes = [_whole_gradient(weight) for weight in given]
            parts = [torch.empty_like(weight.kept, requires_grad=False) for weight in given]
            self._scattering.append((group.reduce_scatter_several(parts, wholes), given, parts, wholes))

    def _settle(self) -> None:
        for work, weights, parts, _ in self._scattering:
            work.wait()
            for weight, part in zip(weights, parts, strict=True):
                weight.kept.grad = part if weight.kept.grad is None else weight.kept.grad.add_(part)
        self._scattering.clear()
        self._begin_replicas()

    def _add_small(self) -> None:
        """Add up the gradients of weights that several processes hold whole, in one exchange per group of holders."""
        by_group: dict[tuple[int, ...], list[Weight]] = {}
        for weight in self.weights():
            if weight.holders and weight.param.requires_grad:
                by_group.setdefault(weight.group.ranks, []).append(weight)
        for weights in by_group.values():
            grads = [torch.zeros_like(w.param) if w.param.grad is None else w.param.grad for w in weights]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            weights[0].group.all_reduce(flat)
            for weight, total in zip(weights, flat.split([grad.numel() for grad in grads]), strict=True):
                weight.param.grad = total.view(weight.param.shape)

    def _begin_replicas(self) -> None:
        """Begin to add up between replicas what is complete, but for what several processes hold whole: that comes
        after `_add_small`."""
        for unit in self._complete:
            self._add_replicas([weight for weight in unit.weights if not weight.holders])
            unit.replicated = True
        self._complete.clear()

    def _add_replicas(self, weights: list[Weight]) -> None:
        """Begin to add up the gradients of these pieces between those that hold the same ones, in one exchange."""
        if self.mesh.replicate.size == 1:
            return
        grads = []
        for weight in weights:
            if weight.kept.requires_grad:
                if weight.kept.grad is None:
                    weight.kept.grad = torch.zeros_like(weight.kept)
                grads.append(weight.kept.grad)
        self._adding.append(self.mesh.replicate.all_reduce_several(grads, wait=False))


def _whole_gradient(weight: Weight) -> Tensor:
    """[numel] fp32, taken from the parameter; zeros if it has none."""
    whole, weight.param.grad = weight.param.grad, None
    if whole is None:
        return torch.zeros(weight.param.numel(), dtype=weight.kept.dtype, device=weight.kept.device)
    return whole.reshape(-1)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:  # type: ignore[override]
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        ctx.call()
        return grad, None


def _gate(x: Tensor, call: Callable[[], None]) -> Tensor:
    """x, in whose backward pass `call` is called when its gradient is complete."""
    return _Gate.apply(x, call) if x.requires_grad and torch.is_grad_enabled() else x
