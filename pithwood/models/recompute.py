"""What the backward pass computes again instead of keeping it, block by block, and where what it keeps waits meanwhile.

A recomputed block keeps its input, the carry and its discrete decisions. Its forward pass runs without a graph; its
backward pass replays the decisions through a second forward pass and goes back through that one. What happens once per
micro-batch (loss values, expert counts, statistics) happens in the first pass; gradients, those of losses attached
inside the block among them, arise in the second, exactly once.

Legend: T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pithwood.attention.base import Cost, LayerContext
from pithwood.losses import LossLedger
from pithwood.models.offload import HostStash, Stashed

Recompute = Literal["none", "selective", "block"]


def recomputed(
    block: nn.Module, x_TD: Tensor, ctx: LayerContext, stash: HostStash | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`block(x_TD, ctx)`, of which only x_TD, the carry and the decisions are kept for the backward pass.

    block   called as `block(x_TD, ctx) -> (x_TD, carry)`; no random numbers, and state other than through `ctx` only
            where `ctx.recomputing` is false
    stash   where what is kept waits in host memory; None leaves it on the device

    Parameter gradients are added to `.grad` by the second pass itself, as a backward pass outside would. Without
    gradients to compute this is a plain call.
    """
    trains = x_TD.requires_grad or any(param.requires_grad for param in block.parameters())
    if not (trains and torch.is_grad_enabled()):
        return block(x_TD, ctx)
    call = _Call(block, ctx, stash)
    # an input that requires gradients, so that the backward pass comes here even if only parameters want theirs
    anchor = torch.empty(0, requires_grad=True)
    y_TD, *changed = _Recomputed.apply(call, anchor, x_TD, *ctx.carry.values())
    return y_TD, {**ctx.carry, **dict(zip(call.changed, changed, strict=True))}


def cheaply_recomputed(
    block: nn.Module, x_TD: Tensor, ctx: LayerContext, cheap: Sequence[nn.Module]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`block(x_TD, ctx)`, in whose graph the outputs of `cheap` modules are not kept but computed again from their
    inputs, which are.

    cheap   submodules of one tensor to one, such as norms; whoever saves their output gets it anew, once for all. One
            that returns (input, output), the input perhaps a sum of two, has its output computed again from that
    """
    made: dict[int, tuple[Tensor, _Again]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, Tensor]) -> None:
        x, out = result if isinstance(result, tuple) else (args[0], result)
        # the output is held until the block is done, so that no other tensor can take its address
        made[out.data_ptr()] = out, _Again(module, x.detach())

    def pack(tensor: Tensor) -> Tensor | _Again:
        found = made.get(tensor.data_ptr())
        if found is None or tensor.shape != found[0].shape or tensor.dtype != found[0].dtype:
            return tensor
        return found[1].saved() if tensor.is_contiguous() else tensor

    def unpack(kept: Tensor | _Again) -> Tensor:
        return kept.get() if isinstance(kept, _Again) else kept

    hooks = [module.register_forward_hook(note) for module in cheap]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return block(x_TD, ctx)
    finally:
        # whatever was saved holds `pack`, and would hold the outputs through it
        made.clear()
        for hook in hooks:
            hook.remove()


class _Again:
    """The output of a module, computed again when it is asked for first and let go when it was asked for last."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x, self.uses = module, x, 0
        self.value: Tensor | None = None

    def saved(self) -> _Again:
        self.uses += 1
        return self

    def get(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.module.forward(self.x)
        value = self.value
        self.uses -= 1
        if self.uses <= 0:
            self.value = None
        return value


class _Call:
    """One run of one block: the block, its context, and what its second pass must find again."""

    def __init__(self, block: nn.Module, ctx: LayerContext, stash: HostStash | None) -> None:
        self.block, self.ctx, self.stash = block, ctx, stash
        self.names = list(ctx.carry)
        self.changed: list[str] = []
        """Carry entries that the block adds or replaces."""
        self.decisions: dict[str, Any] = {}
        self.stashed: Stashed | None = None
        """What waits in host memory: the inputs, then the tensors of the decisions in their order."""

    def first(self, x_TD: Tensor, carry: tuple[Tensor, ...]) -> list[Tensor]:
        """The block's output and the carry entries that it changes."""
        given = dict(zip(self.names, carry, strict=True))
        y_TD, after = self.block(x_TD, replace(self.ctx, carry=given, probe=self.decisions))
        if self.ctx.probe is not None:
            self.ctx.probe.update(self.decisions)
        self.changed = [name for name, value in after.items() if value is not given.get(name)]
        return [y_TD, *(after[name] for name in self.changed)]

    def again(self, x_TD: Tensor, carry: list[Tensor], decisions: dict[str, Any]) -> list[Tensor]:
        """The same with the recorded decisions; nothing is counted or recorded a second time."""
        ledger = None if self.ctx.ledger is None else LossLedger(self.ctx.ledger.totals)
        given = dict(zip(self.names, carry, strict=True))
        ctx = replace(self.ctx, carry=given, probe=None, replay=decisions, ledger=ledger, recomputing=True)
        y_TD, after = self.block(x_TD, ctx)
        return [y_TD, *(after[name] for name in self.changed)]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, x_TD: Tensor, *carry: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        outputs = call.first(x_TD, carry)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        if call.stash is None:
            ctx.save_for_backward(x_TD, *carry)
        else:
            call.stashed = call.stash.put([x_TD, *carry, *_tensors_in(call.decisions)])
            call.decisions = _with_tensors(call.decisions, None)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):  # type: ignore[override]
        call: _Call = ctx.call
        kept, decisions = ctx.saved_tensors, call.decisions
        if call.stashed is not None:
            back = iter(call.stashed.get())
            kept = [next(back) for _ in range(1 + len(call.names))]
            decisions = _with_tensors(decisions, back)
        wanted = ctx.needs_input_grad[2:]
        x_TD, *carry = (
            value.detach().requires_grad_(want and value.is_floating_point())
            for value, want in zip(kept, wanted, strict=True)
        )
        with torch.enable_grad():
            outputs = call.again(x_TD, carry, decisions)
        pairs = [
            (value, grad)
            for value, grad in zip(outputs, grads, strict=True)
            if grad is not None and value.requires_grad
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
        return None, None, x_TD.grad, *(value.grad for value in carry)


class BlockCost(NamedTuple):
    """What one block's forward costs."""

    whole: Cost
    """When it keeps everything."""
    input_bytes: float
    """Its input and its decisions."""
    cheap_bytes: float
    """Of what it keeps, what a selective block computes again."""


@dataclass
class ActivationPlan:
    """How a model's blocks keep what their backward pass needs: a runtime object, made once per run and device."""

    recompute: tuple[Recompute, ...]
    """One entry per block."""
    offload: bool = False
    """Whether the inputs of recomputed blocks wait in host memory; on a CUDA GPU only."""
    stash: HostStash | None = field(default=None, init=False, repr=False)
    """Made by the first offloaded block."""

    @staticmethod
    def keep_all(num_layers: int) -> ActivationPlan:
        nothing: Recompute = "none"
        return ActivationPlan((nothing,) * num_layers)

    def costs(self, blocks: Sequence[BlockCost]) -> Cost:
        """Cost of a forward through all blocks, of which each keeps what the plan says."""
        total, inputs = Cost(), []
        for block, recompute in zip(blocks, self.recompute, strict=True):
            cost = block.whole
            if recompute == "block":
                inputs.append(block.input_bytes)
                both = cost.workspace_bytes + cost.saved_bytes
                cost = replace(cost, saved_bytes=0.0, workspace_bytes=both)
            elif recompute == "selective":
                cost = replace(cost, saved_bytes=cost.saved_bytes - block.cheap_bytes)
            total = total + cost
        # offloaded, two blocks' inputs are on the device at a time: one at work, one on its way
        inputs = sorted(inputs)[-2:] if self.offload else inputs
        return total + Cost(saved_bytes=sum(inputs))

    def run(self, block: Any, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        """`block(x_TD, ctx)` with what the plan says of layer `ctx.layer`; only training passes recompute. What is
        cheap inside a compiled stage its compiler knows best.
        """
        recompute = self.recompute[ctx.layer] if ctx.mode == "train" and torch.is_grad_enabled() else "none"
        if recompute == "none":
            return block(x_TD, ctx)
        if recompute == "selective" and block.compiled is None:
            return cheaply_recomputed(block, x_TD, ctx, block.norms())
        if self.offload and self.stash is None:
            self.stash = HostStash(x_TD.device)
        return recomputed(block, x_TD, ctx, self.stash)


def _tensors_in(decisions: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that decisions consist of: a decision is a tensor or a dataclass of tensors and plain values."""
    found: list[Tensor] = []
    for value in decisions.values():
        parts = [getattr(value, item.name) for item in fields(value)] if is_dataclass(value) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


def _with_tensors(decisions: Mapping[str, Any], tensors: Iterator[Tensor] | None) -> dict[str, Any]:
    """The decisions with their tensors replaced, in order, by others; None leaves a placeholder of no size."""

    def new(old: Tensor) -> Tensor:
        return torch.empty(0, dtype=old.dtype, device="meta") if tensors is None else next(tensors)

    found: dict[str, Any] = {}
    for name, value in decisions.items():
        if isinstance(value, Tensor):
            found[name] = new(value)
        elif is_dataclass(value) and not isinstance(value, type):
            parts = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
            found[name] = replace(
                value, **{name: new(part) for name, part in parts.items() if isinstance(part, Tensor)}
            )
        else:
            found[name] = value
    return found
