"""Tile shapes and launch options of the Triton kernels of `attend`, by block size, head dim, dtype and GPU.

What a kernel keeps at hand, and the copies under way, must fit the shared memory that the GPU gives a program: 227 KB
on an H100, 163 KB on an A100, 99 KB on GPUs for desktops. `python -m bench.kernels compile --gpu` shows what fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

LARGE_SHARED = 200 * 2**10
"""Bytes of shared memory per program from which a GPU takes the larger tiles: those of Hopper, which they were measured
on. On an A100, which could hold some of them, registers for 128 keys of 128 dims would spill by kilobytes."""


@dataclass(frozen=True)
class Tiles:
    """Tile shape and launch options of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


Choose = Callable[[int, int, int, bool], Tiles]
"""(block size, head dim, bytes of an element, whether the GPU has LARGE_SHARED) -> tiles."""


def has_large_shared(x: Tensor) -> bool:
    """Whether the larger tiles fit the GPU of a tensor; on a CPU the interpreter takes them."""
    if not x.is_cuda:
        return True
    properties: Any = torch.cuda.get_device_properties(x.device)
    return properties.shared_memory_per_block_optin >= LARGE_SHARED


def forward_tiles(block: int, dim: int, element_size: int, large: bool) -> Tiles:
    """Of the key-major forward kernel: rows are gathered queries."""
    keys = tile(block, 128 if dim <= 128 else 64)
    if element_size == 4:
        return Tiles(32, min(keys, 32), 4, 1)
    if not large:
        return Tiles(64, min(keys, 64), 4, 2) if dim <= 128 else Tiles(32, min(keys, 32), 4, 1)
    if block <= keys:
        return Tiles(64, keys, 4, 3)
    return Tiles(128, keys if dim <= 128 else 32, 8, 3)


def own_tiles(block: int, dim: int, element_size: int, large: bool) -> Tiles:
    """Of the kernel that attends to the own unit and merges."""
    if element_size == 4:
        return Tiles(tile(block, 32), tile(block, 32), 4, 1)
    most = 64 if large or dim <= 128 else 32
    return Tiles(tile(block, most), tile(block, most), 4, 3)


def early_tiles(block: int, dim: int, element_size: int, large: bool) -> Tiles:
    """Of the forward kernel for early queries."""
    if element_size == 4:
        return Tiles(tile(block, 32), tile(block, 32), 4, 1)
    if dim > 128:
        most = 64 if large else 32
        return Tiles(tile(block, most), tile(block, most), 4, 2 if large else 1)
    most = 128 if large or dim <= 64 else 64
    rows = tile(block, most)
    return Tiles(rows, tile(block, most), 8 if rows == 128 else 4, 2)


def backward_tiles(block: int, dim: int, element_size: int, large: bool) -> Tiles:
    """Of the key-major backward kernel: keys stay, rows are gathered."""
    if element_size == 4:
        return Tiles(16, tile(block, 16), 4, 1)
    if dim > 128:
        return Tiles(32, tile(block, 64), 8, 1) if large else Tiles(16, tile(block, 32), 4, 1)
    if not large:
        return Tiles(64, tile(block, 64), 8, 1)
    return Tiles(64, tile(block, 128), 8, 2 if dim <= 64 else 1)


def dq_tiles(block: int, dim: int, element_size: int, large: bool) -> Tiles:
    """Of the deterministic dQ kernels."""
    if element_size == 4:
        return Tiles(tile(block, 16), tile(block, 16), 4, 1)
    most = 64 if large or dim <= 128 else 32
    return Tiles(tile(block, most), tile(block, most), 4, 1)


def tile(block: int, most: int) -> int:
    """Rows or keys of a tile: the block's, to a power of two, but at most `most`."""
    return max(16, min(most, triton.next_power_of_2(block)))
