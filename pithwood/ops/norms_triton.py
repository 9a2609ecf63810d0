"""2-norms of large tensors at the speed of memory: a fixed number of programs strides over each tensor, and their
shares are added up in one more launch for all tensors, in the same order every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056
"""Programs per tensor: eight for each of a Hopper GPU's 132 SMs."""
BLOCK, WARPS = 8192, 8
"""Elements of a load, 32 of them a thread: enough bytes in flight for HBM3e."""


def large_norms(tensors: list[Tensor]) -> Tensor:
    """[len(tensors)] fp32 norms of contiguous tensors on one device."""
    partial = torch.empty(len(tensors), PROGRAMS, dtype=torch.float32, device=tensors[0].device)
    for tensor, row in zip(tensors, partial, strict=True):
        _square_sums[(PROGRAMS,)](tensor, row, tensor.numel(), PROGRAMS=PROGRAMS, BLOCK=BLOCK, num_warps=WARPS)
    return partial.sum(1).sqrt_()


@triton.jit
def _square_sums(x_ptr, partial_ptr, size, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, PROGRAMS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))
