"""A layer's experts over some tokens at a time, with or without what the backward pass needs of them.

A chunk that is computed again goes forward once more in the backward pass, and back at once: what lies between exists
for one chunk only. Nobody reads the value of that pass, so what makes nothing but the value is left out (`unread`). And
where the forward pass itself is the second one of a recomputed block, it computes nothing: the chunks wait for the
backward pass, which follows. So the experts go forward once with their value and once without, recomputed or not.

Legend: T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pithwood.moe.experts import accumulates
from pithwood.ops.unread import unread_like

Part = Callable[..., Tensor]
"""Called with a chunk's rows of each input, those of the residual or None, and whether nobody reads the value; [T, D]
of the first input's shape and dtype, token by token the same however tokens are cut, up to rounding."""


def in_chunks(
    part: Part,
    size: int,
    inputs: Sequence[Tensor],
    residual_TD: Tensor | None,
    weights: Sequence[Tensor],
    *,
    again: bool,
    unread: bool = False,
) -> Tensor:
    """[T, D]: what `part` makes of `size` tokens at a time, laid end to end.

    inputs       of T rows each, the first one [T, D]
    residual_TD  [T, D], which `part` adds to its sum; None for none
    weights      what `part` multiplies by, besides its inputs: their gradients are added to `.grad` by the pass that
                 computes a chunk again, and handed out where `torch.autograd.grad` asks
    again        compute each chunk again in the backward pass instead of keeping what it needs; no random numbers
    unread       nobody reads what this returns, its graph alone is wanted
    """
    if not torch.is_grad_enabled():
        return _joined(part, size, inputs, residual_TD)
    if again:
        return _Again.apply(_Call(part, size, tuple(weights), len(inputs), unread), residual_TD, *inputs, *weights)
    parts = [part(*some, rest, unread) for some, rest in _cut(size, inputs, residual_TD)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(
    size: int, inputs: Sequence[Tensor], residual_TD: Tensor | None
) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    """(inputs, residual) of each chunk; one chunk, if there are no tokens. By `split`, whose backward pass lays the
    gradients end to end, where that of slices adds a gradient of all tokens for each.
    """
    chunks = list(zip(*(x.split(size) for x in inputs), strict=True))
    rest: Sequence[Tensor | None] = [None] * len(chunks) if residual_TD is None else residual_TD.split(size)
    return list(zip(chunks, rest, strict=True))


def _joined(part: Part, size: int, inputs: Sequence[Tensor], residual_TD: Tensor | None) -> Tensor:
    """The value, each chunk's written to its place at once."""
    chunks = _cut(size, inputs, residual_TD)
    if len(chunks) == 1:
        some, rest = chunks[0]
        return part(*some, rest, False)
    out_TD = inputs[0].new_empty(inputs[0].shape)
    for place, (some, rest) in zip(out_TD.split(size), chunks, strict=True):
        place.copy_(part(*some, rest, False))
    return out_TD


@dataclass(frozen=True)
class _Call:
    part: Part
    size: int
    weights: tuple[Tensor, ...]
    """Not saved as tensors are: recomputation hands those back as others, without their copies and gradients."""
    num_inputs: int
    unread: bool


class _Again(torch.autograd.Function):
    """Keeps the inputs alone. The residual is only added: its gradient is the output's, whatever the chunks."""

    @staticmethod
    def forward(ctx: Any, call: _Call, residual_TD: Tensor | None, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        inputs = tensors[: call.num_inputs]
        ctx.call = call
        ctx.save_for_backward(*inputs)
        if call.unread:
            return unread_like(inputs[0], *inputs[0].shape)
        return _joined(call.part, call.size, inputs, residual_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        call: _Call = ctx.call
        inputs = ctx.saved_tensors
        _, needs_residual, *needs = ctx.needs_input_grad
        wanted, needs_weights = needs[: call.num_inputs], needs[call.num_inputs :]
        handed = [weight for weight, need in zip(call.weights, needs_weights, strict=True) if need]
        if all(map(accumulates, handed)):
            handed = []
        grads: list[Tensor | None] = [None] * len(inputs)
        sums: list[Tensor] = []
        if any(needs):
            first = 0
            for (some, _), grad in zip(_cut(call.size, inputs, None), grad_TD.split(call.size), strict=True):
                found, given = _back(call.part, some, grad, wanted, handed)
                for index, value in enumerate(found):
                    grads[index] = _placed(value, grads[index], inputs[index], first)
                sums = [total + new for total, new in zip(sums, given, strict=True)] if sums else given
                first += len(grad)
        left = iter(sums)
        return (
            None,
            grad_TD if needs_residual else None,
            *grads,
            *(next(left) if need and handed else None for need in needs_weights),
        )


def _back(
    part: Part, some: Sequence[Tensor], grad_CD: Tensor, wanted: Sequence[bool], handed: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of a chunk's inputs, None where not wanted, and of the weights that get theirs handed out; those of all
    others are in their `.grad`.
    """
    leaves = [x.detach().requires_grad_(want) for x, want in zip(some, wanted, strict=True)]
    with torch.enable_grad():
        value = part(*leaves, None, True)
    if not handed:
        torch.autograd.backward(value, grad_CD)
        return [leaf.grad for leaf in leaves], []
    asked = [*(leaf for leaf in leaves if leaf.requires_grad), *handed]
    found = iter(torch.autograd.grad(value, asked, grad_CD))
    return [next(found) if want else None for want in wanted], list(found)


def _placed(value: Tensor | None, whole: Tensor | None, like: Tensor, first: int) -> Tensor | None:
    """The gradient of all tokens, in which the value of a chunk stands from `first` on."""
    if value is None or len(value) == len(like):
        return value
    if whole is None:
        whole = torch.empty_like(like)
    whole[first : first + len(value)] = value
    return whole
