"""Random tokens in the shape of a run's batches: what a benchmark trains on where no text is at hand.

Legend: T packed tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pithwood.data.batches import Batch, share_of
from pithwood.data.curriculum import Stage
from pithwood.ops.packing import Packing


class RandomTokens:
    """Batches of uniformly random ids, one document per sample, by (seed, step, micro-batch) as `TrainingBatches`."""

    def __init__(self, stages: Sequence[Stage], *, vocab_size: int, seed: int) -> None:
        """stages: the run's, in order; the last lasts for ever. vocab_size: ids lie below it."""
        self._stages, self._vocab_size, self._seed = tuple(stages), vocab_size, seed

    def batch(self, step: int, micro: int = 0, share: tuple[int, int] = (0, 1)) -> Batch:
        """The micro-batch, or a share of its samples, on the CPU, with the columns of one from a token stream; a target
        stands for one byte."""
        stage = self._stage(step)
        tokens = stage.seq_len * stage.samples_per_batch
        draw = torch.Generator().manual_seed(hash((self._seed, step, micro)) % 2**63)
        ids = torch.randint(self._vocab_size, (tokens + 1,), generator=draw)
        mine = share_of(stage.samples_per_batch, share)
        first, tokens = mine.start * stage.seq_len, (mine.stop - mine.start) * stage.seq_len
        columns = {
            "tokens": ids[first : first + tokens],
            "targets": ids[first + 1 : first + tokens + 1],
            "loss_weight": torch.ones(tokens),
            "target_bytes": torch.ones(tokens, dtype=torch.int64),
        }
        return Batch(columns, Packing.from_lengths([stage.seq_len] * (mine.stop - mine.start)))

    def step(self, step: int, share: tuple[int, int] = (0, 1)) -> list[Batch]:
        """All micro-batches of a step, or the given share of each."""
        stage = self._stage(step)
        return [self.batch(step, micro, share) for micro in range(stage.samples_per_step // stage.samples_per_batch)]

    def _stage(self, step: int) -> Stage:
        return next((stage for stage in self._stages if step < stage.until_step), self._stages[-1])
