"""The one place that knows torch's cuDNN attention, for documents of equal length.

cuDNN's own kernels for packed documents are out of reach: in torch up to 2.13 the backward pass of
`_cudnn_attention_backward` takes the head dim for the longest document's length where offsets are given, and writes
past its buffers (pytorch/pytorch#186142, #172108). Documents of one length are a batch, which needs no offsets.

Legend: T packed tokens, N documents, L their length, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.packing import Packing


def equal_length(packing: Packing) -> int | None:
    """Length of the documents if they all have the same and fill the packing, as far as the host can tell: N times the
    bound is all there is. Nothing is read from the device.
    """
    full = packing.self_attention and packing.num_docs * packing.max_q == packing.num_queries
    return packing.max_q if full and packing.num_docs else None


def cudnn_misfit(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, window: int | None, needs_lse: bool
) -> str | None:
    """Why cuDNN's attention cannot take this call, or None if it can."""
    if not q_THK.is_cuda:
        return f"it needs CUDA tensors, got {q_THK.device}"
    if q_THK.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs fp16 or bf16, got {q_THK.dtype}"
    if q_THK.shape[2] != v_TGV.shape[2] or q_THK.shape[2] > 128 or q_THK.shape[2] % 8:
        return f"it needs equal head dims <= 128 that are multiples of 8, got {q_THK.shape[2]} and {v_TGV.shape[2]}"
    if window is not None:
        return f"it has no window, got window={window}"
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q_THK, k_TGK, v_TGV))
    if needs_lse and tracked:
        return "its log-sum has no gradient"
    if not equal_length(packing):
        return (
            "it needs documents of one length that fill the packing "
            f"({packing.num_docs} documents of at most {packing.max_q} tokens, {packing.num_queries} in all)"
        )
    return None


def cudnn_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, H, K], lse [T, H] fp32) as one batch [N, L]; no host sync, differentiable in q, k, v through o."""
    length = equal_length(packing)
    assert length is not None
    # [N, heads, L, K] views of the packed layout; what comes back is laid out like q
    batch = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGV)]
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batch, None, True, 0.0, packing.causal, False, scale=scale
    )
    return o.transpose(1, 2).flatten(0, 1), lse.detach().reshape(*o.shape[:3]).transpose(1, 2).flatten(0, 1)
