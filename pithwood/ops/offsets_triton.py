"""What kernels share to find their place in a packing: offsets counted on the device, and the search for a document.

Legend: N documents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.packing import Packing

OFFSETS_CHUNK = 1024
"""Documents whose block counts one program adds up at a time."""


def block_offsets(cu_N: Tensor, block_size: int) -> Tensor:
    """[N + 1] int32: `Packing.unit_offsets` of the offsets cu_N, in one launch.

    One program walks over the documents; with some ten thousand of them that still takes microseconds.
    """
    num_docs = cu_N.shape[0] - 1
    offsets_N = torch.empty(num_docs + 1, dtype=torch.int32, device=cu_N.device)
    _block_offsets[(1,)](cu_N, offsets_N, num_docs, block_size, CHUNK=OFFSETS_CHUNK, num_warps=4)
    return offsets_N


def key_block_offsets(packing: Packing, block_size: int) -> Tensor | None:
    """`block_offsets` of the packing's keys, made once for all layers; None to a compiler, whose graph holds operators
    alone: they count for themselves."""
    if torch.compiler.is_compiling():
        return None
    return packing.remember(("block_offsets", block_size), lambda: block_offsets(packing.cu_k, block_size))


@triton.jit
def _block_offsets(cu_ptr, out_ptr, num_docs, block_size, CHUNK: tl.constexpr):
    total = 0
    tl.store(out_ptr, total)
    for first in range(0, num_docs, CHUNK):
        doc = first + tl.arange(0, CHUNK)
        real = doc < num_docs
        length = tl.load(cu_ptr + doc + 1, mask=real, other=0) - tl.load(cu_ptr + doc, mask=real, other=0)
        count = (length + block_size - 1) // block_size
        tl.store(out_ptr + doc + 1, total + tl.cumsum(count, 0), mask=real)
        total += tl.sum(count, 0)


@triton.jit
def doc_of_row(offsets_ptr, num_docs, row):
    """The last document n with offsets[n] <= row, by bisection; offsets ascend from 0."""
    low = 0
    high = num_docs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(offsets_ptr + middle) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def doc_of_tile(cu_ptr, num_docs, tile, TILE: tl.constexpr):
    """The document that owns a tile of TILE rows, in a numbering that needs no table.

    Document n owns the tiles from cu[n] // TILE + n on. That leaves at least ceil(length / TILE) of them before those
    of document n + 1, and cu[-1] // TILE + N in all; the last ones of a document may lie beyond its end.
    """
    low = 0
    high = num_docs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(cu_ptr + middle) // TILE + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


def num_tiles(num_rows: int, num_docs: int, tile: int) -> int:
    """Tiles that `doc_of_tile` numbers."""
    return num_rows // tile + num_docs if num_docs else 0
