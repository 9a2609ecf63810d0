"""Symmetric products of stacks of matrices, half of which need not be computed: the bulk of Newton-Schulz.

Legend: M matrices, R rows, C columns, K min(R, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl, compute_dtype
from pithwood.ops.gram.ref import gram_polynomial_ref, gram_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["gram", "gram_polynomial", "symmetric_pays"]

FEWEST_TILES = 512
"""Tiles of 128 x 128 below which the kernel does not fill a GPU for long: one batched product is faster."""


def symmetric_pays(x_MRC: Tensor) -> bool:
    """Whether `impl=None` computes one half only: fp16 and bf16 on Hopper GPUs where there is enough of it."""
    return _choose(None, x_MRC) == "triton"


@torch.no_grad()
def gram(
    x_MRC: Tensor, *, scale_M: Tensor | None = None, out_MKK: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """Product of each matrix with its transpose on the smaller side, (s X)(s X)^T or, of a tall one, (s X)^T (s X).

    x_MRC    [M, R, C] float
    scale_M  [M] fp32 s, None for 1
    out_MKK  [M, K, K] like x, K = min(R, C): written and returned; None makes one
    impl     "ref" | "torch" | "triton"   "torch": one batched product. "triton": the lower half, written twice. None:
             "triton" where `symmetric_pays`, "torch" elsewhere
    returns  [M, K, K] in x's dtype, accumulated in fp32 (fp64 for fp64); no gradient
    raises   ValueError for a wrong shape, an unknown impl, or "triton" where it does not fit
    """
    check_impl(impl, ("ref", "torch", "triton"))
    impl = _choose(impl, x_MRC)
    if out_MKK is None:
        out_MKK = x_MRC.new_empty(x_MRC.shape[0], *2 * (min(x_MRC.shape[1:]),))
    if impl == "ref":
        return out_MKK.copy_(gram_ref(x_MRC, scale_M))
    if impl == "triton":
        from pithwood.ops.gram.triton import gram_triton

        return gram_triton(x_MRC, scale_M, out_MKK)
    tall = x_MRC.shape[1] > x_MRC.shape[2]
    torch.bmm(x_MRC.mT if tall else x_MRC, x_MRC if tall else x_MRC.mT, out=out_MKK)
    return out_MKK if scale_M is None else out_MKK.mul_(scale_M.square()[:, None, None])


@torch.no_grad()
def gram_polynomial(
    g_MKK: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    scale_M: Tensor | None = None,
    out_MKK: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """s (a I + b G + c G^2) of each symmetric matrix G.

    g_MKK    [M, K, K] float, symmetric
    c        not 0
    scale_M  [M] fp32 s, None for 1
    out_MKK  like g, written and returned, not g itself; None makes one
    impl     as for `gram`
    returns  [M, K, K] in g's dtype; no gradient
    raises   ValueError for a wrong shape, an unknown impl, or "triton" where it does not fit
    """
    if g_MKK.dim() == 3 and g_MKK.shape[1] != g_MKK.shape[2]:
        raise ValueError(f"gram_polynomial takes square matrices [M, K, K], got {tuple(g_MKK.shape)}")
    if c == 0.0:
        raise ValueError("gram_polynomial takes c other than 0: without a square there is nothing to multiply")
    check_impl(impl, ("ref", "torch", "triton"))
    impl = _choose(impl, g_MKK)
    if out_MKK is None:
        out_MKK = torch.empty_like(g_MKK)
    if impl == "ref":
        return out_MKK.copy_(gram_polynomial_ref(g_MKK, a, b, c, scale_M))
    if impl == "triton":
        from pithwood.ops.gram.triton import gram_polynomial_triton

        return gram_polynomial_triton(g_MKK, a, b, c, scale_M, out_MKK)
    torch.mul(g_MKK, b, out=out_MKK)
    if a != 0.0:
        # The diagonal is added before it is rounded: in bf16 a second rounding there doubles Newton-Schulz's error.
        diagonal = g_MKK.diagonal(dim1=1, dim2=2).to(compute_dtype(g_MKK.dtype))
        out_MKK.diagonal(dim1=1, dim2=2).copy_(a + b * diagonal)
    out_MKK.baddbmm_(g_MKK, g_MKK, alpha=c)
    return out_MKK if scale_M is None else out_MKK.mul_(scale_M[:, None, None])


def _choose(impl: str | None, x_MRC: Tensor) -> str:
    """The implementation; ValueError if it does not fit."""
    if x_MRC.dim() != 3:
        raise ValueError(f"gram takes stacks of matrices [M, R, C], got {tuple(x_MRC.shape)}")
    if impl != "triton" and not (impl is None and x_MRC.is_cuda and x_MRC.dtype in (torch.float16, torch.bfloat16)):
        return impl or "torch"
    blocks = -(-min(x_MRC.shape[1:]) // 128)
    if impl is None and x_MRC.shape[0] * blocks * (blocks + 1) // 2 < FEWEST_TILES:
        return "torch"
    misfit = triton_misfit(x_MRC)
    if misfit is None:
        from pithwood.ops.gram.triton import gram_misfit

        misfit = gram_misfit(x_MRC)
    if misfit is None:
        return "triton"
    if impl is None:
        return "torch"
    raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
