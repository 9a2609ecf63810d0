"""The one place that knows torch's cuDNN attention, for documents of equal length and for rectangles without a mask.

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


def batch_lengths(packing: Packing, num_keys: int) -> tuple[int, int] | None:
    """Queries and keys of each document if the packing is a batch, as far as the host can tell: with causality the
    queries must be the keys, as cuDNN's mask begins at the first of both.
    """
    if packing.self_attention or packing.causal:
        length = equal_length(packing)
        return None if length is None else (length, length)
    docs = packing.num_docs
    full = docs * packing.max_q == packing.num_queries and docs * packing.max_k == num_keys
    return (packing.max_q, packing.max_k) if full and packing.num_queries and num_keys else None


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
    if batch_lengths(packing, k_TGK.shape[0]) is None:
        return (
            "it needs documents of one length that fill the packing "
            f"({packing.num_docs} documents of at most {packing.max_q} tokens, {packing.num_queries} in all)"
        )
    return None


def cudnn_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, H, K], lse [T, H] fp32) as one batch [N, L]; no host sync, differentiable in q, k, v through o."""
    # [N, heads, L, K] views of the packed layout; what comes back is laid out like q
    batch = _batches(packing, q_THK, k_TGK, v_TGV)
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batch, None, True, 0.0, packing.causal, False, scale=scale
    )
    return o.transpose(1, 2).flatten(0, 1), lse.detach().reshape(*o.shape[:3]).transpose(1, 2).flatten(0, 1)


def cudnn_grads(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k, v; o and lse may be those over more keys than k."""
    lengths = batch_lengths(packing, k.shape[0])
    assert lengths is not None
    grad_NHLK, o_NHLK = (x.contiguous().unflatten(0, (-1, lengths[0])).transpose(1, 2) for x in (grad_o, o))
    # its own log-sums are [N, H, L, 1]
    lse_NHL1 = lse.unflatten(0, (-1, lengths[0])).transpose(1, 2).contiguous()[..., None]
    # what dropout would need
    seed, offset = torch.zeros((2,), dtype=torch.int64, device=q.device).unbind()
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_NHLK, *_batches(packing, q, k, v), o_NHLK, lse_NHL1, seed, offset,
        None, None, None, *lengths, 0.0, packing.causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (grad.transpose(1, 2).flatten(0, 1) for grad in grads)
    return dq, dk, dv


def _batches(packing: Packing, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor) -> list[Tensor]:
    lengths = batch_lengths(packing, k_TGK.shape[0])
    assert lengths is not None
    sides = zip((q_THK, k_TGK, v_TGV), (lengths[0], lengths[1], lengths[1]), strict=True)
    return [x.unflatten(0, (-1, length)).transpose(1, 2) for x, length in sides]
