"""Loss terms that keep the router healthy, and statistics of how evenly the experts are used.

All three balance losses are one sum. Let p_te be token t's probability of expert e (softmax scores; sigmoid scores
divided by their sum over experts), and load_e the expert's share of (token, slot) pairs relative to an even share,

    load_e(S) = E * counts_e(S) / sum_e counts_e(S),        1 for every expert at perfect balance,

taken over a set S of tokens and constant in the backward pass. The term is sum_t sum_e load_e(S(t)) * p_te over the
tokens of the micro-batch, normalised by the tokens of the step. It is 1 at perfect balance, up to E / k when k experts
take everything. With f_e = counts_e / (tokens * k) and P_e = mean of p_te over S this says:

    micro_batch    S = this micro-batch      loss = E * sum_e f_e P_e, weighted by its tokens over the step's tokens
    sequence       S(t) = document of t      loss = E * sum_e f_en P_en per document n, weighted by its length
    global_batch   S = the step up to here   loss = E * sum_e f_e(step) P_e(micro-batch), weighted like micro_batch

micro_batch: Fedus et al. 2021, arXiv 2101.03961, section 2.2, for k = 1. sequence: DeepSeek-AI 2024, "DeepSeek-V3",
arXiv 2412.19437, section 2.1.2. global_batch: Qiu et al. 2025, arXiv 2501.11873, with a buffer of accumulated counts:
exact with one micro-batch per step; otherwise early micro-batches see the counts of fewer tokens, and only the last
sees the whole step. Only `sequence` gives a gradient that does not depend on how whole documents are spread over
micro-batches.

Terms of all layers have one name: their gradients add up over layers, the reported mean is per layer.

Legend: T packed tokens, E experts, k experts per token, N documents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pithwood.losses import LossTerm
from pithwood.moe.config import Balance
from pithwood.ops.packing import Packing
from pithwood.ops.permute import count_pairs


def count_experts(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """[E] int64: (token, slot) pairs per expert; ids of -1 are not counted. No host sync, exact in any order."""
    return count_pairs(ids_Tk, num_experts)


def count_by_document(ids_Tk: Tensor, packing: Packing, num_experts: int) -> Tensor:
    """[N, E] int64: (token, slot) pairs per document and expert; ids of -1 are not counted."""
    ids = ids_Tk.long()
    flat = torch.where(ids < 0, -1, packing.query_doc()[:, None] * num_experts + ids)
    return count_pairs(flat, packing.num_docs * num_experts, impl="ref").view(-1, num_experts)


def balance_loss(
    prob_TE: Tensor,
    ids_Tk: Tensor,
    balance: Balance,
    coef: float,
    packing: Packing | None = None,
    counts: Tensor | None = None,
) -> LossTerm:
    """The balance loss of one micro-batch, as a sum over its tokens; formulas in the module docstring.

    prob_TE         [T, E] fp32   probabilities, rows sum to 1; the gradient flows through these alone
    ids_Tk          [T, k] int    chosen experts, -1 for none
    packing         documents, for "sequence"
    counts          int64         where more was counted than these tokens: [E] of the micro-batch on all processes, [E]
                                  of the step so far, this micro-batch included, for "global_batch", [N, E] of whole
                                  documents for "sequence"; None counts these tokens
    """
    num_tokens, num_experts = prob_TE.shape
    if balance == "none":
        raise ValueError("balance='none' has no loss; choose micro_batch, sequence or global_batch")
    if balance == "sequence":
        if packing is None:
            raise ValueError("balance='sequence' needs the packing that says which document each token belongs to")
        counts_NE = count_by_document(ids_Tk, packing, num_experts) if counts is None else counts
        # Gathering the loads per token instead of summing p per document needs no float scatter: it is deterministic.
        load_TE = _relative_load(counts_NE, prob_TE.dtype)[packing.query_doc()]
        loss_sum = (prob_TE * load_TE).sum()
    else:
        counts_E = count_experts(ids_Tk, num_experts) if counts is None else counts
        loss_sum = prob_TE.sum(0) @ _relative_load(counts_E, prob_TE.dtype)
    return LossTerm("moe_balance", loss_sum, num_tokens, coef)


def z_loss(logits_TE: Tensor, coef: float) -> LossTerm:
    """sum_t logsumexp_e(logits)^2, which keeps router logits small. Zoph et al. 2022, arXiv 2202.08906, equation 5."""
    return LossTerm("moe_z", logits_TE.logsumexp(-1).square().sum(), logits_TE.shape[0], coef)


class LoadStats(NamedTuple):
    """How evenly experts are used; tensors on the counts' device, one value per leading dimension of the counts."""

    max_over_mean: Tensor
    """Largest count over the mean count: 1 is perfect, E means that one expert takes everything."""
    entropy: Tensor
    """Entropy of the shares over log E: 1 is perfect, 0 means that one expert takes everything."""


def load_stats(counts_E: Tensor) -> LoadStats:
    """Statistics of counts [..., E]; zero counts throughout give max_over_mean 0 and entropy 0."""
    counts = counts_E.to(torch.float64 if counts_E.device.type == "cpu" else torch.float32)
    num_experts = counts.shape[-1]
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    entropy = torch.special.entr(share).sum(-1) / math.log(num_experts) if num_experts > 1 else share.sum(-1)
    return LoadStats((share.amax(-1) * num_experts).float(), entropy.float())


def _relative_load(counts: Tensor, dtype: torch.dtype) -> Tensor:
    total = counts.sum(-1, keepdim=True).clamp_min(1)
    return counts.to(dtype) * (counts.shape[-1] / total.to(dtype))
