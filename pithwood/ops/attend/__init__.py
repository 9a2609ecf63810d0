"""Softmax attention to the keys that a selection names, and the probability mass that each selected unit received.

Legend: T packed tokens (T_q queries, T_k keys), R selection rows, S selections per row, k selected per row, H query
heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.attend.key_major import KeyMajorAttention
from pithwood.ops.attend.mass import attention_mass
from pithwood.ops.attend.query_major import QueryMajorAttention
from pithwood.ops.attend.ref import attend_ref
from pithwood.ops.checks import check_impl, check_qkv, check_sink
from pithwood.ops.merge import add_sink
from pithwood.ops.packing import Packing, Selection

__all__ = ["attend", "attention_mass"]

SMALL_UNIT = 16
"""Units with fewer keys are gathered query by query; larger ones gather queries to them."""


def attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    selection: Selection,
    scale: float | None = None,
    sink_H: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the units selected for it, causally if the packing is.

    q_THK       [T_q, H, K] float       k_TGK [T_k, G, K], v_TGV [T_k, G, V] of the same dtype; H a multiple of G
    selection                           unit 1 (tokens) or blocks, one row per query or per tile, S in {1, G, H};
                                        the ids of a row differ from each other, those past the query are not seen
    scale                               factor of the scores; None: K ** -0.5
    sink_H      [H] float               a logit per head that takes part in the softmax without a value (not scaled)
    impl        "ref" | "torch"         None: "torch"
    returns     (o [T_q, H, V] like q, lse [T_q, H] fp32 (fp64 for fp64), natural log, sink included)
    raises      ValueError on shapes, dtypes, devices or selections that do not fit

    Differentiable in q, k, v, sink, through o and lse; the selection is a constant. A query that sees no key gives zero
    output, lse -inf (without sink) and no gradient. Softmax and sums are fp32 (fp64 for fp64).
    "torch" works with memory linear in tokens x k and a bounded workspace, is bitwise repeatable, and a document's
    digits do not depend on what it is packed with. It reads document offsets on the host (free on CPU).
    Lu et al. 2025, arXiv 2502.13189, section 2.2; the schedule is that of attend/key_major.py and
    attend/query_major.py.
    """
    check_impl(impl, ("ref", "torch"))
    check_qkv(q_THK, k_TGK, v_TGV, packing)
    check_sink(sink_H, q_THK.shape[1])
    check_selection(selection, packing, q_THK.shape[1], k_TGK.shape[1])
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    if impl == "ref":
        o, lse = attend_ref(q_THK, k_TGK, v_TGV, packing, selection, scale)
    elif selection.unit < SMALL_UNIT:
        o, lse = QueryMajorAttention.apply(q_THK, k_TGK, v_TGV, packing, selection, scale)
    else:
        o, lse = KeyMajorAttention.apply(q_THK, k_TGK, v_TGV, packing, selection, scale)
    if sink_H is not None:
        o, lse = add_sink(o, lse, sink_H)
    return o.to(q_THK.dtype), lse


def check_selection(selection: Selection, packing: Packing, num_heads: int, num_kv_heads: int) -> None:
    """ValueError unless the selection fits the packing and the heads and keeps its promise; reads one flag on the host
    if it makes one."""
    ids = selection.ids
    if ids.dim() != 3 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"selection ids must be integers [rows, sets, k], got {tuple(ids.shape)} {ids.dtype}")
    if selection.unit < 1 or selection.row_size < 1:
        raise ValueError(f"selection unit={selection.unit} and row_size={selection.row_size} must be at least 1")
    if ids.shape[1] not in (1, num_kv_heads, num_heads):
        allowed = f"1, {num_kv_heads} (KV heads), {num_heads} (query heads)"
        raise ValueError(f"selection has {ids.shape[1]} sets per row; allowed are {allowed}")
    rows = packing.num_rows_bound(selection.row_size)
    if ids.shape[0] != rows:
        raise ValueError(f"selection has {ids.shape[0]} rows; packing and row_size={selection.row_size} need {rows}")
    if not selection.own:
        return
    # Key-major attention gives such queries their own unit without looking it up, so a false promise is a wrong result.
    position_T = packing.query_key_position()
    own_T = position_T.div(selection.unit, rounding_mode="floor").to(ids.dtype)
    ids_TSk = ids if selection.row_size == 1 else ids[packing.row_of_query(selection.row_size)]
    broken_T = (position_T >= 0) & ~(ids_TSk == own_T[:, None, None]).any(-1).all(-1)
    if broken_T.any():
        query = int(broken_T.int().argmax())
        raise ValueError(
            f"selection says own=True, but the ids of query {query} lack its own unit {int(own_T[query])}; add it to "
            "the ids or say own=False"
        )
