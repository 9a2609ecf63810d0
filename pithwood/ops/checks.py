"""Checks of arguments that the attention ops share, so that bad input fails in the same words everywhere.

Legend: T packed tokens (T_q queries, T_k keys), H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.packing import Packing


def check_impl(impl: str | None, allowed: tuple[str, ...]) -> None:
    """ValueError unless impl is None (choose) or one of the implementations that exist."""
    if impl is not None and impl not in allowed:
        raise ValueError(f"impl={impl!r} does not exist; allowed are {', '.join(map(repr, allowed))} or None to choose")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}")


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads must be a multiple of {num_kv_heads} KV heads")


def check_packed(name: str, x: Tensor, num_rows: int | None = None) -> None:
    """x must be a [T, heads, dim] float tensor, with num_rows rows if that is known."""
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a float tensor [tokens, heads, dim], got {tuple(x.shape)} {x.dtype}")
    if num_rows is not None and x.shape[0] != num_rows:
        raise ValueError(f"{name} has {x.shape[0]} rows but the packing describes {num_rows}")


def check_qkv(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing) -> None:
    """Shapes, dtypes and devices of an attention call."""
    check_packed("q", q_THK, packing.num_queries)
    check_packed("k", k_TGK, packing.num_queries if packing.self_attention else None)
    check_packed("v", v_TGV, k_TGK.shape[0])
    check_heads(q_THK.shape[1], k_TGK.shape[1])
    if v_TGV.shape[1] != k_TGK.shape[1]:
        raise ValueError(f"k has {k_TGK.shape[1]} KV heads but v has {v_TGV.shape[1]}; they must agree")
    if q_THK.shape[2] != k_TGK.shape[2]:
        raise ValueError(f"q has head dim {q_THK.shape[2]} but k has {k_TGK.shape[2]}; they must agree")
    if not q_THK.dtype == k_TGK.dtype == v_TGV.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q_THK.dtype}, {k_TGK.dtype}, {v_TGV.dtype}")
    if not q_THK.device == k_TGK.device == v_TGV.device == packing.cu_q.device:
        devices = f"{q_THK.device}, {k_TGK.device}, {v_TGV.device}, {packing.cu_q.device}"
        raise ValueError(f"q, k, v and the packing must lie on one device, got {devices}; move the packing with .to()")


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
