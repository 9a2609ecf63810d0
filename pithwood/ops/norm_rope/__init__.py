"""What happens to queries and keys between their projections and attention: a norm per head, and rotation by position.

Legend: T packed tokens, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl, check_packed
from pithwood.ops.norm_rope.eager import norm_rope_eager
from pithwood.ops.norm_rope.ref import norm_rope_ref
from pithwood.ops.rope import Rope
from pithwood.ops.triton_support import triton_misfit

__all__ = ["norm_rope"]


def norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
    rope: Rope | None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm each head's vector (RMS), multiply by its side's weight, rotate by the token's position; q and k at once.

    q_THK       [T, H, K] float     k_TGK [T, G, K] of the same dtype, as projected
    q_weight_K  [K]                 typically fp32; None for both weights leaves out the norm
    rope        angles of the T tokens, read in fp32; None leaves out the rotation
    impl        "ref" | "torch" | "triton"   None: "triton" for fp32, fp16 and bf16 on CUDA with an even K, "torch"
                                    elsewhere
    returns     (q, k) like the inputs
    raises      ValueError on shapes or dtypes that do not fit each other, one weight without the other, or "triton"
                where it does not fit

    Norm and rotation are fp32 inside. "ref" and "triton" round once, at the end; "torch" rounds after the norm too and
    rotates in the inputs' dtype, as the models' published code does: the same in fp32, up to three roundings in bf16.
    The kernel saves nothing for the backward pass but q and k themselves.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    check_packed("q", q_THK)
    check_packed("k", k_TGK, q_THK.shape[0])
    if q_THK.shape[2] != k_TGK.shape[2] or q_THK.dtype != k_TGK.dtype:
        raise ValueError(
            f"q and k must share head dim and dtype, got {q_THK.shape[2]} {q_THK.dtype} and "
            f"{k_TGK.shape[2]} {k_TGK.dtype}"
        )
    if (q_weight_K is None) != (k_weight_K is None):
        raise ValueError("norm_rope norms both q and k or neither; give both weights or None for both")
    for weight in (q_weight_K, k_weight_K):
        if weight is not None and weight.shape != q_THK.shape[2:]:
            raise ValueError(f"a head norm's weight must be [{q_THK.shape[2]}], got {tuple(weight.shape)}")
    if rope is not None and rope.cos_TK.shape != (q_THK.shape[0], q_THK.shape[2]):
        raise ValueError(
            f"rope holds angles for {tuple(rope.cos_TK.shape)}; q needs {(q_THK.shape[0], q_THK.shape[2])}"
        )
    if q_weight_K is None and rope is None:
        return q_THK, k_TGK
    misfit = triton_misfit(q_THK, k_TGK) or (f"it needs an even head dim, got {q_THK.shape[2]}" * (q_THK.shape[2] % 2))
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    chosen = not misfit and q_THK.is_cuda and not torch.compiler.is_compiling()
    if impl == "triton" or (impl is None and chosen):
        from pithwood.ops.norm_rope.triton import norm_rope_triton

        return norm_rope_triton(q_THK, k_TGK, q_weight_K, k_weight_K, eps, rope)
    run = norm_rope_ref if impl == "ref" else norm_rope_eager
    return run(q_THK, q_weight_K, eps, rope), run(k_TGK, k_weight_K, eps, rope)
