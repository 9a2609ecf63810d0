"""How a product uses an fp32 master weight: its copy in the products' dtype, and where its gradient is added up.

A master weight is cast to the dtype of the activations wherever it is used. On a GPU that would read and write every
weight again in every micro-batch, so a trainer may keep the copies (`keep_copies`) and renew them after each update.
Gradients of large weights are added by the kernel that computes them straight to `.grad` in fp32 (`gradient_sink`):
handing autograd a gradient of its own would double their traffic. Such a product need not be made within the backward
pass: under `deferred_gradients` it waits, with its operands, until it is asked for, so that a pipeline can send the
inputs' gradients first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Deferred = list[Callable[[], None]]
"""Products that add weight gradients, still to be made."""

# A variable of the module, not of the thread: the engine runs backward passes on a GPU in a thread of its own.
_deferred: Deferred | None = None


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
    leaf = None if torch.compiler.is_compiling() else _leaf(weight)
    if leaf is None:
        return None
    if leaf.grad is None:
        leaf.grad = torch.empty_like(leaf)
        return leaf.grad, False
    return leaf.grad, True


def _leaf(weight: Tensor) -> Tensor | None:
    """The parameter whose `.grad` is this weight's; None for what is no leaf or wants no gradient."""
    if not (weight.is_leaf and weight.requires_grad):
        return None
    # under hooks on saved tensors another tensor may stand for the parameter; the node that adds up gradients is one
    return torch.autograd.graph.get_gradient_edge(weight).node.variable  # type: ignore[attr-defined,no-any-return]


def add_gradient(weight: Tensor, add: Callable[[Tensor, bool], object]) -> bool:
    """Whether the weight has a sink (`gradient_sink`); if so, `add(total, holds a sum)` is called for it: at once, or
    under `deferred_gradients` when the queue is run.

    add  adds a product to `total`, or writes it over `total` if that holds no sum; what it refers to is kept until then
    """
    if _deferred is None or torch.compiler.is_compiling():
        sink = gradient_sink(weight)
        if sink is not None:
            add(*sink)
        return sink is not None
    leaf = _leaf(weight)
    if leaf is None:
        return False

    def later() -> None:
        sink = gradient_sink(leaf)
        # a weight that was frozen meanwhile wants no gradient
        if sink is not None:
            add(*sink)

    _deferred.append(later)
    return True


def when_added(call: Callable[[], None]) -> None:
    """Call `call` when all products are added that the running backward pass has made for weights: at once, or under
    `deferred_gradients` in its turn when the queue is run.
    """
    if _deferred is None:
        call()
    else:
        _deferred.append(call)


@contextmanager
def deferred_gradients(queue: Deferred) -> Iterator[None]:
    """Backward passes in this context append to `queue` what would add to `.grad` of large weights: the products of
    `ops/linear.py` on its fast path and of the stacked experts. `run_deferred` makes them.

    Everything else is done in the backward pass as ever: gradients that autograd adds up (norms, routers, biases, and
    all linear maps on a CPU or in fp32) and those made elsewhere (the head's, in its forward pass; the embedding's).
    """
    global _deferred
    before, _deferred = _deferred, queue
    try:
        yield
    finally:
        _deferred = before


@torch.no_grad()
def run_deferred(queue: Deferred) -> None:
    """Make the products of a queue, in order, and let each go with its operands; the queue is empty after."""
    queue.reverse()
    while queue:
        queue.pop()()
