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
from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_impl, check_qkv, check_selection, check_sink
from pithwood.ops.merge import add_sink
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.triton_support import triton_misfit

__all__ = ["attend", "attention_mass"]

SMALL_UNIT = 16
"""Units with fewer keys are gathered query by query; larger ones gather queries to them."""
MAX_HEAD_DIM = 256
"""Largest head dim of the Triton kernels."""


@without_autocast
def attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    selection: Selection,
    scale: float | None = None,
    sink_H: Tensor | None = None,
    *,
    deterministic: bool | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the units selected for it, causally if the packing is.

    q_THK       [T_q, H, K] float       k_TGK [T_k, G, K], v_TGV [T_k, G, V] of the same dtype; H a multiple of G
    selection                           unit 1 (tokens) or blocks, one row per query or per tile, S in {1, G, H};
                                        the ids of a row differ and lie within its document, which is not checked (see
                                        `Selection`); those past the query are not seen
    scale                               factor of the scores; None: K ** -0.5
    sink_H      [H] float               a logit per head that takes part in the softmax without a value (not scaled)
    deterministic                       the backward pass repeats bit for bit; "triton" is slower then. None: where
                                        torch.use_deterministic_algorithms is on
    impl        "ref" | "torch" | "triton"   None: "triton" where it fits: CUDA (or Triton's interpreter, see
                                        `triton_misfit`), fp32, fp16 or bf16, head dims up to 256, units of 16 keys or
                                        more; "torch" elsewhere, and by default on CPUs
    returns     (o [T_q, H, V] like q, lse [T_q, H] fp32 (fp64 for fp64), natural log, sink included)
    raises      ValueError on shapes, dtypes, devices or selections that do not fit

    Differentiable in q, k, v, sink, through o and lse; the selection is a constant. A query that sees no key gives zero
    output, lse -inf (without sink) and no gradient. Softmax and sums are fp32 (fp64 for fp64).
    "torch" works with memory linear in tokens x k and a bounded workspace, is bitwise repeatable, and a document's
    digits do not depend on what it is packed with. It reads document offsets on the host (free on CPU).
    "triton" reads nothing on the host. Its forward repeats bit for bit; a row whose ids break the promise `own` gets
    NaN instead of an error.
    Lu et al. 2025, arXiv 2502.13189, section 2.2; the schedules are those of attend/key_major.py,
    attend/query_major.py and attend/triton.py.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    check_qkv(q_THK, k_TGK, v_TGV, packing)
    check_sink(sink_H, q_THK.shape[1])
    check_selection(selection, packing, q_THK.shape[1], k_TGK.shape[1])
    misfit = _triton_misfit(q_THK, v_TGV, selection.unit)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    if impl is None and q_THK.is_cuda and not misfit:
        impl = "triton"
    if impl != "triton":
        check_promise(selection, packing)
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    if impl == "ref":
        o, lse = attend_ref(q_THK, k_TGK, v_TGV, packing, selection, scale)
    elif impl == "triton":
        from pithwood.ops.attend.triton import attend_triton  # imports triton, which not every machine has

        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        o, lse = attend_triton(q_THK, k_TGK, v_TGV, packing, selection, scale, deterministic)
    elif selection.unit < SMALL_UNIT:
        o, lse = QueryMajorAttention.apply(q_THK, k_TGK, v_TGV, packing, selection, scale)
    else:
        o, lse = KeyMajorAttention.apply(q_THK, k_TGK, v_TGV, packing, selection, scale)
    if sink_H is not None:
        o, lse = add_sink(o, lse, sink_H)
    return o.to(q_THK.dtype), lse


def check_promise(selection: Selection, packing: Packing) -> None:
    """ValueError unless a selection that says own=True holds every query's own unit; reads one flag on the host."""
    if not selection.own:
        return
    ids = selection.ids
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


def _triton_misfit(q_THK: Tensor, v_TGV: Tensor, unit: int) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    if unit < SMALL_UNIT:
        return f"units of {unit} keys are too small for its matrix products, it takes {SMALL_UNIT} or more"
    if max(q_THK.shape[2], v_TGV.shape[2]) > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, got {q_THK.shape[2]} and {v_TGV.shape[2]}"
    return triton_misfit(q_THK, v_TGV)
