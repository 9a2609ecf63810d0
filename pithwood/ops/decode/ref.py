"""Decoding by the definitions of `attend` and of full attention, and the keys of a cache without the room between.

Legend: T packed tokens, N documents, H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.attend.ref import attend_ref
from pithwood.ops.dense_attention.ref import dense_ref
from pithwood.ops.packing import Packing, Selection


def decode_ref(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, H, V] like q, lse [T, H]) with each document's whole mask in view."""
    if selection is None:
        o, lse = dense_ref(q_THK, k_TGK, v_TGV, packing, scale, None)
    else:
        o, lse = attend_ref(q_THK, k_TGK, v_TGV, packing, selection, scale)
    return o.to(q_THK.dtype), lse


def packed_keys(k_TGK: Tensor, v_TGV: Tensor, packing: Packing, key_start_N: Tensor) -> tuple[Tensor, Tensor]:
    """k and v of the documents that begin at these rows, one after another as packing.cu_k says; reads the offsets on
    the host. ValueError if a document's rows are not all there.
    """
    spans = list(zip(key_start_N.tolist(), packing.cu_k.diff().tolist(), strict=True))
    for doc, (start, length) in enumerate(spans):
        if length > 0 and not 0 <= start <= k_TGK.shape[0] - length:
            raise ValueError(
                f"key_start puts the {length} keys of document {doc} at rows {start} to {start + length - 1}, but k "
                f"has {k_TGK.shape[0]} rows"
            )
    if not spans:
        return k_TGK[:0], v_TGV[:0]
    k, v = (torch.cat([x[start : start + length] for start, length in spans]) for x in (k_TGK, v_TGV))
    return k, v
