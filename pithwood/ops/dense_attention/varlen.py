"""The one place that knows `torch.nn.attention.varlen`, whose signature differs between torch releases.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from pithwood.ops.packing import Packing


def varlen_misfit(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, needs_lse: bool) -> str | None:
    """Why varlen attention cannot take this call, or None if it can."""
    if not q_THK.is_cuda:
        return f"it needs CUDA tensors, got {q_THK.device}"
    if q_THK.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs fp16 or bf16, got {q_THK.dtype}"
    if q_THK.shape[2] != v_TGV.shape[2] or q_THK.shape[2] > 256 or q_THK.shape[2] % 8:
        return f"it needs equal head dims <= 256 that are multiples of 8, got {q_THK.shape[2]} and {v_TGV.shape[2]}"
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q_THK, k_TGK, v_TGV))
    if needs_lse and tracked:
        return "its log-sum has no gradient"
    if min(q_THK.shape[0], k_TGK.shape[0]) == 0:
        return "it needs at least one query and one key"
    return None


def varlen_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float, window: int | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(o [T, H, V], lse [T, H] fp32 or None) by flash attention; no host sync."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in accepted:
        # left counts the keys before the query's own
        left = -1 if window is None else window - 1
        options["window_size"] = (left, 0) if packing.causal else (-1, -1)
    elif window is None:
        options["is_causal"] = packing.causal
    else:
        raise ValueError(f"window={window} needs varlen_attn with window_size (torch {torch.__version__} has none)")
    if "scale" in accepted:
        options["scale"] = scale
    else:
        q_THK = q_THK * (scale * q_THK.shape[2] ** 0.5)
    # releases without this argument take grouped heads as they are
    if q_THK.shape[1] != k_TGK.shape[1] and "enable_gqa" in accepted:
        options["enable_gqa"] = True
    if need_lse:
        options["return_aux"] = AuxRequest(lse=True)
    result: Any = varlen_attn(q_THK, k_TGK, v_TGV, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, **options)
    o: Tensor = result[0] if need_lse else result
    lse: Tensor | None = result[1].transpose(0, 1) if need_lse else None
    return blank_without_keys(o, lse, packing)


def varlen_grads(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k, v, by flash attention 2; o and lse may be those over more keys than k. No host sync.

    By the operator under `varlen_attn`: it takes any log-sums, and no release has a public function that does.
    """
    # rows that saw nothing: the kernels' convention is +inf, with which exp(score - lse) is 0
    lse_HT = torch.where(lse == float("-inf"), float("inf"), lse).transpose(0, 1).contiguous()
    # what dropout would need
    state = torch.zeros((2,), dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad_o.contiguous(), q, k, v, o.contiguous(), lse_HT, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k,
        0.0, packing.causal, state, torch.empty(0, device=q.device),
        scale=scale, window_size_left=-1, window_size_right=0 if packing.causal else -1,
    )  # fmt: skip
    return dq, dk, dv


def blank_without_keys(o_THV: Tensor, lse_TH: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """Zero output and log-sum -inf in rows without a visible key: our convention, not the kernels'."""
    if packing.self_attention:
        return o_THV, lse_TH
    lengths_N = packing.cu_k.diff()[packing.query_doc()]
    empty_T = packing.query_key_position() < 0 if packing.causal else lengths_N == 0
    o_THV = o_THV.masked_fill(empty_T[:, None, None], 0.0)
    return o_THV, None if lse_TH is None else lse_TH.masked_fill(empty_T[:, None], float("-inf"))
