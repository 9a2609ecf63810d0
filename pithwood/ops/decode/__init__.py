"""Attention of a few new queries per document to many cached keys: to selected blocks, or to all.

Legend: T packed tokens (T_q queries, T_k rows that hold keys), N documents, H query heads, G KV heads, K query/key head
dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.attend import attend
from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_impl, check_packing, check_qkv, check_selection, check_tensor
from pithwood.ops.decode.ref import decode_ref, packed_keys
from pithwood.ops.dense_attention import dense_attention
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.triton_support import triton_misfit

__all__ = ["decode_attend", "decodes_by_kernel"]

MOST_QUERIES = 16
"""Queries per document up to which the kernel is the default. It reads a document's keys anew for every 64 rows, a row
being a query and head; with more queries the kernels of training are faster."""
MAX_HEAD_DIM = 256
"""Largest head dim of the Triton kernel."""
LEAST_UNIT = 16
"""Smallest unit that the Triton kernel takes: each is worked on apart."""


@without_autocast
def decode_attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    selection: Selection | None = None,
    scale: float | None = None,
    *,
    key_start_N: Tensor | None = None,
    need_lse: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend a few queries per document to the keys selected for each, or to all of its document, causally if the
    packing is.

    q_THK       [T_q, H, K] float       k_TGK [T_k, G, K], v_TGV [T_k, G, V] of the same dtype; H a multiple of G
    selection                           as `attend` takes it, but its promise `own` is not relied on; None: all keys
    scale                               factor of the scores; None: K ** -0.5
    key_start_N [N] int                 row of k and v at which each document's keys begin; their number is that of
                                        packing.cu_k. For caches that leave room behind each document. Rows that k lacks
                                        are refused where no kernel runs: one reads no offsets. None: packed
    need_lse                            False may save the fallbacks work; lse is None then
    impl        "ref" | "torch" | "triton"   None: "triton" where `decodes_by_kernel` says so, and elsewhere what
                                        `attend` or `dense_attention` choose
    returns     (o [T_q, H, V] like q, lse [T_q, H] fp32 (fp64 for fp64), natural log, or None)
    raises      ValueError on shapes, dtypes, devices or selections that do not fit, "triton" where it does not fit or
                where an input wants a gradient

    A query that sees no key gives zero output and lse -inf. Softmax and sums are fp32 (fp64 for fp64).
    "triton" splits the keys of a document and KV head over programs, each for all query heads of the KV head, and then
    merges their parts (decode/triton.py). It has no backward pass, takes any number of queries, reads nothing on the
    host, and repeats bit for bit. Key positions of a document that none of its queries sees are never read, so the room
    between documents may hold anything.
    "torch" is the plain-torch path of `attend` and `dense_attention`, differentiable like theirs.
    Splitting over keys: Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    check_impl(impl, ("ref", "torch", "triton"))
    _check(q_THK, k_TGK, v_TGV, packing, selection, key_start_N)
    unit = None if selection is None else selection.unit
    misfit = _triton_misfit(q_THK, k_TGK, v_TGV, unit)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}")
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    if impl == "triton" or (impl is None and decodes_by_kernel(q_THK, k_TGK, v_TGV, packing, unit)):
        from pithwood.ops.decode.triton import decode_split  # imports triton, which not every machine has

        ids_THk = None if selection is None else selection.ids_per_head(packing, q_THK.shape[1], k_TGK.shape[1])
        o, lse = decode_split(
            q_THK,
            k_TGK,
            v_TGV,
            None if ids_THk is None else ids_THk.to(torch.int32),
            packing.cu_q,
            packing.cu_k,
            key_start_N,
            packing.max_q,
            packing.max_k,
            packing.causal,
            unit or 0,
            scale,
        )
        return o, lse if need_lse else None
    if key_start_N is not None:
        k_TGK, v_TGV = packed_keys(k_TGK, v_TGV, packing, key_start_N)
    if impl == "ref":
        o, lse = decode_ref(q_THK, k_TGK, v_TGV, packing, selection, scale)
    elif selection is None:
        return dense_attention(q_THK, k_TGK, v_TGV, packing, scale, need_lse=need_lse, impl=impl)
    else:
        o, lse = attend(q_THK, k_TGK, v_TGV, packing, selection, scale, impl=impl)
    return o, lse if need_lse else None


def decodes_by_kernel(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, unit: int | None = None) -> bool:
    """Whether `decode_attend` takes the Triton kernel of its own accord: on CUDA, up to 16 queries per document by
    packing.max_q, without gradient, fp32, fp16 or bf16, head dims up to 256, units of 16 keys or more (None: all keys).
    """
    few = q_THK.is_cuda and packing.max_q <= MOST_QUERIES
    return few and not _triton_misfit(q_THK, k_TGK, v_TGV, unit)


def _triton_misfit(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, unit: int | None) -> str | None:
    """Why the Triton kernel cannot take this call, and what can; or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THK, k_TGK, v_TGV)):
        instead = "dense_attention" if unit is None else "attend"
        return f"it has no backward pass; call it under torch.no_grad(), or use {instead}, which has one"
    if unit is not None and unit < LEAST_UNIT:
        return f"it takes units of {LEAST_UNIT} keys or more, got {unit}; use impl='torch'"
    if max(q_THK.shape[2], v_TGV.shape[2]) > MAX_HEAD_DIM:
        dims = f"{q_THK.shape[2]} and {v_TGV.shape[2]}"
        return f"it takes head dims up to {MAX_HEAD_DIM}, got {dims}; use impl='torch'"
    misfit = triton_misfit(q_THK, v_TGV)
    return f"{misfit}; or use impl='torch'" if misfit else None


def _check(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    selection: Selection | None,
    key_start_N: Tensor | None,
) -> None:
    check_packing(packing)
    if key_start_N is not None and packing.self_attention:
        raise ValueError("key_start is for keys that are not the queries' own: give a packing with a cu_k of its own")
    check_qkv(q_THK, k_TGK, v_TGV, packing, packed_keys=key_start_N is None)
    if key_start_N is not None:
        check_tensor("key_start", key_start_N)
        if key_start_N.shape != (packing.num_docs,) or key_start_N.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"key_start must hold one row number per document, [{packing.num_docs}] int32 or int64, got "
                f"{tuple(key_start_N.shape)} {key_start_N.dtype}"
            )
        if key_start_N.device != q_THK.device:
            raise ValueError(f"key_start lies on {key_start_N.device}, q on {q_THK.device}; move one")
    if selection is not None:
        check_selection(selection, packing, q_THK.shape[1], k_TGK.shape[1])
