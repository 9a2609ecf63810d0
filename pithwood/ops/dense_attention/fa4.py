"""The one place that knows flash-attention 4 (package `flash-attn-4`, module `flash_attn.cute`), where it is installed.

Its kernels for Hopper take packed documents. Dao-AILab/flash-attention, folder `flash_attn/cute`.

Legend: T packed tokens, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from pithwood.ops.dense_attention.varlen import blank_without_keys, varlen_misfit
from pithwood.ops.packing import Packing


@functools.cache
def installed() -> bool:
    """Whether the package is there; looking imports it, which only calls on a GPU that could take it do."""
    try:
        return importlib.util.find_spec("flash_attn.cute.interface") is not None
    except ImportError:  # no package flash_attn, one without `cute`, or one that lacks what `cute` imports
        return False


def fa4_misfit(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, needs_lse: bool) -> str | None:
    """Why flash-attention 4 cannot take this call, or None if it can."""
    misfit = varlen_misfit(q_THK, k_TGK, v_TGV, needs_lse)
    if misfit is not None:
        return misfit
    if torch.cuda.get_device_capability(q_THK.device)[0] != 9:
        return f"it is known here on Hopper GPUs only, got {torch.cuda.get_device_name(q_THK.device)}"
    return None if installed() else "the package flash-attn-4 is not installed"


def fa4_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float, window: int | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(o [T, H, K], lse [T, H] fp32 or None); no host sync. The gradient of q adds up in an order of its own unless
    torch.use_deterministic_algorithms is on.
    """
    from flash_attn.cute import flash_attn_varlen_func

    # None is no bound; left counts the keys before the query's own
    left, right = (None if window is None else window - 1), (0 if window is not None else None)
    result: Any = flash_attn_varlen_func(
        q_THK,
        k_TGK,
        v_TGV,
        cu_seqlens_q=packing.cu_q,
        cu_seqlens_k=packing.cu_k,
        max_seqlen_q=packing.max_q,
        max_seqlen_k=packing.max_k,
        softmax_scale=scale,
        causal=packing.causal and window is None,
        window_size=(left, right),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=need_lse,
    )
    o, lse = result if isinstance(result, tuple) else (result, None)
    return blank_without_keys(o, lse.detach().transpose(0, 1) if need_lse else None, packing)
