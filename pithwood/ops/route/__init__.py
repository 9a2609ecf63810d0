"""The router's three questions: how much each token wants each expert, which it gets, and with what weight.

Legend: T packed tokens, D model width, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.route.ref import expert_weights_ref, router_logits_ref, select_experts_ref
from pithwood.ops.routing_rule import RoutingRule
from pithwood.ops.triton_support import triton_misfit

__all__ = ["RoutingRule", "expert_weights", "router_logits", "select_experts"]

MAX_EXPERTS = 1024
"""Most experts of one token's scores that a program of the kernels holds."""
MAX_SLOTS = 16
MAX_GROUPS = 16


def router_logits(x_TD: Tensor, weight_ED: Tensor, *, impl: str | None = None) -> Tensor:
    """x W^T as exact as fp32 makes it, whatever the dtype of x; differentiable.

    x_TD        [T, D] float
    weight_ED   [E, D] fp32 (fp64 for fp64 inputs)
    impl        "ref": a product in fp32, or fp64. "split": for bf16 x and fp32 weights on CUDA, on tensor cores: the
                weight is the sum of three bf16 numbers to its last bit, products of bf16 numbers are exact in fp32, and
                sums are fp32. Gradients take two parts of each factor (relative error 2**-16). None: "split" where it
                fits, else "ref".
    returns     [T, E] fp32, or fp64
    raises      ValueError if the widths differ, or "split" does not fit
    """
    check_impl(impl, ("ref", "split"))
    if x_TD.dim() != 2 or weight_ED.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise ValueError(
            f"x {tuple(x_TD.shape)} must be [T, D] and the router's weight {tuple(weight_ED.shape)} [E, D]"
        )
    fits = x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32
    # cuBLAS wants rows of 16 bytes
    fits = fits and x_TD.shape[1] % 8 == 0 and weight_ED.shape[0] % 8 == 0 and triton_misfit(x_TD) is None
    if impl == "split" and not fits:
        raise ValueError(
            f"impl='split' takes bf16 on CUDA, fp32 weights and multiples of 8, not {x_TD.dtype} on "
            f"{x_TD.device.type}, {weight_ED.dtype} weights {tuple(weight_ED.shape)}; use impl='ref'"
        )
    if fits and impl != "ref":
        from pithwood.ops.route import split

        return split.router_logits(x_TD, weight_ED)
    return router_logits_ref(x_TD, weight_ED)


@torch.no_grad()
def select_experts(
    logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """The experts with the largest score (plus bias) among those of the best groups, best first.

    logits_TE   [T, E] fp32 or fp64
    bias_E      [E] fp32, added to the scores for the choice only
    impl        "ref": any size; ties as torch.topk breaks them. "triton": fp32, up to 1024 experts, 16 slots and 16
                groups, one launch; ties go to the expert, and the group, of the lower number. None: "triton" where it
                fits on CUDA, else "ref"
    returns     [T, k] int64, distinct within a token
    raises      ValueError if "triton" does not fit
    """
    check_impl(impl, ("ref", "triton"))
    if _use_triton(impl, logits_TE, rule):
        from pithwood.ops.route import triton

        return triton.select_experts(
            logits_TE, bias_E, rule.top_k, rule.score == "sigmoid",
            rule.num_groups, rule.groups_per_token, rule.group_score == "top2_sum",
        )  # fmt: skip
    return select_experts_ref(logits_TE, rule, bias_E)


def expert_weights(
    logits_TE: Tensor, ids_Tk: Tensor, rule: RoutingRule, *, with_prob: bool = False, impl: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weights of the chosen experts from the scores without bias, and what balance losses read; differentiable.

    logits_TE   [T, E] fp32 or fp64
    ids_Tk      [T, k] int, -1 for none
    with_prob   whether to return the probabilities
    impl        as of `select_experts`; "triton" computes values and gradients in one launch each
    returns     weight [T, k], 0 where the id is -1; probabilities [T, E] (softmax scores; sigmoid scores over their
                sum) or None; in the dtype of the logits
    raises      ValueError if "triton" does not fit
    """
    check_impl(impl, ("ref", "triton"))
    if _use_triton(impl, logits_TE, rule):
        from pithwood.ops.route import triton

        weight_Tk, prob_TE = triton.expert_weights(
            logits_TE, ids_Tk, rule.score == "sigmoid", rule.renormalize, rule.scale, with_prob
        )
        return weight_Tk, prob_TE if with_prob else None
    return expert_weights_ref(logits_TE, ids_Tk, rule, with_prob)


def _use_triton(impl: str | None, logits_TE: Tensor, rule: RoutingRule) -> bool:
    misfit = triton_misfit(logits_TE)
    if not misfit and logits_TE.dtype != torch.float32:
        misfit = f"logits are fp32, got {logits_TE.dtype}"
    elif logits_TE.shape[1] > MAX_EXPERTS or rule.top_k > MAX_SLOTS or rule.num_groups > MAX_GROUPS:
        misfit = (
            f"{logits_TE.shape[1]} experts, top_k={rule.top_k}, num_groups={rule.num_groups}; "
            f"at most {MAX_EXPERTS}, {MAX_SLOTS} and {MAX_GROUPS}"
        )
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='ref'")
    return bool(impl == "triton" or (impl is None and logits_TE.is_cuda and not misfit))
