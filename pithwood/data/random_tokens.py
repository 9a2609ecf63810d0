"""Random tokens in the shape of a run's batches: what a benchmark trains on where no text is at hand.

Legend: T packed tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pithwood.data.batches import Batch
from pithwood.data.curriculum import Stage
from pithwood.ops.packing import Packing


class RandomTokens:
    """Batches of uniformly random ids, one document per sample, by (seed, step, micro-batch) as `TrainingBatches`."""

    def __init__(self, stages: Sequence[Stage], *, vocab_size: int, seed: int) -> None:
        """stages: the run's, in order; the last lasts for ever. vocab_size: ids lie below it."""
        self._stages, self._vocab_size, self._seed = tuple(stages), vocab_size, seed

    def batch(self, step: int, micro: int = 0) -> Batch:
        """The micro-batch, on the CPU, with the columns of one from a token stream; a target stands for one byte."""
        stage = self._stage(step)
        tokens = stage.seq_len * stage.samples_per_batch
        draw = torch.Generator().manual_seed(hash((self._seed, step, micro)) % 2**63)
        ids = torch.randint(self._vocab_size, (tokens + 1,), generator=draw)
        columns = {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "loss_weight": torch.ones(tokens),
            "target_bytes": torch.ones(tokens, dtype=torch.int64),
        }
        return Batch(columns, Packing.from_lengths([stage.seq_len] * stage.samples_per_batch))

    def step(self, step: int) -> list[Batch]:
        """All micro-batches of a step."""
        stage = self._stage(step)
        return [self.batch(step, micro) for micro in range(stage.samples_per_step // stage.samples_per_batch)]

    def _stage(self, step: int) -> Stage:
        return next((stage for stage in self._stages if step < stage.until_step), self._stages[-1])
