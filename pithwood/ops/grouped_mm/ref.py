"""Grouped matrix product as a loop over groups; the definition of correct, and the fast path on CPU.

Legend: R rows, D input width, X output width, E groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_mm_ref(rows_RD: Tensor, w_EXD: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e]:offsets[e + 1]] @ w[e]^T for every group, as `grouped_mm`; reads the offsets on the host once."""
    return _GroupedMM.apply(rows_RD, w_EXD, tuple(offsets.tolist()))


class _GroupedMM(torch.autograd.Function):
    """Every product is written straight into its slice of the result: no copies, no per-group gradients to stack."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, w_EXD: Tensor, bounds: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows_RD, w_EXD)
        ctx.bounds = bounds
        out_RX = rows_RD.new_empty(rows_RD.shape[0], w_EXD.shape[1])
        for e, begin, end in _groups(bounds):
            torch.mm(rows_RD[begin:end], w_EXD[e].t(), out=out_RX[begin:end])
        out_RX[bounds[-1] :].zero_()
        return out_RX

    @staticmethod
    def backward(ctx: Any, grad_RX: Tensor):  # type: ignore[override]
        rows_RD, w_EXD = ctx.saved_tensors
        bounds: tuple[int, ...] = ctx.bounds
        grad_rows = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(rows_RD)
            for e, begin, end in _groups(bounds):
                torch.mm(grad_RX[begin:end], w_EXD[e], out=grad_rows[begin:end])
            grad_rows[bounds[-1] :].zero_()
        if ctx.needs_input_grad[1]:
            grad_w = torch.empty_like(w_EXD)
            for e in range(w_EXD.shape[0]):
                begin, end = bounds[e], bounds[e + 1]
                if begin == end:
                    grad_w[e].zero_()
                else:
                    torch.mm(grad_RX[begin:end].t(), rows_RD[begin:end], out=grad_w[e])
        return grad_rows, grad_w, None


def _groups(bounds: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(group, begin, end) of the groups that are not empty."""
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]
