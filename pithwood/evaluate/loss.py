"""Validation loss in nats per token and bits per byte.

Legend: T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from pithwood.data.batches import Batch
from pithwood.models.qwen3_moe import Qwen3MoE


@torch.no_grad()
def evaluate_loss(model: Qwen3MoE, batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Mean loss over the weighted tokens of all batches.

    returns  loss (nats per token), bits_per_byte (all nats over ln 2 and the bytes that the targets stand for),
             tokens, bytes
    raises   ValueError if a mixer's selection can see the future (perplexity would be too low), or there are no batches
    """
    for layer, block in enumerate(model.blocks):
        if block.self_attn.causality != "strict":
            raise ValueError(
                f"layer {layer}'s mixer is {block.self_attn.causality!r}: its loss is not a perplexity; "
                "evaluate with a strictly causal mixer (a phase with attention of its own switches it)"
            )
    device = model.head_weight.device
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        columns = batch.columns
        hidden_TD = model.hidden(columns["tokens"], batch.packing, dtype=dtype)
        nll_T = -model.logprob(hidden_TD, columns["targets"]).double()
        weight_T = columns["loss_weight"].double()
        sums += torch.stack([(nll_T * weight_T).sum(), weight_T.sum(), (columns["target_bytes"] * weight_T).sum()])
    model.train(was_training)
    nats, tokens, num_bytes = sums.tolist()
    if tokens == 0:
        raise ValueError("nothing to evaluate: no validation tokens; raise data.validation_fraction")
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / max(num_bytes, 1.0),
        "tokens": int(tokens),
        "bytes": int(num_bytes),
    }
