"""How a product uses an fp32 master weight: its copy in the products' dtype, and where its gradient is added up.

A master weight is cast to the dtype of the activations wherever it is used. On a GPU that would read and write every
weight again in every micro-batch, so a trainer may keep the copies (`keep_copies`) and renew them after each update.
Gradients of large weights are added by the kernel that computes them straight to `.grad` in fp32 (`gradient_sink`):
handing autograd a gradient of its own would double their traffic.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, detached from its gradient where it is a kept copy; a cast where no fresh copy is kept."""
    # the version of a weight would be a constant of a compiled graph, which is for any step
    if weight.dtype == dtype or torch.compiler.is_compiling():
        return weight.to(dtype)
    kept: tuple[Tensor, int] | None = getattr(weight, "kept_copy", None)
    if kept is not None and kept[0].dtype == dtype and kept[1] == weight._version:
        return kept[0]
    return weight.to(dtype)


@torch.no_grad()
def keep_copies(weights: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Make or renew the copy in `dtype` that each weight carries; call it after every change of the weights.

    The copies live in the attribute `kept_copy` and go with the weight. One whose weight has changed in place since (by
    an operation that torch knows of) is not used; one that is fresh is left alone.
    """
    for weight in weights:
        kept: tuple[Tensor, int] | None = getattr(weight, "kept_copy", None)
        if kept is not None and kept[0].dtype == dtype and kept[1] == weight._version:
            continue
        copy = kept[0] if kept is not None and kept[0].dtype == dtype else torch.empty_like(weight, dtype=dtype)
        weight.kept_copy = (copy.copy_(weight), weight._version)  # type: ignore[attr-defined]


def drop_copies(weights: Iterable[Tensor]) -> None:
    """Forget the copies: their memory is free, and the weights are cast at each use again."""
    for weight in weights:
        if hasattr(weight, "kept_copy"):
            del weight.kept_copy


def gradient_sink(weight: Tensor) -> tuple[Tensor, bool] | None:
    """(`weight.grad`, True if it holds a sum to add to, False if its content is to be overwritten), for a kernel that
    adds its gradient itself and returns None to autograd; None where the gradient must be returned instead.

    Only leaves that require a gradient have a sink: what came out of other operations gets its gradient from autograd,
    and so does everything in a compiled graph, which knows leaves by their shape alone.
    Called in a backward pass, once per product; the gradient buffer is made here if there is none.
    """
    if not (weight.is_leaf and weight.requires_grad) or torch.compiler.is_compiling():
        return None
    # under hooks on saved tensors another tensor may stand for the parameter; the node that adds up gradients is one
    leaf: Tensor = torch.autograd.graph.get_gradient_edge(weight).node.variable  # type: ignore[attr-defined]
    if leaf.grad is None:
        leaf.grad = torch.empty_like(leaf)
        return leaf.grad, False
    return leaf.grad, True
