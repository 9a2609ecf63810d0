"""Packed batches out of a prepared corpus or mixture; which samples a step reads is a pure function of (seed, step).

A sample is seq_len consecutive inputs cut from a token stream at multiples of seq_len, with the token after each as
its target. Documents restart at samples and at their beginnings, so nothing attends across either.

Legend: T packed tokens of a batch, N documents of a batch (unused ones empty), n samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pithwood.data.corpus import Corpus, Split, TokenStream
from pithwood.data.curriculum import Curriculum, Stage
from pithwood.data.documents import KeptDocuments
from pithwood.ops.packing import Packing, sent
from pithwood.parallel.context import local_packing


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
        columns = {name: sent(column, device) for name, column in self.columns.items()}
        return Batch(columns, self.packing.to(device))


def cut_batch(batch: Batch, cp_rank: int, cp_size: int) -> tuple[Batch, Packing]:
    """The cp_rank-th of cp_size equal runs of a batch's tokens, and the packing of all of them.

    The part's documents keep their numbers, empty where they lie elsewhere, and its tokens their positions.
    raises ValueError if cp_size does not divide T
    """
    if cp_size == 1:
        return batch, batch.packing
    packing = local_packing(batch.packing, cp_rank, cp_size)
    rows = slice(cp_rank * packing.num_queries, (cp_rank + 1) * packing.num_queries)
    return Batch({name: column[rows] for name, column in batch.columns.items()}, packing), batch.packing


class TrainingBatches:
    """Training batches by (step, micro-batch), without state: any order of calls gives the same batches.

    Which samples they hold is the `Curriculum`'s to say. T, the bounds of the packing and N are constant in a stage.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream | KeptDocuments],
        stages: Sequence[Stage],
        *,
        bytes_V: Tensor,
        seed: int,
        max_docs: int | None = None,
    ) -> None:
        """streams: by the names of the parts, in the order of each stage's shares; "" for a corpus that is no mixture.
        bytes_V [vocabulary] int64: bytes that a token stands for. max_docs: N, by default the least that is safe in
        each stage.

        raises ValueError for what `Curriculum` refuses, and if max_docs is below what some batch may need
        """
        self.curriculum = Curriculum([len(stream) for stream in streams.values()], list(streams), stages, seed)
        self._streams = list(streams.values())
        self.max_docs_of_stage = [
            _checked_max_docs(max_docs, self._documents_needed(index), stage.seq_len, stage.samples_per_batch)
            for index, stage in enumerate(self.curriculum.stages)
        ]
        """N of every batch of each stage."""
        self._bytes_V = bytes_V

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of a step, the same in all stages."""
        return self.curriculum.batches_per_step

    def batch(self, step: int, micro: int = 0, share: tuple[int, int] = (0, 1)) -> Batch:
        """The micro-batch: T = samples_per_batch * seq_len tokens on the CPU, N = the stage's max_docs.

        share  (index, parts): only the index-th of equal parts of its samples, in order, and of T
        """
        part_n, start_n = self.curriculum.samples(step, micro)
        mine = share_of(len(part_n), share)
        part_n, start_n = part_n[mine], start_n[mine]
        index = self.curriculum.stage_index(step)
        seq_len = self.curriculum.stages[index].seq_len
        samples = [
            (self._streams[part], start, start + seq_len)
            for part, start in zip(part_n.tolist(), start_n.tolist(), strict=True)
        ]
        return _cut(samples, seq_len, self.max_docs_of_stage[index], self._bytes_V)

    def step(self, step: int, share: tuple[int, int] = (0, 1)) -> list[Batch]:
        """All micro-batches of a step, or the given share of each."""
        return [self.batch(step, micro, share) for micro in range(self.batches_per_step)]

    def _documents_needed(self, index: int) -> int:
        """Least N known to hold every batch of a stage; O(documents + samples log samples)."""
        stage = self.curriculum.stages[index]
        most = []
        for part, stream in enumerate(self._streams):
            taken = self.curriculum.most_in_batch(index, part)
            if taken:
                num_samples = self.curriculum.num_spans[part] * self.curriculum.span_len // stage.seq_len
                # Samples do not repeat within an epoch, but a batch may reach over the ends of several.
                epochs = 1 if taken == 1 else (taken - 2) // num_samples + 2
                most.append(_most_documents(stream, stage.seq_len, num_samples, taken, epochs))
        return int(np.sort(np.concatenate(most))[::-1][: stage.samples_per_batch].sum())


def share_of(num_samples: int, share: tuple[int, int]) -> slice:
    """The samples of a micro-batch that are the index-th of `parts` equal parts; share: (index, parts)."""
    index, parts = share
    if num_samples % parts:
        raise ValueError(f"{num_samples} samples of a micro-batch cannot be divided into {parts} equal parts")
    return slice(index * num_samples // parts, (index + 1) * num_samples // parts)


class BatchSource(TrainingBatches):
    """Training batches of one corpus at one length."""

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
        super().__init__(
            {"": corpus.stream(split)},
            [Stage(1, seq_len, per_step, samples_per_batch)],
            bytes_V=corpus.tokenizer.bytes_per_token(),
            seed=seed,
            max_docs=max_docs,
        )
        self.seq_len, self.samples_per_step = seq_len, per_step
        (self.max_docs,) = self.max_docs_of_stage
        (self.num_samples,) = self.curriculum.num_spans
        """Samples per epoch."""

    @property
    def tokens_per_epoch(self) -> int:
        return self.num_samples * self.seq_len

    def samples(self, step: int, micro: int = 0) -> NDArray[np.int64]:
        """[n] int64: the samples in this micro-batch of this step."""
        return self.curriculum.samples(step, micro)[1] // self.seq_len


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
    stream, bytes_V = corpus.stream(split), corpus.tokenizer.bytes_per_token()
    last = len(stream) - 1
    num_samples = -(-last // seq_len)
    needed = int(_most_documents(stream, seq_len, num_samples, samples_per_batch, epochs=1).sum())
    num_docs = _checked_max_docs(max_docs, needed, seq_len, samples_per_batch)
    if max_samples is not None:
        _check_sizes(max_samples=max_samples)
        num_samples = min(num_samples, max_samples)
    starts = [number * seq_len for number in range(num_samples)]
    samples = [(stream, start, min(start + seq_len, last)) for start in starts]
    batches = (samples[first : first + samples_per_batch] for first in range(0, num_samples, samples_per_batch))
    return (_cut(batch, seq_len, num_docs, bytes_V) for batch in batches)


def _cut(
    samples: Sequence[tuple[TokenStream | KeptDocuments, int, int]], seq_len: int, max_docs: int, bytes_V: Tensor
) -> Batch:
    """Pack samples, each tokens [start, stop) of a stream."""
    inputs, targets, offsets, total = [], [], [0], 0
    for stream, start, stop in samples:
        tokens = stream.read(start, stop + 1)
        inputs.append(tokens[:-1])
        targets.append(tokens[1:])
        offsets += (total + stream.boundaries(start, stop)).tolist()
        total += stop - start
        offsets.append(total)
    assert len(offsets) - 1 <= max_docs
    offsets += [total] * (max_docs + 1 - len(offsets))
    cu = torch.tensor(offsets, dtype=torch.int64)
    position_T = torch.arange(total) - torch.repeat_interleave(cu[:-1], cu.diff())
    cu = cu.to(torch.int32)
    packing = Packing(cu, cu, seq_len, seq_len, position_T)
    targets_T = torch.from_numpy(np.concatenate(targets))
    columns = {
        "tokens": torch.from_numpy(np.concatenate(inputs)),
        "targets": targets_T,
        "loss_weight": torch.ones(total, dtype=torch.float32),
        "target_bytes": bytes_V[targets_T],
    }
    return Batch(columns, packing)


def _most_documents(
    stream: TokenStream | KeptDocuments, seq_len: int, num_samples: int, taken: int, epochs: int
) -> NDArray[np.int64]:
    """[<= taken] documents in the fullest of the first num_samples samples, each sample at most `epochs` times."""
    num_inputs = min(num_samples * seq_len, len(stream) - 1)
    inside = stream.starts[(stream.starts % seq_len != 0) & (stream.starts < num_inputs)]
    counts = 1 + np.bincount(inside // seq_len, minlength=num_samples)
    return np.repeat(np.sort(counts)[::-1][:taken], epochs)[:taken]


def _checked_max_docs(max_docs: int | None, needed: int, seq_len: int, samples_per_batch: int) -> int:
    if max_docs is not None and max_docs < needed:
        raise ValueError(
            f"max_docs={max_docs} is too low: a batch of {samples_per_batch} samples of seq_len={seq_len} may hold "
            f"{needed} documents; set max_docs={needed} or leave it out"
        )
    return needed if max_docs is None else max_docs


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
