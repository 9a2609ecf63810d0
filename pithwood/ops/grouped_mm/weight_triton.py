"""The weights' gradient of grouped products on a GPU, added in fp32 straight into the buffer that holds the sum.

A program owns a tile of ROWS_X x COLUMNS_D elements of one group's gradient and walks over the group's rows, CHUNK at a
time: dW[e] = G_e^T X_e. Both tiles of a chunk are loaded as they lie in memory; the tensor cores read G's transposed
from shared memory. The last chunk is masked, so groups of any size cost their rows alone and what stands behind the
last group is not looked at. Against a product in bf16 this saves writing and reading that product and the addition's
own pass over the fp32 sum.

Legend: R rows, X output width, D input width, E groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How a launch cuts its work."""

    rows_x: int
    columns_d: int
    chunk: int
    warps: int
    stages: int


TILING = Tiling(128, 256, 64, 8, 3)
"""For bf16 and fp16; fp32 takes tiles that a CUDA core's registers hold."""
TILING_FP32 = Tiling(64, 64, 32, 4, 2)
PANEL = 8
"""Tiles of X that share their tiles of D in the cache while programs walk through a group."""


@torch.library.custom_op("pithwood::grouped_grad_weight", mutates_args={"out_EXD"})
def grouped_grad_weight(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool) -> None:
    """out[e] (+)= grad[group e]^T @ rows[group e]; out contiguous, fp32 or in the rows' dtype."""
    launch(grad_RX, rows_RD, offsets, out_EXD, add, TILING_FP32 if rows_RD.dtype == torch.float32 else TILING)


@grouped_grad_weight.register_fake
def _(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool) -> None:
    return None


def launch(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool, tiling: Tiling) -> None:
    """The kernel with a tiling of the caller's choice."""
    num_groups, width_x, width_d = out_EXD.shape
    if out_EXD.numel() == 0:
        return
    grad_RX, rows_RD = grad_RX.contiguous(), rows_RD.contiguous()
    tiles = triton.cdiv(width_x, tiling.rows_x) * triton.cdiv(width_d, tiling.columns_d)
    _grad_weight[(num_groups * tiles,)](
        grad_RX, rows_RD, offsets, out_EXD, width_x, width_d,
        ADD=add, ROWS_X=tiling.rows_x, COLUMNS_D=tiling.columns_d, CHUNK=tiling.chunk, PANEL=PANEL,
        PRECISION="ieee", num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


@triton.jit
def _grad_weight(
    grad_ptr, rows_ptr, offsets_ptr, out_ptr, width_x, width_d,
    ADD: tl.constexpr, ROWS_X: tl.constexpr, COLUMNS_D: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one group's gradient; fp32 accumulator."""
    tiles_x = tl.cdiv(width_x, ROWS_X)
    tiles_d = tl.cdiv(width_d, COLUMNS_D)
    group = tl.program_id(0) // (tiles_x * tiles_d)
    tile = tl.program_id(0) % (tiles_x * tiles_d)
    # Neighbouring programs walk down a panel of PANEL tiles of X before they go to the next tile of D.
    panel_x = tile // (PANEL * tiles_d) * PANEL
    height = tl.minimum(tiles_x - panel_x, PANEL)
    inside = tile % (PANEL * tiles_d)
    x = (panel_x + inside % height) * ROWS_X + tl.arange(0, ROWS_X)
    d = inside // height * COLUMNS_D + tl.arange(0, COLUMNS_D)

    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    if ADD:  # noqa: SIM102  (a constant and a value in one condition become a run-time branch)
        if begin == end:
            return
    # Columns beyond the widths are wrapped: they are computed from real columns and not stored.
    row = tl.arange(0, CHUNK)
    grad_at = grad_ptr + (begin + row).to(tl.int64)[:, None] * width_x + (x % width_x)[None, :]
    rows_at = rows_ptr + (begin + row).to(tl.int64)[:, None] * width_d + (d % width_d)[None, :]
    total = tl.zeros([ROWS_X, COLUMNS_D], tl.float32)
    for first in range(begin, end, CHUNK):
        real = (first + row < end)[:, None]
        grad = tl.load(grad_at, mask=real, other=0.0)  # [CHUNK, ROWS_X]
        rows = tl.load(rows_at, mask=real, other=0.0)  # [CHUNK, COLUMNS_D]
        total = tl.dot(tl.trans(grad), rows, total, input_precision=PRECISION)
        grad_at += CHUNK * width_x
        rows_at += CHUNK * width_d
    to = out_ptr + (group.to(tl.int64) * width_x + x.to(tl.int64)[:, None]) * width_d + d[None, :]
    real = (x < width_x)[:, None] & (d < width_d)[None, :]
    if ADD:
        # Each element belongs to one program: the atomic addition reads nothing back, and its result is the sum's.
        tl.atomic_add(to, total.to(out_ptr.dtype.element_ty), mask=real, sem="relaxed")
    else:
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=real)
