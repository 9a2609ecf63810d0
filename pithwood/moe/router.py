"""Which experts a token goes to, with what weight, and the loss terms that keep the experts evenly used.

Where the tokens of a micro-batch are spread over processes, the loads that balance losses see are those of all of them:
counts are added up over `tokens_group` or, for documents, over `cp_group`. The loss values stay sums over this
process's tokens.

Legend: T packed tokens, D model width, E experts, k experts per token, G expert groups.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from pithwood.attention.base import LayerContext
from pithwood.losses import attach_loss
from pithwood.moe.balance import balance_loss, count_by_document, count_experts, z_loss
from pithwood.moe.config import MoEConfig
from pithwood.ops.route import RoutingRule, expert_weights, router_logits, select_experts
from pithwood.parallel.mesh import Group


class Router(nn.Module):
    """Scores experts with one linear map and selects top_k of them.

    Scores, selection and weights are fp32 (fp64 for fp64 inputs) whatever the activations' dtype: a bf16 logit has 8
    bits, and near ties would be decided by rounding. Ids are discrete; gradients reach the router through the weights,
    which are gathered from the scores at the ids, so replayed ids give exact gradients.
    """

    e_score_correction_bias: Tensor | None
    counts_E: Tensor

    def __init__(self, cfg: MoEConfig, model_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokens_group = Group.alone()
        """The processes that hold the tokens of a micro-batch, in the order of the tokens; whoever builds the model for
        several processes sets it."""
        self.cp_group = Group.alone()
        """Those that share each document."""
        self.rule = RoutingRule(**{field.name: getattr(cfg, field.name) for field in fields(RoutingRule)})
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, model_dim))
        has_bias = cfg.bias_update_rate is not None
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(cfg.num_experts, dtype=torch.float32) if has_bias else None
        )
        # int64: a step of a large run routes more pairs to one expert than fp32 counts exactly.
        self.register_buffer("counts_E", torch.zeros(cfg.num_experts, dtype=torch.int64), persistent=False)

    def route(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """Expert ids and weights of each token, and x_TD with the router's loss terms attached.

        x_TD      [T, D] any float
        returns   ids [T, k] int64, distinct within a token, -1 for none (only by replay);
                  weight [T, k] fp32, 0 where the id is -1;
                  x_TD unchanged in value: use it, not the argument, from here on, or the loss terms have no gradient
        raises    ValueError if replayed ids have another shape than [T, k]

        In training mode the expert counts of this call are added to `counts_E`.
        """
        cfg = self.cfg
        logits_TE = self.logits(x_TD)
        ids_Tk = ctx.decide("experts", lambda: self.select(logits_TE))
        if ids_Tk.shape != (x_TD.shape[0], cfg.top_k):
            raise ValueError(
                f"replayed expert ids of layer {ctx.layer} have shape {tuple(ids_Tk.shape)}; "
                f"expected {(x_TD.shape[0], cfg.top_k)} (tokens, top_k)"
            )
        balanced = ctx.ledger is not None and cfg.balance != "none"
        weight_Tk, prob_TE = expert_weights(logits_TE, ids_Tk, self.rule, with_prob=balanced)

        counting = self.training and ctx.mode == "train"
        if counting and not ctx.recomputing:
            self.counts_E += count_experts(ids_Tk, cfg.num_experts)
        if ctx.ledger is not None:
            if cfg.balance != "none":
                assert prob_TE is not None
                counts = self.balance_counts(ids_Tk, ctx, counting)
                term = balance_loss(prob_TE, ids_Tk, cfg.balance, cfg.balance_coef, ctx.packing, counts)
                x_TD = attach_loss(x_TD, term, ctx.ledger)
            if cfg.z_loss_coef > 0:
                x_TD = attach_loss(x_TD, z_loss(logits_TE, cfg.z_loss_coef), ctx.ledger)
        return ids_Tk, weight_Tk, x_TD

    def balance_counts(self, ids_Tk: Tensor, ctx: LayerContext, counting: bool) -> Tensor | None:
        """The counts that the balance loss takes experts' loads from: [E] int64 or, for "sequence", [N, E]; None where
        the micro-batch at hand is all there is to count.

        What depends on more than the ids at hand is a decision: by the time of a recomputation the step's counts may
        have gone on, and other processes need not be asked twice.
        """
        cfg = self.cfg
        if cfg.balance == "global_batch" and counting:
            return ctx.decide("step_counts", lambda: _added(self.counts_E.clone(), self.tokens_group))
        if cfg.balance == "sequence":
            if self.cp_group.size == 1:
                return None
            counts_NE = lambda: count_by_document(ids_Tk, ctx.packing, cfg.num_experts)  # noqa: E731
            return ctx.decide("document_counts", lambda: _added(counts_NE(), self.cp_group))
        if self.tokens_group.size == 1:
            return None
        return ctx.decide(
            "micro_batch_counts", lambda: _added(count_experts(ids_Tk, cfg.num_experts), self.tokens_group)
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] router logits in fp32, or fp64 for fp64 inputs."""
        return router_logits(x_TD, self.weight)

    @torch.no_grad()
    def select(self, logits_TE: Tensor) -> Tensor:
        """[T, k] int64 ids of the experts with the largest score (plus bias), best first, from the best groups.

        Group limits: DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434, section 2.2.2. Bias: see `update_bias`.
        """
        cfg = self.cfg
        if cfg.routing == "balanced":
            num_tokens = logits_TE.shape[0]
            # numbered over the whole micro-batch, of which each process holds equally many tokens
            pair = torch.arange(num_tokens * cfg.top_k, device=logits_TE.device)
            pair += self.tokens_group.rank * pair.numel()
            return (pair % cfg.num_experts).view(num_tokens, cfg.top_k)
        return select_experts(logits_TE, self.rule, self.e_score_correction_bias)

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Move the selection bias by bias_update_rate towards underused experts; call once after each optimizer step.

        counts_E [E]: (token, slot) pairs per expert over the whole step, all micro-batches and ranks.
        bias_e += rate * sign(mean(counts) - counts_e). Does nothing without a bias.
        Wang et al. 2024, arXiv 2408.15664; DeepSeek-AI 2024, "DeepSeek-V3", arXiv 2412.19437, section 2.1.2.
        """
        rate = self.cfg.bias_update_rate
        if self.e_score_correction_bias is None or rate is None:
            return
        # E * counts - total keeps the sign exact in integers.
        error_E = counts_E.sum() - counts_E * self.cfg.num_experts
        self.e_score_correction_bias += rate * error_E.sign().to(torch.float32)

    def reset_step(self) -> None:
        """Zero the counts; call before each optimizer step's first forward."""
        self.counts_E.zero_()


def _added(counts: Tensor, group: Group) -> Tensor:
    """The counts, added up over the group in place."""
    group.all_reduce(counts)
    return counts
