"""What a run minimises: objectives turn final hidden states and a batch into loss terms.

Legend: T packed tokens, D model width.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.losses import LossTerm


class Head(Protocol):
    """What an objective may ask of a model's output head."""

    def logprob(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """[T] fp32 log-probability of each token's target, computed in chunks."""
        ...

    def nll_sum(self, hidden_TD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
        """Scalar, fp32: the sum of weight * -log p(target) over tokens. What is linear in the log-probabilities, with
        weights [T] that need no gradient and are known beforehand, is cheaper this way than through `logprob`: on a
        GPU the head's logits are made once instead of twice.
        """
        ...


class Objective(abc.ABC):
    """Base of all objectives; a frozen dataclass that derives from it can stand in a run's or a phase's `objective`."""

    @abc.abstractmethod
    def terms(self, hidden_TD: Tensor, head: Head, batch: Batch) -> list[LossTerm]:
        """The terms of one micro-batch: sums and counts, each differentiable."""

    @abc.abstractmethod
    def totals(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        """For each term, its count over all micro-batches of the step, known before the first forward."""


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the next token, averaged over the loss weights of the whole optimizer step."""

    def terms(self, hidden_TD: Tensor, head: Head, batch: Batch) -> list[LossTerm]:
        """One term named "loss": sum of -weight * log p over tokens, counted by the sum of weights."""
        weight_T = batch.columns["loss_weight"]
        return [LossTerm("loss", head.nll_sum(hidden_TD, batch.columns["targets"], weight_T), weight_T.sum())]

    def totals(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        """Counts that normalise the terms over all micro-batches of a step."""
        return {"loss": sum(batch.columns["loss_weight"].sum() for batch in batches)}
