"""How long the passes of a pipeline take with the waiting for each other: its schedule, played through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pithwood.parallel.config import MeshConfig
from pithwood.parallel.schedule import Action, Pair, parts_of, pipeline_actions, simulate

SHARES = {"forward": 0.3, "inputs": 0.45, "weights": 0.25, "backward": 0.7}
"""Of a layer's time without recomputation, by pass: a product takes as long in each, attention has no weights, and its
backward pass takes 2.5 times its forward pass."""


class StageMs(NamedTuple):
    """One stage's passes of one micro-batch, in ms."""

    layers: float
    """Forward and backward, what is computed once."""
    again: float
    """What the backward pass computes once more."""
    head: float
    """Head and loss, all of it in the forward pass; 0 but in the last stage."""

    def of(self, kind: str) -> float:
        """Of one pass: forward, backward, inputs, weights."""
        repeats = self.again if kind in ("backward", "inputs") else 0.0
        return SHARES[kind] * self.layers + repeats + (self.head if kind == "forward" else 0.0)


def pipeline_ms(mesh: MeshConfig, micro_batches: int, stages: Sequence[StageMs], send_ms: float) -> float:
    """From the first pass of a step to the end of the last one, on all processes of a pipeline.

    stages   of each stage, in order
    send_ms  of what travels between two processes, once; senders do not wait
    """
    lists = [pipeline_actions(mesh, rank, micro_batches) for rank in range(mesh.pp)]

    def milliseconds(step: Action | Pair) -> float:
        return sum(stages[part.stage].of(part.kind) for part in parts_of(step))

    return simulate(lists, milliseconds, send_ms).total
