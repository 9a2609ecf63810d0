"""Packed batches out of a prepared corpus; which samples a step reads is a pure function of (seed, step).

A sample is seq_len consecutive inputs cut from the token stream at multiples of seq_len, with the token after each as
its target. Documents restart at samples and at end-of-text tokens, so nothing attends across either.

Legend: T packed tokens of a batch, N documents of a batch (unused ones empty).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pithwood.data.corpus import Corpus, Split, TokenStream
from pithwood.data.order import sample_order
from pithwood.ops.packing import Packing


@dataclass(frozen=True)
class Batch:
    """Columns of equal length T, and where their documents begin.

    From a token stream: `tokens` [T] int64, `targets` [T] int64 (the next token of the stream), `loss_weight` [T] fp32
    (all ones), `target_bytes` [T] int64 (UTF-8 bytes that the target stands for; 0 for end-of-text).
    """

    columns: dict[str, Tensor]
    packing: Packing

    @property
    def num_tokens(self) -> int:
        return self.packing.num_queries

    def to(self, device: torch.device | str) -> Batch:
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        return Batch(columns, self.packing.to(device))


class BatchSource:
    """Training batches by (step, micro-batch), without state: any order of calls gives the same batches.

    Steps read samples_per_step consecutive places of an endless stream of epochs, each epoch a permutation of all
    samples that is keyed by (seed, epoch). Micro-batch m holds places step * samples_per_step + m * samples_per_batch
    onwards, so the samples of a step do not depend on how it is divided. Up to seq_len tokens at the end of the stream
    are not used.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: Split,
        *,
        seq_len: int,
        samples_per_batch: int,
        seed: int,
        samples_per_step: int | None = None,
        max_docs: int | None = None,
    ) -> None:
        """seq_len: tokens per sample. samples_per_step: default samples_per_batch.
        max_docs: N of every batch, by default the least that is safe.

        raises ValueError if a size is below 1, samples_per_batch does not divide samples_per_step, the split is
        shorter than one sample, or max_docs is below what some batch may need
        """
        per_step = samples_per_batch if samples_per_step is None else samples_per_step
        _check_sizes(seq_len=seq_len, samples_per_batch=samples_per_batch, samples_per_step=per_step)
        if per_step % samples_per_batch:
            raise ValueError(
                f"samples_per_step={per_step} must be a multiple of samples_per_micro_batch={samples_per_batch}"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must be >= 0")
        self.num_samples = (corpus.num_tokens(split) - 1) // seq_len
        """Samples per epoch."""
        if self.num_samples < 1:
            raise ValueError(
                f"seq_len={seq_len} needs {seq_len + 1} tokens, but the {split} split has {corpus.num_tokens(split)}; "
                "lower seq_len or take a larger corpus"
            )
        # Samples do not repeat within an epoch, but a batch may reach over the ends of several.
        epochs = 1 if samples_per_batch == 1 else (samples_per_batch - 2) // self.num_samples + 2
        needed = _most_documents(corpus.stream(split), seq_len, self.num_samples, samples_per_batch, epochs)
        self.max_docs = _checked_max_docs(max_docs, needed, split, seq_len, samples_per_batch)
        """N of every batch."""
        self._cutter = _Cutter(corpus, split, seq_len, self.max_docs)
        self.seq_len = seq_len
        self.samples_per_batch = samples_per_batch
        self.samples_per_step = per_step
        self.seed = seed

    @property
    def tokens_per_epoch(self) -> int:
        return self.num_samples * self.seq_len

    @property
    def batches_per_step(self) -> int:
        return self.samples_per_step // self.samples_per_batch

    def samples(self, step: int, micro: int = 0) -> NDArray[np.int64]:
        """[samples_per_batch] int64: the samples in this micro-batch of this step."""
        if step < 0 or not 0 <= micro < self.batches_per_step:
            raise ValueError(f"step={step} must be >= 0 and micro={micro} in [0, {self.batches_per_step})")
        first = step * self.samples_per_step + micro * self.samples_per_batch
        places = np.arange(first, first + self.samples_per_batch, dtype=np.int64)
        return sample_order(places, self.num_samples, self.seed)

    def batch(self, step: int, micro: int = 0) -> Batch:
        """The micro-batch: T = samples_per_batch * seq_len tokens on the CPU, N = max_docs."""
        return self._cutter.batch([int(sample) for sample in self.samples(step, micro)])


def sequential_batches(
    corpus: Corpus,
    split: Split,
    *,
    seq_len: int,
    samples_per_batch: int,
    max_samples: int | None = None,
    max_docs: int | None = None,
) -> Iterator[Batch]:
    """Batches in the order of the stream in which every token but the very first is a target exactly once, so that the
    sum of `target_bytes` is the size of the split's text.

    The last sample may be shorter than seq_len and the last batch hold fewer samples; nothing is padded. N is the same
    in all batches, whatever max_samples (take only the first so many samples). Arguments are checked at the call.

    raises ValueError if a size is below 1 or max_docs below what some batch may need
    """
    _check_sizes(seq_len=seq_len, samples_per_batch=samples_per_batch)
    num_samples = -(-(corpus.num_tokens(split) - 1) // seq_len)
    needed = _most_documents(corpus.stream(split), seq_len, num_samples, samples_per_batch, epochs=1)
    cutter = _Cutter(corpus, split, seq_len, _checked_max_docs(max_docs, needed, split, seq_len, samples_per_batch))
    if max_samples is not None:
        _check_sizes(max_samples=max_samples)
        num_samples = min(num_samples, max_samples)
    starts = range(0, num_samples, samples_per_batch)
    return (cutter.batch(range(start, min(start + samples_per_batch, num_samples))) for start in starts)


class _Cutter:
    """Cuts samples out of a stream and packs them."""

    def __init__(self, corpus: Corpus, split: Split, seq_len: int, max_docs: int) -> None:
        self.stream: TokenStream = corpus.stream(split)
        self.seq_len = seq_len
        self.max_docs = max_docs
        self.bytes_V = corpus.tokenizer.bytes_per_token()

    def batch(self, samples: list[int] | range) -> Batch:
        inputs, targets, offsets, total = [], [], [0], 0
        for sample in samples:
            start = sample * self.seq_len
            stop = min(start + self.seq_len, len(self.stream) - 1)
            tokens = self.stream.read(start, stop + 1)
            inputs.append(tokens[:-1])
            targets.append(tokens[1:])
            offsets += (total + self.stream.boundaries(start, stop)).tolist()
            total += stop - start
            offsets.append(total)
        assert len(offsets) - 1 <= self.max_docs
        offsets += [total] * (self.max_docs + 1 - len(offsets))
        cu = torch.tensor(offsets, dtype=torch.int64)
        position_T = torch.arange(total) - torch.repeat_interleave(cu[:-1], cu.diff())
        cu = cu.to(torch.int32)
        packing = Packing(cu, cu, self.seq_len, self.seq_len, position_T)
        targets_T = torch.from_numpy(np.concatenate(targets))
        columns = {
            "tokens": torch.from_numpy(np.concatenate(inputs)),
            "targets": targets_T,
            "loss_weight": torch.ones(total, dtype=torch.float32),
            "target_bytes": self.bytes_V[targets_T],
        }
        return Batch(columns, packing)


def _most_documents(stream: TokenStream, seq_len: int, num_samples: int, samples_per_batch: int, epochs: int) -> int:
    """Least N that holds any samples_per_batch of the first num_samples samples, each taken at most `epochs` times.

    O(documents + samples log samples), once per source.
    """
    num_inputs = min(num_samples * seq_len, len(stream) - 1)
    inside = stream.starts[(stream.starts % seq_len != 0) & (stream.starts < num_inputs)]
    counts = 1 + np.bincount(inside // seq_len, minlength=num_samples)
    largest_first = np.sort(counts)[::-1]
    return int(np.repeat(largest_first[:samples_per_batch], epochs)[:samples_per_batch].sum())


def _checked_max_docs(max_docs: int | None, needed: int, split: Split, seq_len: int, samples_per_batch: int) -> int:
    if max_docs is not None and max_docs < needed:
        raise ValueError(
            f"max_docs={max_docs} is too low: a batch of {samples_per_batch} samples of seq_len={seq_len} may hold "
            f"{needed} documents of the {split} split; set max_docs={needed} or leave it out"
        )
    return needed if max_docs is None else max_docs


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
