"""Validation loss in nats per token and bits per byte.

Legend: T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.models.qwen3_moe import Qwen3MoE


def evaluate_loss(model: Qwen3MoE, batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Mean loss over the weighted tokens of all batches.

    returns  loss (nats per token), bits_per_byte (all nats over ln 2 and the bytes that the targets stand for),
             tokens, bytes
    raises   ValueError if a mixer's selection can see the future (perplexity would be too low), or there are no batches
    """
    check_strictly_causal(model)
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for batch, nll_T in token_losses(model, batches, dtype):
        sums += loss_sums(batch, nll_T)
    return loss_fields(sums)


def loss_sums(batch: Batch, nll_T: Tensor) -> Tensor:
    """[3] fp64: nats, tokens and bytes of a batch, weighted."""
    weight_T = batch.columns["loss_weight"].double()
    num_bytes = (batch.columns["target_bytes"] * weight_T).sum()
    return torch.stack([(nll_T * weight_T).sum(), weight_T.sum(), num_bytes])


def loss_fields(sums: Tensor) -> dict[str, float]:
    """What `evaluate_loss` returns, of the sums over everything."""
    nats, tokens, total_bytes = sums.tolist()
    if tokens == 0:
        raise ValueError("nothing to evaluate: no validation tokens; raise data.validation_fraction")
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / max(total_bytes, 1.0),
        "tokens": int(tokens),
        "bytes": int(total_bytes),
    }


@torch.no_grad()
def token_losses(
    model: Qwen3MoE, batches: Iterable[Batch], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch on the model's device, with its losses [T] fp64 in nats; the model's mode is put back at the end."""
    device = model.device
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = batch.to(device)
            hidden_TD = model.hidden(batch.columns["tokens"], batch.packing, dtype=dtype)
            yield batch, -model.logprob(hidden_TD, batch.columns["targets"]).double()
    finally:
        model.train(was_training)


def check_strictly_causal(model: Qwen3MoE) -> None:
    """Raise ValueError if the loss of one of the mixers is not a perplexity."""
    for layer, block in enumerate(model.blocks):
        if block.self_attn.causality != "strict":
            raise ValueError(
                f"layer {layer}'s mixer is {block.self_attn.causality!r}: its loss is not a perplexity; "
                "evaluate with a strictly causal mixer (a phase with attention of its own switches it)"
            )
