"""The weights' gradient for Hopper with its warps divided: one loads, the others multiply and add to memory.

It does the work of `_grouped_grad_weight_bulk` in `weight_triton`, which see for the products and the copy engine's
part. As many programs as the GPU has processors take tiles in turn. The loading warp runs ahead, over the ends of tiles
and groups, so that the products of the next tile begin the moment the last one's sums are on their way to memory. The
two sides meet at mbarriers only.

Legend: R rows, X output width, D input width, E groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ENDLESS = gl.constexpr(2**30)
"""Rows that a descriptor pretends to have behind a group's last one, see `ragged_rows`."""
LOADING_REGISTERS = 24
MAX_REGISTERS = 168
"""Registers of a thread at launch; the loading warps give theirs back to the multiplying ones."""


def ragged_rows(rows_RD: Tensor, chunk: int, columns: int) -> TensorDescriptor:
    """A descriptor of chunks [chunk, columns] that ends at a row of the caller's choice.

    As `triton.tools.ragged_tma.create_ragged_descriptor`: coordinates (2**30, end, 2**30 - size + row, column) name row
    `row` of the `size` rows before row `end`, whose address comes out by 64-bit wraparound, and what lies behind `end`
    lies beyond the third axis, where the copy engine puts zeros.
    """
    stride = rows_RD.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, 2**30, rows_RD.shape[1]]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[rows_RD.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, chunk, columns], dtype)
    return TensorDescriptor(rows_RD, shape, [2**34 - stride, stride, stride, 1], [1, 1, chunk, columns], layout)


def launch_hopper(
    grad_RX: Tensor, rows_RD: Tensor, offsets: Tensor, out_EXD: Tensor, add: bool, tiling: Any, panel: int
) -> None:
    """As `weight_triton.launch`, for contiguous rows that the copy engine takes."""
    num_groups, width_x, width_d = out_EXD.shape
    tiles = num_groups * triton.cdiv(width_x, tiling.rows_x) * triton.cdiv(width_d, tiling.columns_d)
    processors = torch.cuda.get_device_properties(rows_RD.device).multi_processor_count
    _grouped_grad_weight_hopper[(min(tiles, processors),)](
        ragged_rows(grad_RX, tiling.chunk, tiling.rows_x),
        ragged_rows(rows_RD, tiling.chunk, tiling.columns_d),
        offsets, out_EXD, num_groups, width_x, width_d,
        ADD=add, ROWS_X=tiling.rows_x, COLUMNS_D=tiling.columns_d, CHUNK=tiling.chunk, STAGES=tiling.stages,
        PANEL=panel, LOADING_REGISTERS=LOADING_REGISTERS, num_warps=tiling.warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _tile(
    work, offsets_ptr, width_x, width_d, ROWS_X: gl.constexpr, COLUMNS_D: gl.constexpr, PANEL: gl.constexpr
):  # fmt: skip
    """(group, row behind its last, its number of rows, first row and first column of the tile) of piece `work`."""
    tiles_x = (width_x + ROWS_X - 1) // ROWS_X
    tiles_d = (width_d + COLUMNS_D - 1) // COLUMNS_D
    group = work // (tiles_x * tiles_d)
    tile = work % (tiles_x * tiles_d)
    panel_x = tile // (PANEL * tiles_d) * PANEL
    height = gl.minimum(tiles_x - panel_x, PANEL)
    inside = tile % (PANEL * tiles_d)
    begin = gl.load(offsets_ptr + group)
    end = gl.load(offsets_ptr + group + 1)
    return group, end, end - begin, (panel_x + inside % height) * ROWS_X, inside // height * COLUMNS_D


@gluon.jit
def _load(
    grad_desc, rows_desc, grad_ring, rows_ring, full, empty, offsets_ptr, num_groups, width_x, width_d,
    ROWS_X: gl.constexpr, COLUMNS_D: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, PANEL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = CHUNK * (ROWS_X + COLUMNS_D) * 2
    per_group = ((width_x + ROWS_X - 1) // ROWS_X) * ((width_d + COLUMNS_D - 1) // COLUMNS_D)
    step = 0
    for work in range(gl.program_id(0), num_groups * per_group, gl.num_programs(0)):
        _, end, size, x0, d0 = _tile(work, offsets_ptr, width_x, width_d, ROWS_X, COLUMNS_D, PANEL)
        for first in range(0, size, CHUNK):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            row = ENDLESS - size + first
            tma.async_copy_global_to_shared(grad_desc, [ENDLESS, end, row, x0], full.index(slot), grad_ring.index(slot))
            tma.async_copy_global_to_shared(rows_desc, [ENDLESS, end, row, d0], full.index(slot), rows_ring.index(slot))
            step += 1


@gluon.jit
def _multiply(
    grad_ring, rows_ring, full, empty, offsets_ptr, out_ptr, num_groups, width_x, width_d,
    ADD: gl.constexpr, ROWS_X: gl.constexpr, COLUMNS_D: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
    PANEL: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    per_group = ((width_x + ROWS_X - 1) // ROWS_X) * ((width_d + COLUMNS_D - 1) // COLUMNS_D)
    step = 0
    for work in range(gl.program_id(0), num_groups * per_group, gl.num_programs(0)):
        group, _, size, x0, d0 = _tile(work, offsets_ptr, width_x, width_d, ROWS_X, COLUMNS_D, PANEL)
        total = gl.zeros([ROWS_X, COLUMNS_D], gl.float32, ACC)
        for first in range(0, size, CHUNK):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            total = warpgroup_mma(grad_ring.index(slot).permute((1, 0)), rows_ring.index(slot), total, is_async=True)
            # One product stays in flight; the one before is done, and its tiles may be loaded over.
            total = warpgroup_mma_wait(1, deps=(total,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=first > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=size > 0)
        x = x0 + gl.arange(0, ROWS_X, layout=gl.SliceLayout(1, ACC))
        d = d0 + gl.arange(0, COLUMNS_D, layout=gl.SliceLayout(0, ACC))
        at_row = (group.to(gl.int64) * width_x + x.to(gl.int64)) * width_d
        to = out_ptr + (gl.expand_dims(at_row, 1) + gl.expand_dims(d, 0))
        real = gl.expand_dims(x < width_x, 1) & gl.expand_dims(d < width_d, 0)
        if ADD:
            gl.atomic_add(to, total, mask=real, sem="relaxed")
        else:
            gl.store(to, total, mask=real)


@gluon.jit
def _grouped_grad_weight_hopper(
    grad_desc, rows_desc, offsets_ptr, out_ptr, num_groups, width_x, width_d,
    ADD: gl.constexpr, ROWS_X: gl.constexpr, COLUMNS_D: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
    PANEL: gl.constexpr, LOADING_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles of all groups' gradients in turn; accumulators fp32, out fp32."""
    dtype: gl.constexpr = grad_desc.dtype
    G_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, ROWS_X], dtype)
    R_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, COLUMNS_D], dtype)
    grad_ring = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, ROWS_X], G_TILE)
    rows_ring = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, COLUMNS_D], R_TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS_D, 16])
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    grad_ring, rows_ring, full, empty, offsets_ptr, out_ptr, num_groups, width_x, width_d,
                    ADD, ROWS_X, COLUMNS_D, CHUNK, STAGES, PANEL, ACC,
                ),
            ),
            (
                _load,
                (
                    grad_desc, rows_desc, grad_ring, rows_ring, full, empty, offsets_ptr, num_groups, width_x, width_d,
                    ROWS_X, COLUMNS_D, CHUNK, STAGES, PANEL,
                ),
            ),
        ],
        [1],
        [LOADING_REGISTERS],
    )  # fmt: skip
