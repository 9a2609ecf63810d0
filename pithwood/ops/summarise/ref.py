"""Block summaries, one block at a time: the definition.

Legend: T packed tokens, U units (blocks), G KV heads, K head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing


def summarise_ref(k_TGK: Tensor, packing: Packing, block_size: int) -> Tensor:
    """Mean key of each block, [U, G, K] fp32 (fp64 for fp64 keys); rows beyond the last block are zero."""
    dtype = compute_dtype(k_TGK.dtype)
    num_units = packing.num_units_bound(k_TGK.shape[0], block_size)
    s_UGK = torch.zeros(num_units, *k_TGK.shape[1:], dtype=dtype, device=k_TGK.device)
    cu_k = packing.cu_k.tolist()
    unit = 0
    for begin, end in pairwise(cu_k):
        for start in range(begin, end, block_size):
            s_UGK[unit] = k_TGK[start : min(start + block_size, end)].to(dtype).mean(0)
            unit += 1
    return s_UGK
