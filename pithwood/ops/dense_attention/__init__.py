"""Full and sliding-window attention over packed documents.

Legend: T packed tokens (T_q queries, T_k keys), H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_impl, check_positive, check_qkv, check_sink
from pithwood.ops.dense_attention.banded import BandedAttention, banded_grads
from pithwood.ops.dense_attention.cudnn import cudnn_attention, cudnn_grads, cudnn_misfit
from pithwood.ops.dense_attention.fa4 import fa4_attention, fa4_misfit
from pithwood.ops.dense_attention.ref import dense_grads_ref, dense_ref
from pithwood.ops.dense_attention.sdpa import sdpa_attention, sdpa_fits
from pithwood.ops.dense_attention.varlen import varlen_attention, varlen_grads, varlen_misfit
from pithwood.ops.merge import add_sink
from pithwood.ops.packing import Packing

__all__ = ["dense_attention", "dense_attention_backward"]

PREFERRED: tuple[str, ...] = ("cudnn", "varlen")
"""What a call takes that names no implementation: the first of these that fits, else "torch"."""


@without_autocast
def dense_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    scale: float | None = None,
    window: int | None = None,
    sink_H: Tensor | None = None,
    *,
    need_lse: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each query to its document's keys, causal if the packing is, bottom-right aligned.

    q_THK       [T_q, H, K] float       k_TGK [T_k, G, K], v_TGV [T_k, G, V] of the same dtype; H a multiple of G
    scale                               factor of the scores; None: K ** -0.5
    window      >= 1                    keys a query sees, its own included; None: all. Causal packings only
    sink_H      [H] float               a logit per head that takes part in the softmax without a value (not scaled)
    need_lse                            also return the log-sum
    impl        "ref" | "torch" | "varlen" | "cudnn" | "fa4"   None: the first of PREFERRED that fits, "torch" elsewhere
    returns     (o [T_q, H, V] like q, lse [T_q, H] fp32 (fp64 for fp64), sink included, or None)
    raises      ValueError on shapes, dtypes, window < 1 or without causality, an implementation where it does not fit

    "varlen" (flash attention 2 in torch) fits CUDA tensors in fp16 or bf16 with V = K <= 256, a multiple of 8, and no
    gradient through lse or sink. "fa4" (package flash-attn-4) the same on a Hopper GPU. "cudnn" fits documents of equal
    length without window, K <= 128; without causality queries and keys may be of two lengths.

    Differentiable in q, k, v, sink, through o and lse. A query that sees no key gives zero output, lse -inf (without
    sink) and no gradient. "torch" is `scaled_dot_product_attention` document by document for plain full attention, and
    a chunked softmax (memory linear in T, with a window linear in T x window / chunk) for everything else; it reads the
    offsets on the host.
    """
    check_impl(impl, ("ref", "torch", "varlen", "cudnn", "fa4"))
    check_qkv(q_THK, k_TGK, v_TGV, packing)
    check_sink(sink_H, q_THK.shape[1])
    if window is not None:
        check_positive("window", window)
        if not packing.causal:
            raise ValueError(f"window={window} needs a causal packing; use window=None for bidirectional attention")
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    needs_lse = need_lse or sink_H is not None
    lse: Tensor | None
    args = q_THK, k_TGK, v_TGV
    if impl is None:
        impl = next((name for name in PREFERRED if not _misfit(name, *args, packing, window, needs_lse)), "torch")
    elif misfit := _misfit(impl, *args, packing, window, needs_lse):
        raise ValueError(f"impl={impl!r} does not fit here: {misfit}; use impl='torch'")
    if impl == "ref":
        o, lse = dense_ref(*args, packing, scale, window)
    elif impl == "varlen":
        o, lse = varlen_attention(*args, packing, scale, window, needs_lse)
    elif impl == "fa4":
        o, lse = fa4_attention(*args, packing, scale, window, needs_lse)
    elif impl == "cudnn":
        o, lse = cudnn_attention(*args, packing, scale)
    elif not needs_lse and window is None and sdpa_fits(q_THK, v_TGV, packing):
        o, lse = sdpa_attention(q_THK, k_TGK, v_TGV, packing, scale), None
    else:
        o, lse = BandedAttention.apply(q_THK, k_TGK, v_TGV, packing, scale, window)
    if sink_H is not None:
        assert lse is not None
        o, lse = add_sink(o, lse, sink_H)
    return o.to(q_THK.dtype), lse if need_lse else None


@without_autocast
def dense_attention_backward(
    grad_o_THV: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    o_THV: Tensor,
    lse_TH: Tensor,
    packing: Packing,
    scale: float | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v in full attention over some or all keys, from o and log-sum over all: no gradient of its
    own.

    q_THK, k_TGK, v_TGV, packing, scale  as given to `dense_attention`, which made a part of o
    grad_o_THV  [T_q, H, V] like q      the gradient of the whole o
    o_THV       [T_q, H, V] like q      attention over these keys and any others, with its log-sum lse_TH [T_q, H] fp32
                                        (fp64 for fp64)
    impl        "ref" | "torch" | "varlen" | "cudnn"    None: the first of PREFERRED that fits, "torch" elsewhere
    returns     (dq, dk, dv) like q, k, v: these keys' part of dq, all of dk and dv
    raises      ValueError on shapes, dtypes, an implementation where it does not fit

    Parts of one softmax add up: dq over the parts, without knowing the other keys. "varlen" and "cudnn" fit where they
    fit in `dense_attention`. "torch" takes memory linear in T and reads the offsets on the host.
    """
    check_impl(impl, ("ref", "torch", "varlen", "cudnn"))
    check_qkv(q_THK, k_TGK, v_TGV, packing)
    if grad_o_THV.shape != o_THV.shape or o_THV.shape[:2] != q_THK.shape[:2] or lse_TH.shape != q_THK.shape[:2]:
        shapes = f"{tuple(grad_o_THV.shape)}, {tuple(o_THV.shape)}, {tuple(lse_TH.shape)}"
        raise ValueError(
            f"grad_o, o [T, H, V] and lse [T, H] must have q's {tuple(q_THK.shape[:2])} rows, got {shapes}"
        )
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    with torch.no_grad():
        if impl is None:
            impl = next((p for p in PREFERRED if not _misfit(p, q_THK, k_TGK, v_TGV, packing, None, True)), "torch")
        elif misfit := _misfit(impl, q_THK, k_TGK, v_TGV, packing, None, True):
            raise ValueError(f"impl={impl!r} does not fit here: {misfit}; use impl='torch'")
        args = grad_o_THV, q_THK, k_TGK, v_TGV, o_THV, lse_TH, packing, scale
        if impl == "ref":
            return dense_grads_ref(*args)
        if impl == "varlen":
            return varlen_grads(*args)
        if impl == "cudnn":
            return cudnn_grads(*args)
        return banded_grads(*args, None)


def _misfit(
    impl: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, needs_lse: bool
) -> str | None:
    """Why this implementation cannot take the call, or None if it can."""
    if impl == "varlen":
        return varlen_misfit(q, k, v, needs_lse)
    if impl == "fa4":
        return fa4_misfit(q, k, v, needs_lse)
    if impl == "cudnn":
        return cudnn_misfit(q, k, v, packing, window, needs_lse)
    return None
