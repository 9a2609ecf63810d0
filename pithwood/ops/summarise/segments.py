"""Block summaries as one segmented mean over the packed keys; nothing is padded and nothing is read on the host.

Legend: T packed tokens, U units (blocks), G KV heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing
from pithwood.ops.units import unit_table


def summarise_segments(k_TGK: Tensor, packing: Packing, block_size: int) -> Tensor:
    """As summarise_ref. Each block is summed in key order, so its digits do not depend on what it is packed with."""
    num_keys, num_kv_heads, dim = k_TGK.shape
    dtype = compute_dtype(k_TGK.dtype)
    num_units = packing.num_units_bound(num_keys, block_size)
    if num_units == 0:
        return torch.zeros(0, num_kv_heads, dim, dtype=dtype, device=k_TGK.device)
    start_U = unit_table(packing, block_size, num_keys, num_units).start_U
    every_key = torch.arange(num_keys, device=k_TGK.device)
    # A bag per block: bags past the last block start at T_k, are empty, and come out zero.
    s_U = F.embedding_bag(every_key, k_TGK.reshape(num_keys, -1).to(dtype), start_U, mode="mean")
    return s_U.view(num_units, num_kv_heads, dim)
