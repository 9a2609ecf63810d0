"""Validation loss of a run's data: of a corpus, or of each part of a mixture and of their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch

from pithwood.data.batches import Batch, sequential_batches
from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture, corpora_of
from pithwood.evaluate.loss import evaluate_loss
from pithwood.models.qwen3_moe import Qwen3MoE


def evaluate_data(
    model: Qwen3MoE,
    data: Corpus | Mixture,
    *,
    seq_len: int,
    samples_per_batch: int,
    max_samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    evaluate: Callable[[Iterable[Batch]], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Loss on the validation split; of a mixture on each part's, at most max_samples samples of each.

    evaluate  what stands in for `evaluate_loss` of this model, where it is spread over processes

    returns  loss (nats per token), bits_per_byte, tokens, bytes; for a mixture also `loss/<part>` and
             `bits_per_byte/<part>` of each part

    The overall loss of a mixture is the parts' mean by their shares in `data`, whatever a phase sets, and its bits per
    byte are those nats over the bytes of the same tokens: the numbers of a validation text mixed like the samples.
    """
    results = {
        name: (partial(evaluate_loss, model, dtype=dtype) if evaluate is None else evaluate)(
            sequential_batches(
                corpus, "validation", seq_len=seq_len, samples_per_batch=samples_per_batch, max_samples=max_samples
            )
        )
        for name, corpus in corpora_of(data).items()
    }
    if not isinstance(data, Mixture):
        return next(iter(results.values()))
    nats = sum(share * results[name]["loss"] for name, share in data.shares.items())
    num_bytes = sum(share * results[name]["bytes"] / results[name]["tokens"] for name, share in data.shares.items())
    return {
        "loss": nats,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": sum(result["tokens"] for result in results.values()),
        "bytes": sum(result["bytes"] for result in results.values()),
        **{f"{key}/{name}": result[key] for name, result in results.items() for key in ("loss", "bits_per_byte")},
    }


def losses(result: dict[str, float]) -> dict[str, float]:
    """The fields of a validation event: all losses and bits per byte."""
    return {name: value for name, value in result.items() if name.partition("/")[0] in ("loss", "bits_per_byte")}
