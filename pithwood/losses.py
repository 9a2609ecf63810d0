"""Loss terms and how their gradients enter the graph where they are made.

A step's loss is a sum over names of `coef * (sum over micro-batches of term.sum) / (global count of that name)`. The
counts of a whole optimizer step (all micro-batches, all ranks) are known before its first forward, so each term's
gradient can be scaled correctly at the place where the term arises: no loss has to be carried to the end, and
pipelines, recomputation, chunks and gradient accumulation all give the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LossTerm:
    """One contribution of one micro-batch: a sum and the number of items it was taken over."""

    name: str
    sum: Tensor
    """Scalar, differentiable: the sum over items (tokens), not the mean."""
    count: Tensor | float
    """Number of items in the sum; terms of one name are averaged by the step's total count."""
    coef: float = 1.0


@dataclass
class LossLedger:
    """The counts that normalise one optimizer step, and the running values of its terms (device tensors, no sync)."""

    totals: dict[str, Tensor | float]
    """Global count per term name; a name that is absent is normalised by totals["tokens"], all tokens of the step."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor | float] = field(default_factory=dict)
    coefs: dict[str, float] = field(default_factory=dict)

    def total(self, name: str) -> Tensor | float:
        return self.totals[name] if name in self.totals else self.totals["tokens"]

    def record(self, term: LossTerm) -> None:
        value = term.sum.detach().float()
        self.sums[term.name] = self.sums[term.name] + value if term.name in self.sums else value
        self.counts[term.name] = self.counts.get(term.name, 0.0) + term.count
        self.coefs[term.name] = term.coef

    def add(self, other: LossLedger) -> None:
        """Take over what another ledger of the same step recorded."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
        self.coefs |= other.coefs

    def means(self) -> dict[str, Tensor]:
        """Mean of each recorded term over its own count, coefficient not applied."""
        return {name: value / self.counts[name] for name, value in self.sums.items()}


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss_sum: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_x: Tensor):  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return grad_x, scale, None


def attach_loss(x: Tensor, term: LossTerm, ledger: LossLedger | None) -> Tensor:
    """Return x unchanged; in the backward pass the gradient of `coef * sum / global count` flows into term.sum.

    The caller must use the returned tensor on the path to the step's loss. Without a ledger (evaluation, decoding)
    nothing happens.
    """
    if ledger is None:
        return x
    ledger.record(term)
    if not term.sum.requires_grad:
        return x
    # Filled on the device: a host number copied there would make the host wait for it.
    scale = torch.full((), term.coef, dtype=term.sum.dtype, device=term.sum.device) / ledger.total(term.name)
    return _AttachLoss.apply(x, term.sum, scale.to(term.sum.dtype))
