"""Grouped matrix product as a loop over groups; the definition of correct, and the fast path on CPU.

Every product is written straight into its slice of the result: no copies, no per-group gradients to stack. The loops
are registered as operators, so that compiled graphs and checkpointing policies see one node for any group sizes.

Legend: R rows, D input width, X output width, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pithwood.ops.operator import operator


def grouped_mm_ref(rows_RD: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e]:offsets[e + 1]] @ w[e]^T for every group, as `grouped_mm`; reads the offsets on the host."""
    return _product(rows_RD, w_EXD, offsets)


@operator("grouped_mm_ref")
def _product(rows_RD: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    out_RX = rows_RD.new_empty(rows_RD.shape[0], w_EXD.shape[1])
    for e, group in _groups(offsets):
        torch.mm(rows_RD[group], w_EXD[e].t(), out=out_RX[group])
    return out_RX


@operator("grouped_mm_ref_grad_rows")
def _grad_rows(grad_RX: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    grad_RD = grad_RX.new_empty(grad_RX.shape[0], w_EXD.shape[2])
    for e, group in _groups(offsets):
        torch.mm(grad_RX[group], w_EXD[e], out=grad_RD[group])
    return grad_RD


@operator("grouped_mm_ref_grad_weight")
def _grad_weight(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor) -> Tensor:
    grad_EXD = rows_RD.new_empty(offsets.shape[0] - 1, grad_RX.shape[1], rows_RD.shape[1])
    for e, group in _groups(offsets):
        # A product over no rows is a matrix of zeros.
        torch.mm(grad_RX[group].t(), rows_RD[group], out=grad_EXD[e])
    return grad_EXD


@torch.no_grad()
def grouped_grad_weight_ref(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool) -> None:
    """out[e] (+)= grad[group e]^T @ rows[group e], multiplied in the dtype of `out_EXD`; reads offsets on the host."""
    dtype = out_EXD.dtype
    for e, group in _groups(offsets):
        grad_XR, rows = grad_RX[group].to(dtype).t(), rows_RD[group].to(dtype)
        if add:
            out_EXD[e].addmm_(grad_XR, rows)
        else:
            torch.mm(grad_XR, rows, out=out_EXD[e])


@_product.register_fake
def _(rows_RD: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], w_EXD.shape[1])


@_grad_rows.register_fake
def _(grad_RX: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    return grad_RX.new_empty(grad_RX.shape[0], w_EXD.shape[2])


@_grad_weight.register_fake
def _(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor) -> Tensor:
    return rows_RD.new_empty(offsets.shape[0] - 1, grad_RX.shape[1], rows_RD.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RX: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RD, w_EXD, offsets = ctx.saved_tensors
    needs_rows, needs_weight = ctx.needs_input_grad[:2]
    return (
        _grad_rows(grad_RX, w_EXD, offsets) if needs_rows else None,
        _grad_weight(grad_RX, rows_RD, offsets) if needs_weight else None,
        None,
    )


_product.register_autograd(_backward, setup_context=_save_inputs)


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) for every group, empty ones too."""
    bounds = offsets.tolist()
    for e in range(len(bounds) - 1):
        yield e, slice(bounds[e], bounds[e + 1])
