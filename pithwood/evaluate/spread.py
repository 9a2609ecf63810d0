"""Validation loss by all processes of a mesh together.

Each data rank takes every so-manyth batch. All run equally many passes of equal size, since their experts and their
pipelines are shared: short batches are filled up with a document of their own that has no weight, and where there are
no more batches such a document is all.

Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.evaluate.loss import loss_fields
from pithwood.ops.packing import Packing
from pithwood.parallel.mesh import Mesh


@torch.no_grad()
def evaluate_on_mesh(
    batches: Iterable[Batch], mesh: Mesh, num_tokens: int, sums_of: Callable[[Batch], Tensor | None]
) -> dict[str, float]:
    """What `evaluate_loss` returns, the same in all processes.

    batches     on the host, the same in all processes, of at most num_tokens tokens each
    num_tokens  T of every pass
    sums_of     `loss_sums` of what this process has of a batch, None where it does not hold the head
    raises      ValueError if there are no batches
    """
    sums = torch.zeros(3, dtype=torch.float64 if mesh.device.type == "cpu" else torch.float32, device=mesh.device)
    for batch in _mine(batches, mesh, num_tokens):
        found = sums_of(batch)
        if found is not None:
            sums += found.to(sums.dtype)
    mesh.tokens.all_reduce(sums)
    mesh.pp.all_reduce(sums)
    return loss_fields(sums)


def _mine(batches: Iterable[Batch], mesh: Mesh, num_tokens: int) -> Iterator[Batch]:
    turn: list[Batch] = []
    for batch in batches:
        turn.append(filled_up(batch, num_tokens))
        if len(turn) == mesh.data.size:
            yield turn[mesh.data.rank]
            turn = []
    if turn:
        empty = {name: torch.zeros_like(column) for name, column in turn[0].columns.items()}
        turn += [Batch(empty, turn[0].packing)] * (mesh.data.size - len(turn))
        yield turn[mesh.data.rank]


def filled_up(batch: Batch, num_tokens: int) -> Batch:
    """A batch of T = num_tokens, with one document more, of zeros without weight (empty if there is no room for it)."""
    missing, packing = num_tokens - batch.num_tokens, batch.packing
    columns = {name: torch.cat([column, column.new_zeros(missing)]) for name, column in batch.columns.items()}
    cu = torch.cat([packing.cu_q, packing.cu_q.new_full((1,), num_tokens)])
    most = max(packing.max_q, missing)
    position_T = torch.cat([packing.position_T, torch.arange(missing, dtype=packing.position_T.dtype)])
    return replace(batch, columns=columns, packing=Packing(cu, cu, most, most, position_T, packing.causal))
