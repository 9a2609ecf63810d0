"""Checks of arguments that the attention ops share, so that bad input fails in the same words everywhere.

Legend: T packed tokens (T_q queries, T_k keys), H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from pithwood.ops.packing import Packing, Selection


def check_impl(impl: str | None, allowed: tuple[str, ...]) -> None:
    """ValueError unless impl is None (choose) or one of the implementations that exist."""
    if impl is not None and impl not in allowed:
        raise ValueError(f"impl={impl!r} does not exist; allowed are {', '.join(map(repr, allowed))} or None to choose")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}")


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads must be a multiple of {num_kv_heads} KV heads")


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(x).__name__}; give torch.as_tensor({name})")


def check_packing(packing: object) -> None:
    if not isinstance(packing, Packing):
        raise ValueError(
            f"packing must be a Packing, got {type(packing).__name__}; make one with Packing.from_lengths(lengths)"
        )


def check_packed(name: str, x: Tensor, num_rows: int | None = None) -> None:
    """x must be a [T, heads, dim] float tensor, with num_rows rows if that is known."""
    check_tensor(name, x)
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a float tensor [tokens, heads, dim], got {tuple(x.shape)} {x.dtype}")
    if num_rows is not None and x.shape[0] != num_rows:
        raise ValueError(f"{name} has {x.shape[0]} rows but the packing describes {num_rows}")


def check_qkv(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, *, packed_keys: bool = True) -> None:
    """Shapes, dtypes and devices of an attention call; packed_keys=False: k and v may have room between documents."""
    check_packing(packing)
    check_packed("q", q_THK, packing.num_queries)
    check_packed("k", k_TGK, packing.num_keys if packed_keys else None)
    check_packed("v", v_TGV, k_TGK.shape[0])
    check_heads(q_THK.shape[1], k_TGK.shape[1])
    if v_TGV.shape[1] != k_TGK.shape[1]:
        raise ValueError(f"k has {k_TGK.shape[1]} KV heads but v has {v_TGV.shape[1]}; they must agree")
    if q_THK.shape[2] != k_TGK.shape[2]:
        raise ValueError(f"q has head dim {q_THK.shape[2]} but k has {k_TGK.shape[2]}; they must agree")
    if not q_THK.dtype == k_TGK.dtype == v_TGV.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q_THK.dtype}, {k_TGK.dtype}, {v_TGV.dtype}")
    check_devices(q_THK, k_TGK, v_TGV, packing.cu_q)


def check_devices(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> None:
    """q, k, v and a packing's offsets must lie on one device."""
    if not q.device == k.device == v.device == cu.device:
        devices = f"{q.device}, {k.device}, {v.device}, {cu.device}"
        raise ValueError(f"q, k, v and the packing must lie on one device, got {devices}; move the packing with .to()")


def check_with_packing(name: str, x: Tensor, packing: Packing) -> None:
    """x and the packing must lie on one device."""
    if x.device != packing.cu_q.device:
        devices = f"{x.device} and {packing.cu_q.device}"
        raise ValueError(f"{name} and the packing must lie on one device, got {devices}; move the packing with .to()")


def check_summaries(s_UGK: Tensor, packing: Packing, block_size: int) -> None:
    """The summaries must have as many rows as blocks of this size can have, where the host knows that."""
    between = packing.num_units_between(block_size)
    if between is not None and not between[0] <= s_UGK.shape[0] <= between[1]:
        raise ValueError(
            f"s has {s_UGK.shape[0]} summaries, but blocks of {block_size} keys of this packing need {between[0]} to "
            f"{between[1]}; give summarise(k, packing, {block_size})"
        )


def check_selection(selection: Selection, packing: Packing, num_heads: int, num_kv_heads: int) -> None:
    """ValueError unless the selection's shapes fit the packing and the heads; what its ids say is not read."""
    if not isinstance(selection, Selection):
        raise ValueError(
            f"selection must be a Selection, got {type(selection).__name__}; give what select returns, or "
            "Selection(ids, count, unit)"
        )
    ids, count = selection.ids, selection.count
    check_tensor("selection ids", ids)
    check_tensor("selection count", count)
    if ids.dim() != 3 or ids.shape[2] < 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"selection ids must be integers [rows, sets, k >= 1], got {tuple(ids.shape)} {ids.dtype}")
    check_positive("selection unit", selection.unit)
    check_positive("selection row_size", selection.row_size)
    if ids.shape[1] not in (1, num_kv_heads, num_heads):
        allowed = f"1, {num_kv_heads} (KV heads), {num_heads} (query heads)"
        raise ValueError(f"selection has {ids.shape[1]} sets per row; allowed are {allowed}")
    rows = packing.num_rows_bound(selection.row_size)
    if ids.shape[0] != rows:
        raise ValueError(f"selection has {ids.shape[0]} rows; packing and row_size={selection.row_size} need {rows}")
    if count.shape != ids.shape[:2] or count.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"selection count must be integers [rows, sets] = {tuple(ids.shape[:2])}, got {tuple(count.shape)} "
            f"{count.dtype}; say (ids >= 0).sum(-1)"
        )
    check_with_packing("selection ids", ids, packing)


def check_sink(sink_H: Tensor | None, num_heads: int) -> None:
    if sink_H is not None and sink_H.shape != (num_heads,):
        raise ValueError(f"sink must hold one logit per query head, [{num_heads}], got {tuple(sink_H.shape)}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and softmax are computed: fp32, or fp64 for fp64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


GPU_BUDGET_FACTOR = 64
"""Budgets are sized for one core's cache; a GPU needs launches this much larger to be busy."""


def work_budget(budget: int, device: torch.device) -> int:
    """Elements worked on at a time on a device, given the number that suits a CPU core."""
    return budget if device.type == "cpu" else budget * GPU_BUDGET_FACTOR
