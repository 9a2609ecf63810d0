"""The package's measure of error as an assertion, used by every parity test."""

from __future__ import annotations

from torch import Tensor

from pithwood.check.numerics import REL_ERROR, rel_error

__all__ = ["REL_ERROR", "assert_close", "rel_error"]


def assert_close(actual: Tensor, expected: Tensor, tol: float | None = None, what: str = "tensor") -> None:
    """Fail with the measured relative error if it exceeds tol (default: by the dtype of `actual`)."""
    limit = REL_ERROR[actual.dtype] if tol is None else tol
    error = rel_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.3e} > {limit:.1e} (shape {tuple(actual.shape)})"
