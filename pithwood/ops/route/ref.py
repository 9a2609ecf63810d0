"""Logits, choice and weights of experts in plain torch; the definition of correct.

Legend: T packed tokens, D model width, E experts, k experts per token, G groups of experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.routing_rule import RoutingRule


def router_logits_ref(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in fp32, or fp64 for fp64 inputs; what is kept of a narrower x is x itself, not its wide copy."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if x_TD.dtype == dtype or torch.compiler.is_compiling():
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))
    return _WideLinear.apply(x_TD, weight_ED)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TE: Tensor):  # type: ignore[override]
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
        return grad_x, (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)


def scores_ref(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """Softmax over the experts, or the sigmoid of each."""
    return logits_TE.softmax(-1) if rule.score == "softmax" else logits_TE.sigmoid()


def select_experts_ref(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor:
    """[T, k] int64, the largest scores (plus bias) of the best groups, best first; ties as torch.topk breaks them."""
    num_tokens = logits_TE.shape[0]
    choice_TE = scores_ref(logits_TE, rule)
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.to(choice_TE.dtype)
    if rule.groups_per_token < rule.num_groups:
        choice_TGe = choice_TE.view(num_tokens, rule.num_groups, -1)
        if rule.group_score == "max":
            group_TG = choice_TGe.amax(-1)
        else:
            group_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        best = group_TG.topk(rule.groups_per_token, dim=-1).indices
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best, False)
        # -inf, not 0: with a bias the scores of an open group may be negative.
        choice_TE = choice_TGe.masked_fill(closed_TG[:, :, None], float("-inf")).view(num_tokens, -1)
    return choice_TE.topk(rule.top_k, dim=-1).indices


def expert_weights_ref(
    logits_TE: Tensor, ids_Tk: Tensor, rule: RoutingRule, with_prob: bool
) -> tuple[Tensor, Tensor | None]:
    """(weight [T, k], probabilities [T, E] if asked), both from the scores without bias."""
    score_TE = scores_ref(logits_TE, rule)
    weight_Tk = score_TE.gather(1, ids_Tk.long().clamp_min(0)).masked_fill(ids_Tk < 0, 0.0)
    if rule.renormalize:
        total = weight_Tk.sum(-1, keepdim=True)
        # A token without experts has total 0; dividing by 1 keeps its weights and their gradients 0.
        weight_Tk = weight_Tk / total.masked_fill(total == 0, 1.0)
    if rule.scale != 1.0:
        weight_Tk = weight_Tk * rule.scale
    if not with_prob:
        return weight_Tk, None
    return weight_Tk, score_TE if rule.score == "softmax" else score_TE / score_TE.sum(-1, keepdim=True)
