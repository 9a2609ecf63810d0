"""Which samples a step reads, for any number of parts and lengths: a pure function of (seed, step).

A run is a row of stages; inside one the sequence length and the shares of the parts are constant. Every part is cut at
multiples of the longest length of all stages into spans, and an epoch of a part is a permutation of its spans. A stage
with shorter samples takes its spans from that same order, cuts each into samples, and reads these in an order of their
own. So text is read once an epoch, at whatever length it is read.

Legend: n samples asked for, S stages, M parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pithwood.data.interleave import Interleave
from pithwood.data.order import distinct, permute, sample_order


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one sequence length and one mixture."""

    until_step: int
    """First step after the stage."""
    seq_len: int
    """Tokens per sample."""
    samples_per_step: int
    samples_per_batch: int
    """Samples per micro-batch; divides samples_per_step."""
    shares: tuple[Fraction, ...] = (Fraction(1),)
    """Share of the samples that each part gives; their sum is 1."""


@dataclass(frozen=True)
class PartUsage:
    """What a run reads of one part."""

    samples: tuple[int, ...]
    """[S] samples in each stage."""
    tokens: int
    """Over all stages."""
    epochs: float
    """Passes over the part's spans, those that a stage leaves partly read counted by what was read."""


class Curriculum:
    """The samples of every step, without state: any order of calls gives the same ones.

    A stage reads consecutive places of the schedule that gives each part its share (`Interleave`). Micro-batch m holds
    places step * samples_per_step + m * samples_per_batch onwards, counted from the stage's first step, so the samples
    of a step do not depend on how it is divided. Up to one longest sample at the end of a part is not used, and as much
    may stay unread where a stage with shorter samples ends.
    """

    def __init__(self, num_tokens: Sequence[int], names: Sequence[str], stages: Sequence[Stage], seed: int) -> None:
        """num_tokens: of each part. names: of each part, keys of their orders; "" for a corpus that is no mixture.

        raises ValueError if a size is below 1, stages do not follow each other, a length does not divide the longest,
        or a part is shorter than one longest sample
        """
        assert len(num_tokens) == len(names) > 0
        _check_stages(stages, len(names))
        if seed < 0:
            raise ValueError(f"seed={seed} must be >= 0")
        self.stages, self.names, self.seed = tuple(stages), tuple(names), seed
        self.batches_per_step = stages[0].samples_per_step // stages[0].samples_per_batch
        """Micro-batches of a step, the same in all stages."""
        self.span_len = max(stage.seq_len for stage in stages)
        """Tokens of a span: the longest seq_len of all stages."""
        self.num_spans = [(tokens - 1) // self.span_len for tokens in num_tokens]
        """[M] spans of each part: its epoch."""
        for name, tokens, spans in zip(names, num_tokens, self.num_spans, strict=True):
            if spans < 1:
                raise ValueError(
                    f"seq_len={self.span_len} needs {self.span_len + 1} tokens, but the train split "
                    f"{f'of part {name!r} ' if name else ''}has {tokens}; lower seq_len or take a larger corpus"
                )
        self._schedules = [Interleave(stage.shares) for stage in stages]
        self._first_steps = [0, *(stage.until_step for stage in stages[:-1])]
        self._first_spans = [[0] * len(names)]
        """[S][M] place in its stream of epochs at which each part enters each stage."""
        for number, stage in enumerate(stages[:-1]):
            places = (stage.until_step - self._first_steps[number]) * stage.samples_per_step
            pieces = self.span_len // stage.seq_len
            counts = self._schedules[number].counts(places)
            begun = zip(self._first_spans[-1], counts, strict=True)
            self._first_spans.append([first + -(-count // pieces) for first, count in begun])

    def stage_index(self, step: int) -> int:
        """The stage that a step belongs to; steps after the last stage's end belong to it."""
        return next((i for i, stage in enumerate(self.stages) if step < stage.until_step), len(self.stages) - 1)

    def settings(self, step: int) -> dict[str, Any]:
        """The length and mixture in force at a step, as plain JSON: seq_len, and shares by part if there are parts."""
        stage = self.stages[self.stage_index(step)]
        shares = {name: float(share) for name, share in zip(self.names, stage.shares, strict=True) if name}
        return {"seq_len": stage.seq_len, **({"shares": shares} if shares else {})}

    def samples(self, step: int, micro: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part [n] and the first token in it [n] of the samples of a micro-batch, both int64."""
        index = self.stage_index(step)
        stage = self.stages[index]
        if step < 0 or not 0 <= micro < self.batches_per_step:
            raise ValueError(f"step={step} must be >= 0 and micro={micro} in [0, {self.batches_per_step})")
        first = (step - self._first_steps[index]) * stage.samples_per_step + micro * stage.samples_per_batch
        places = np.arange(first, first + stage.samples_per_batch, dtype=np.int64)
        part_n, turn_n = self._schedules[index].turns(places)
        start_n = np.empty_like(turn_n)
        for part in distinct(part_n):
            chosen = part_n == part
            start_n[chosen] = self._starts(index, part, turn_n[chosen])
        return part_n, start_n

    def most_in_batch(self, index: int, part: int) -> int:
        """A bound on the samples of a part in one micro-batch of a stage."""
        return self._schedules[index].most(self.stages[index].samples_per_batch)[part]

    def usage(self, steps: int) -> list[PartUsage]:
        """[M] what `steps` steps read of each part."""
        result = []
        counts_SM = [self._counts(index, steps) for index in range(len(self.stages))]
        for part, spans in enumerate(self.num_spans):
            samples = tuple(counts[part] for counts in counts_SM)
            last = max((i for i, first in enumerate(self._first_steps) if first < steps), default=0)
            read = Fraction(samples[last] * self.stages[last].seq_len, self.span_len)
            result.append(
                PartUsage(
                    samples,
                    sum(count * stage.seq_len for count, stage in zip(samples, self.stages, strict=True)),
                    float((self._first_spans[last][part] + read) / spans),
                )
            )
        return result

    def _counts(self, index: int, steps: int) -> list[int]:
        """[M] samples of each part in a stage, cut off after `steps` steps of the run."""
        end = steps if index == len(self.stages) - 1 else min(steps, self.stages[index].until_step)
        done = max(end - self._first_steps[index], 0)
        return self._schedules[index].counts(done * self.stages[index].samples_per_step)

    def _starts(self, index: int, part: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens of a part's samples, by how many of the part came before them in the stage."""
        seq_len, spans = self.stages[index].seq_len, self.num_spans[part]
        key = f"{self.seed}/{self.names[part]}" if self.names[part] else str(self.seed)
        first = self._first_spans[index][part]
        pieces = self.span_len // seq_len
        if pieces == 1:
            return sample_order(first + turns, spans, key) * self.span_len
        end = self._first_spans[index + 1][part] if index + 1 < len(self.stages) else None
        place = first * pieces + turns
        starts = np.empty_like(turns)
        epochs = place // (spans * pieces)
        for epoch in distinct(epochs):
            chosen = epochs == epoch
            # The spans that the stage takes from this epoch; their pieces are read in an order of their own, or the
            # pieces of one span would follow each other.
            low = max(first, epoch * spans)
            high = (epoch + 1) * spans if end is None else min(end, (epoch + 1) * spans)
            piece = permute(place[chosen] - low * pieces, (high - low) * pieces, f"{key}/{epoch}/pieces{index}")
            span = sample_order(low + piece // pieces, spans, key)
            starts[chosen] = span * self.span_len + piece % pieces * seq_len
        return starts


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ValueError unless every length divides the longest."""
    longest = max(lengths)
    for length in lengths:
        if longest % length:
            below = max(n for n in range(1, length) if longest % n == 0)
            above = min(n for n in range(length, longest + 1) if longest % n == 0)
            raise ValueError(
                f"seq_len={length} must divide the longest seq_len of the run, {longest}, so that both cut the text at "
                f"the same places; try {below} or {above}"
            )


def _check_stages(stages: Sequence[Stage], num_parts: int) -> None:
    last = 0
    for stage in stages:
        assert len(stage.shares) == num_parts
        sizes = {
            "seq_len": stage.seq_len,
            "samples_per_batch": stage.samples_per_batch,
            "samples_per_step": stage.samples_per_step,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if stage.samples_per_step % stage.samples_per_batch:
            raise ValueError(
                f"samples_per_step={stage.samples_per_step} must be a multiple of "
                f"samples_per_micro_batch={stage.samples_per_batch}"
            )
        if stage.until_step <= last:
            raise ValueError(f"stages must have rising until_step, given {[s.until_step for s in stages]}")
        last = stage.until_step
    assert len({stage.samples_per_step // stage.samples_per_batch for stage in stages}) == 1
    check_lengths([stage.seq_len for stage in stages])
