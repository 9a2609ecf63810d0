"""The weights' gradient of grouped products on a GPU, added in fp32 straight into the buffer that holds the sum.

A program owns a tile of ROWS_X x COLUMNS_D elements of one group's gradient and walks over the group's rows, CHUNK at a
time: dW[e] = G_e^T X_e. Both tiles of a chunk are loaded as they lie in memory; the tensor cores read G's transposed
from shared memory. Of the last chunk only the group's own rows count, so groups of any size cost their rows alone and
what stands behind the last group is not looked at. On a Hopper GPU its copy engine loads the tiles; told where a group
ends, it puts zeros behind it (`triton.tools.ragged_tma`). Against a product in bf16 all this saves writing and reading
that product and the addition's own pass over the fp32 sum.

Legend: R rows, X output width, D input width, E groups.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

from pithwood.ops.operator import operator


class Tiling(NamedTuple):
    """How a launch cuts its work."""

    rows_x: int
    columns_d: int
    chunk: int
    warps: int
    stages: int
    way: Literal["plain", "bulk"]
    """How tiles are loaded. plain: by every thread. bulk: by the copy engine (TMA), groups' ends included; widths are
    multiples of 8 then."""


BULK = Tiling(128, 256, 64, 8, 3, "bulk")
"""For fp16 and bf16 on a Hopper GPU."""
PLAIN = Tiling(128, 256, 64, 8, 3, "plain")
"""For fp16 and bf16 elsewhere and for odd widths."""
PLAIN_FP32 = Tiling(64, 64, 32, 4, 2, "plain")
"""For fp32: tiles that the registers of CUDA cores hold."""
PANEL = 8
"""Tiles of X that share their tiles of D in the cache while programs walk through a group."""


@operator("grouped_grad_weight", mutates=("out_EXD",))
def grouped_grad_weight(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool) -> None:
    """out[e] (+)= grad[group e]^T @ rows[group e]; out contiguous, fp32 or in the rows' dtype."""
    launch(grad_RX, rows_RD, offsets, out_EXD, add, choose_tiling(grad_RX, rows_RD))


@grouped_grad_weight.register_fake
def _(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool) -> None:
    return None


def choose_tiling(grad_RX: Tensor, rows_RD: Tensor) -> Tiling:
    if rows_RD.dtype == torch.float32:
        return PLAIN_FP32
    return BULK if rows_RD.is_cuda and bulk_fits(grad_RX, rows_RD) else PLAIN


def bulk_fits(grad_RX: Tensor, rows_RD: Tensor) -> bool:
    """Whether there is a copy engine that takes these rows: they begin at multiples of 16 bytes and are few enough."""
    aligned = all(x.shape[1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in (grad_RX, rows_RD))
    hopper = not rows_RD.is_cuda or torch.cuda.get_device_capability(rows_RD.device) >= (9, 0)
    return aligned and hopper and 0 < rows_RD.shape[0] <= 2**30


def launch(grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool, tiling: Tiling) -> None:
    """The kernels with a tiling of the caller's choice."""
    num_groups, width_x, width_d = out_EXD.shape
    if out_EXD.numel() == 0:
        return
    grad_RX, rows_RD = grad_RX.contiguous(), rows_RD.contiguous()
    tiles = triton.cdiv(width_x, tiling.rows_x) * triton.cdiv(width_d, tiling.columns_d)
    sizes = {"ADD": add, "ROWS_X": tiling.rows_x, "COLUMNS_D": tiling.columns_d, "CHUNK": tiling.chunk, "PANEL": PANEL}
    grid, options = (num_groups * tiles,), {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if tiling.way == "bulk":
        grad = create_ragged_descriptor(grad_RX, [tiling.chunk, tiling.rows_x])
        rows = create_ragged_descriptor(rows_RD, [tiling.chunk, tiling.columns_d])
        _grouped_grad_weight_bulk[grid](grad, rows, offsets, out_EXD, width_x, width_d, **sizes, **options)
    else:
        _grouped_grad_weight[grid](
            grad_RX, rows_RD, offsets, out_EXD, width_x, width_d, **sizes, PRECISION="ieee", **options
        )


@triton.jit
def _own_tile(
    offsets_ptr, width_x, width_d, ROWS_X: tl.constexpr, COLUMNS_D: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """(group, its first row, its number of rows, first row and first column of this program's tile)."""
    tiles_x = tl.cdiv(width_x, ROWS_X)
    tiles_d = tl.cdiv(width_d, COLUMNS_D)
    group = tl.program_id(0) // (tiles_x * tiles_d)
    tile = tl.program_id(0) % (tiles_x * tiles_d)
    # Neighbouring programs walk down a panel of PANEL tiles of X before they go to the next tile of D.
    panel_x = tile // (PANEL * tiles_d) * PANEL
    height = tl.minimum(tiles_x - panel_x, PANEL)
    inside = tile % (PANEL * tiles_d)
    begin = tl.load(offsets_ptr + group)
    size = tl.load(offsets_ptr + group + 1) - begin
    return group, begin, size, (panel_x + inside % height) * ROWS_X, inside // height * COLUMNS_D


@triton.jit
def _put(total, out_ptr, group, x, d, width_x, width_d, ADD: tl.constexpr):
    to = out_ptr + (group.to(tl.int64) * width_x + x.to(tl.int64)[:, None]) * width_d + d[None, :]
    real = (x < width_x)[:, None] & (d < width_d)[None, :]
    if ADD:
        # Each element belongs to one program: the atomic addition reads nothing back, and its result is the sum's.
        tl.atomic_add(to, total.to(out_ptr.dtype.element_ty), mask=real, sem="relaxed")
    else:
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _grouped_grad_weight_bulk(
    grad_desc, rows_desc, offsets_ptr, out_ptr, width_x, width_d,
    ADD: tl.constexpr, ROWS_X: tl.constexpr, COLUMNS_D: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """One tile of one group's gradient; fp32 accumulator. The copy engine fills in zeros behind the group's last row
    and beyond the widths.
    """
    group, begin, size, x0, d0 = _own_tile(offsets_ptr, width_x, width_d, ROWS_X, COLUMNS_D, PANEL)
    if ADD:  # noqa: SIM102  (a constant and a value in one condition become a run-time branch)
        if size == 0:
            return
    total = tl.zeros([ROWS_X, COLUMNS_D], tl.float32)
    for first in range(0, size, CHUNK):
        grad = load_ragged(grad_desc, begin, size, [first, x0])  # [CHUNK, ROWS_X]
        rows = load_ragged(rows_desc, begin, size, [first, d0])  # [CHUNK, COLUMNS_D]
        total = tl.dot(tl.trans(grad), rows, total)
    x = x0 + tl.arange(0, ROWS_X)
    d = d0 + tl.arange(0, COLUMNS_D)
    _put(total, out_ptr, group, x, d, width_x, width_d, ADD)


@triton.jit
def _grouped_grad_weight(
    grad_ptr, rows_ptr, offsets_ptr, out_ptr, width_x, width_d,
    ADD: tl.constexpr, ROWS_X: tl.constexpr, COLUMNS_D: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one group's gradient; fp32 accumulator. The last chunk of rows is masked."""
    group, begin, size, x0, d0 = _own_tile(offsets_ptr, width_x, width_d, ROWS_X, COLUMNS_D, PANEL)
    if ADD:  # noqa: SIM102  (a constant and a value in one condition become a run-time branch)
        if size == 0:
            return
    x = x0 + tl.arange(0, ROWS_X)
    d = d0 + tl.arange(0, COLUMNS_D)
    # Columns beyond the widths are wrapped: they are computed from real columns and not stored.
    row = tl.arange(0, CHUNK)
    grad_at = grad_ptr + (begin + row).to(tl.int64)[:, None] * width_x + (x % width_x)[None, :]
    rows_at = rows_ptr + (begin + row).to(tl.int64)[:, None] * width_d + (d % width_d)[None, :]
    total = tl.zeros([ROWS_X, COLUMNS_D], tl.float32)
    for first in range(0, size, CHUNK):
        real = (first + row < size)[:, None]
        grad = tl.load(grad_at, mask=real, other=0.0)  # [CHUNK, ROWS_X]
        rows = tl.load(rows_at, mask=real, other=0.0)  # [CHUNK, COLUMNS_D]
        total = tl.dot(tl.trans(grad), rows, total, input_precision=PRECISION)
        grad_at += CHUNK * width_x
        rows_at += CHUNK * width_d
    _put(total, out_ptr, group, x, d, width_x, width_d, ADD)
