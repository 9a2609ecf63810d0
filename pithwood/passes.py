"""One micro-batch's pass: what a process has of it, its loss, and its gradients.

Legend: T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pithwood.data.batches import Batch, cut_batch
from pithwood.losses import LossLedger
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.objectives import Objective
from pithwood.parallel.context import ContextGroup
from pithwood.parallel.mesh import Mesh


@dataclass(frozen=True)
class Local:
    """What this process has of a micro-batch, on its device."""

    batch: Batch
    """Its tokens."""
    cp: ContextGroup | None
    """The processes that have the other tokens of the same samples; None: there are none."""

    @staticmethod
    def of(batch: Batch, mesh: Mesh, device: torch.device) -> Local:
        """From a batch of the data rank, on the host."""
        mine, whole = cut_batch(batch, mesh.cp.rank, mesh.cp.size)
        cp = ContextGroup.of(mesh.cp, whole, mesh.cfg.context)
        return Local(mine.to(device), None if cp is None else cp.to(device))


def forward_backward(
    model: Qwen3MoE,
    objective: Objective,
    batch: Batch,
    ledger: LossLedger,
    dtype: torch.dtype,
    *,
    replay: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
    cp: ContextGroup | None = None,
) -> None:
    """Add one micro-batch's gradients, scaled by the step's global counts, and record its loss terms in the ledger."""
    hidden_TD = model.hidden(
        batch.columns["tokens"], batch.packing, dtype=dtype, ledger=ledger, replay=replay, probe=probe, cp=cp
    )
    loss_of(model, objective, batch, ledger, hidden_TD).backward()


def loss_of(model: Qwen3MoE, objective: Objective, batch: Batch, ledger: LossLedger, hidden_TD: Tensor) -> Tensor:
    """The scalar whose gradient a micro-batch adds: the objective's terms, over the step's global counts; they are
    recorded in the ledger."""
    loss: Tensor | None = None
    for term in objective.terms(hidden_TD, model, batch):
        ledger.record(term)
        part = term.sum * (term.coef / ledger.total(term.name))
        loss = part if loss is None else loss + part
    assert loss is not None
    return loss


def context_fields(ledger: LossLedger, replays: Sequence[Any], probes: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each micro-batch's context."""
    return [{"ledger": ledger, "replay": replay, "probe": probe} for replay, probe in zip(replays, probes, strict=True)]
