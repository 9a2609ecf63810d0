"""One measure of error and the tolerances that follow from dtype, used by every parity test."""

from __future__ import annotations

import torch
from torch import Tensor

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


def assert_close(actual: Tensor, expected: Tensor, tol: float | None = None, what: str = "tensor") -> None:
    """Fail with the measured relative error if it exceeds tol (default: by the dtype of `actual`)."""
    limit = REL_ERROR[actual.dtype] if tol is None else tol
    error = rel_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.3e} > {limit:.1e} (shape {tuple(actual.shape)})"
