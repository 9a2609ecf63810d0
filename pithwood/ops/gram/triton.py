"""Symmetric products on a GPU: only tiles that touch the lower triangle are computed, and each is written twice.

A program walks over the tiles of all matrices, matrix by matrix, so that the programs which run together read the same
few matrices from the L2 cache. Tiles come and go through TMA descriptors, which read zeros beyond an edge and write
nothing there; sums are fp32.

Legend: M matrices, R rows, C columns, K min(R, C).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiling(NamedTuple):
    """How a kernel cuts its result, and what it keeps in flight."""

    rows: int
    cols: int
    """Tile of the result that a program computes at a time: as wide as high, or twice that."""
    depth: int
    """Elements of the contracted side per load; 64 of bf16 are 128 bytes, the widest swizzle of shared memory."""
    warps: int
    stages: int
    programs_per_sm: int
    """More than fit at once let the hardware even out what the tiles of a program take."""
    flatten: bool
    """Whether loads of a program's next tile start while this one is written; takes registers and shared memory."""


# Measured on an H100: a long contraction wants its loads far ahead, a short one a second program on the SM that
# multiplies while the first writes.
GRAM = Tiling(128, 128, 64, warps=8, stages=5, programs_per_sm=1, flatten=False)
POLYNOMIAL = Tiling(128, 128, 64, warps=4, stages=2, programs_per_sm=8, flatten=False)


def gram_misfit(x_MRC: Tensor) -> str | None:
    """Why the kernels cannot take this stack, or None if they can: TMA wants rows that start at multiples of 16 bytes,
    and a Hopper GPU."""
    if not x_MRC.is_contiguous():
        return "kernels take contiguous stacks"
    row_bytes = [side * x_MRC.element_size() for side in (x_MRC.shape[2], min(x_MRC.shape[1:]))]
    if x_MRC.numel() == 0 or any(size % 16 for size in row_bytes) or x_MRC.data_ptr() % 16:
        return "rows of matrices and of results must be multiples of 16 bytes, and start at one"
    if x_MRC.is_cuda and x_MRC.dtype == torch.float32:
        return "on a GPU kernels take fp16 and bf16, fp32 is for the interpreter"
    if x_MRC.is_cuda and torch.cuda.get_device_capability(x_MRC.device) < (9, 0):
        return "kernels need a GPU of compute capability 9.0 or later"
    return None


def gram_triton(x_MRC: Tensor, scale_M: Tensor | None, out_MKK: Tensor) -> Tensor:
    """As gram_ref, written to `out_MKK`; the scale is applied to the fp32 sums."""
    _launch(x_MRC, out_MKK, scale_M, 0.0, 0.0, 1.0, square=False)
    return out_MKK


def gram_polynomial_triton(
    g_MKK: Tensor, a: float, b: float, c: float, scale_M: Tensor | None, out_MKK: Tensor
) -> Tensor:
    """As gram_polynomial_ref, written to `out_MKK`; everything is added up in fp32 and rounded once."""
    _launch(g_MKK, out_MKK, scale_M, a, b, c, square=True)
    return out_MKK


def tile_count(size: int, tiling: Tiling) -> int:
    """Tiles of a [size, size] result that touch its lower triangle."""
    ratio = tiling.cols // tiling.rows
    return sum(row // ratio + 1 for row in range(triton.cdiv(size, tiling.rows)))


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    x_MRC: Tensor, out_MKK: Tensor, scale_M: Tensor | None, a: float, b: float, c: float, *, square: bool
) -> None:
    tiling = POLYNOMIAL if square else GRAM
    num, rows, cols = x_MRC.shape
    tall = rows > cols
    size, depth = (cols, rows) if tall else (rows, cols)
    tiles = tile_count(size, tiling)
    # The interpreter takes programs one after the other: a few of them show the walk over tiles.
    programs = min(num * tiles, tiling.programs_per_sm * _sm_count(x_MRC.device) if x_MRC.is_cuda else 5)
    row_side, col_side = (
        [1, tiling.depth, side] if tall else [1, side, tiling.depth] for side in (tiling.rows, tiling.cols)
    )
    _symmetric_product[(programs,)](
        TensorDescriptor.from_tensor(x_MRC, row_side),
        TensorDescriptor.from_tensor(x_MRC, col_side),
        TensorDescriptor.from_tensor(x_MRC, [1, tiling.rows, tiling.cols]) if square else None,
        TensorDescriptor.from_tensor(out_MKK, [1, tiling.rows, tiling.rows]),
        # always a pointer to fp32, so that there is one variant with and without
        out_MKK.view(-1)[:0].float() if scale_M is None else scale_M.float(),
        int(scale_M is not None),
        num * tiles,
        tiles,
        size,
        depth,
        programs,
        a,
        b,
        c,
        TALL=tall,
        SQUARE=square,
        ROWS=tiling.rows,
        COLS=tiling.cols,
        DEPTH=tiling.depth,
        FLATTEN=tiling.flatten,
        PRECISION="ieee" if x_MRC.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


# Few variants to compile: what differs from call to call is no constant.
@triton.jit(do_not_specialize=["has_scale", "total", "tiles", "size", "programs"])
def _symmetric_product(
    row_desc,
    col_desc,
    own_desc,
    out_desc,
    scale_ptr,
    has_scale,
    total,
    tiles,
    size,
    depth,
    programs,
    a,
    b,
    c,
    TALL: tl.constexpr,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for number in tl.range(tl.program_id(0), total, programs, flatten=FLATTEN):
        matrix = number // tiles
        row0, col0 = _tile_origin(number % tiles, ROWS, COLS)
        # Sums begin with b G + a I over c, which takes fewer registers than to add it at the end; but flattened loops
        # keep loads in flight only where sums begin with nothing.
        if FLATTEN:
            acc = tl.zeros([ROWS, COLS], tl.float32)
        elif SQUARE:
            acc = _own(own_desc, matrix, row0, col0, a / c, b / c, ROWS, COLS)
        else:
            acc = tl.zeros([ROWS, COLS], tl.float32)
        for k in range(0, depth, DEPTH):
            if TALL:
                left = row_desc.load([matrix, k, row0]).reshape(DEPTH, ROWS)
                right = col_desc.load([matrix, k, col0]).reshape(DEPTH, COLS)
                acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
            else:
                left = row_desc.load([matrix, row0, k]).reshape(ROWS, DEPTH)
                right = col_desc.load([matrix, col0, k]).reshape(COLS, DEPTH)
                acc = tl.dot(left, right.T, acc, input_precision=PRECISION)

        scale = tl.load(scale_ptr + matrix, mask=has_scale != 0, other=1.0)
        if SQUARE:
            if FLATTEN:
                acc += _own(own_desc, matrix, row0, col0, a / c, b / c, ROWS, COLS)
            acc *= scale * c
        else:
            acc *= scale * scale
        # Tiles on the diagonal hold both of an element's places: their mirror images go beyond the edge, where nothing
        # is written. A branch would keep the loops from being flattened.
        mirror_row = tl.where(col0 + COLS <= row0, col0, size)
        if COLS == ROWS:
            tile = acc.to(out_desc.dtype)
            out_desc.store([matrix, row0, col0], tile.reshape(1, ROWS, ROWS))
            out_desc.store([matrix, mirror_row, row0], tile.T.reshape(1, ROWS, ROWS))
        else:
            # by halves, whose way to memory takes half of the shared memory
            west, east = tl.split(acc.reshape(ROWS, 2, ROWS).permute(0, 2, 1))
            west, east = west.to(out_desc.dtype), east.to(out_desc.dtype)
            out_desc.store([matrix, row0, col0], west.reshape(1, ROWS, ROWS))
            out_desc.store([matrix, row0, col0 + ROWS], east.reshape(1, ROWS, ROWS))
            out_desc.store([matrix, mirror_row, row0], west.T.reshape(1, ROWS, ROWS))
            out_desc.store([matrix, mirror_row + ROWS, row0], east.T.reshape(1, ROWS, ROWS))


@triton.jit
def _own(desc, matrix, row0, col0, a, b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """b G + a I on a tile: [ROWS, COLS] fp32."""
    own = desc.load([matrix, row0, col0]).reshape(ROWS, COLS)
    row = row0 + tl.arange(0, ROWS)[:, None]
    col = col0 + tl.arange(0, COLS)[None, :]
    return b * own.to(tl.float32) + tl.where(row == col, a, 0.0)


@triton.jit
def _tile_origin(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of a tile of the lower triangle. Bands of COLS / ROWS tile rows have equally many tiles."""
    RATIO: tl.constexpr = COLS // ROWS
    step = tile // RATIO
    # the largest band with band (band + 1) / 2 <= step; the root is off by one at most
    band = ((tl.sqrt((8 * step + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    band = tl.where(band * (band + 1) // 2 > step, band - 1, band)
    band = tl.where((band + 1) * (band + 2) // 2 <= step, band + 1, band)
    left = tile - RATIO * (band * (band + 1) // 2)
    return (RATIO * band + left // (band + 1)) * ROWS, (left % (band + 1)) * COLS
