"""One measure of error, the tolerances that follow from dtype, and memory whose use before writing shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pithwood.check.gates import GateError

REL_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest accepted relative error by the dtype of the computation under test."""


def rel_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64; NaN anywhere, or unequal shapes, never pass (returns inf)."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        same = torch.equal(a.nan_to_num(nan=0.5e300), b.nan_to_num(nan=-0.5e300))
        return 0.0 if same else float("inf")
    norm = b.norm()
    return float((a - b).norm() / norm) if norm > 0 else float((a - b).norm())


def require_close(actual: Tensor, expected: Tensor, limit: float, what: str) -> float:
    """The relative error; fails the gate where it exceeds `limit`. NaN and infinities fail on either side."""
    for side, tensor in (("", actual), ("the reference of ", expected)):
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise GateError(f"{side}{what} holds {bad} values that are NaN or infinite")
    error = rel_error(actual, expected)
    if not error <= limit:
        shapes = "" if actual.shape == expected.shape else f": shape {list(actual.shape)}, not {list(expected.shape)}"
        raise GateError(f"{what} differs: relative error {error:.2e}, allowed {limit:.0e}{shapes}")
    return error


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory of torch.empty and its like holds NaN (or the largest int) inside, so that reading it shows."""
    memory: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
