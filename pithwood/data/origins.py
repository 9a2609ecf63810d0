"""Where the tokens of a training step come from: samples, their documents, their text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pithwood.data.batches import TrainingBatches
from pithwood.data.corpus import DOCUMENTS, Corpus, TokenStream
from pithwood.data.documents import KeptDocuments
from pithwood.data.mixture import Mixture, corpora_of, training_streams

MOST_BYTES = 1 << 28
"""Size of documents.jsonl up to which names are looked up: a reading of under two seconds."""


def step_origins(source: TrainingBatches, data: Corpus | Mixture, step: int) -> list[list[dict[str, Any]]]:
    """The samples of each micro-batch of a step (from 0), each {part, sample, documents}.

    part       its name; only in a mixture
    sample     its number: it holds the tokens [sample * seq_len, (sample + 1) * seq_len] of the training stream, of
               which documents that the part leaves out are no part
    documents  names of the documents that it holds a part of, or their numbers where the corpus knows no names
    """
    curriculum = source.curriculum
    seq_len = curriculum.stages[curriculum.stage_index(step)].seq_len
    batches = [
        [(int(part), int(start)) for part, start in zip(*curriculum.samples(step, micro), strict=True)]
        for micro in range(source.batches_per_step)
    ]
    corpora = list(corpora_of(data).items())
    documents: dict[tuple[int, int], list[int]] = {}
    for part, stream in enumerate(training_streams(data, curriculum.span_len).values()):
        numbers = _document_numbers(corpora[part][1], stream, curriculum.span_len)
        for sample in {sample for batch in batches for sample in batch if sample[0] == part}:
            first = int(np.searchsorted(stream.starts, sample[1], side="right")) - 1
            last = int(np.searchsorted(stream.starts, sample[1] + seq_len, side="left"))
            documents[sample] = numbers[first:last].tolist()
    names = [
        document_names(corpus, {number for (of, _), found in documents.items() if of == part for number in found})
        for part, (_, corpus) in enumerate(corpora)
    ]
    return [
        [
            {
                **({"part": corpora[part][0]} if isinstance(data, Mixture) else {}),
                "sample": start // seq_len,
                "documents": [names[part].get(number, number) for number in documents[part, start]],
            }
            for part, start in batch
        ]
        for batch in batches
    ]


def step_texts(source: TrainingBatches, data: Corpus | Mixture, step: int) -> list[list[list[str]]]:
    """The text of a step (from 0), by micro-batch, sample and document: one piece for each of `step_origins`."""
    texts = []
    seq_len = source.curriculum.stages[source.curriculum.stage_index(step)].seq_len
    for batch in source.step(step):
        tokens, cu = batch.columns["tokens"].tolist(), sorted(set(batch.packing.cu_q.tolist()))
        pieces: list[list[str]] = [[] for _ in range(len(tokens) // seq_len)]
        for start, stop in pairwise(cu):
            # a document of the packing never reaches over the end of a sample
            pieces[start // seq_len].append(data.tokenizer.decode(tokens[start:stop]))
        texts.append(pieces)
    return texts


def document_names(corpus: Corpus, numbers: Iterable[int]) -> dict[int, str]:
    """Names of training documents by their numbers in the stream; {} if the list is missing or very long."""
    path, wanted = corpus.folder / DOCUMENTS, set(numbers)
    if not wanted or not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    names: dict[int, str] = {}
    number = -1
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if '"train"' not in line:
                continue
            record = json.loads(line)
            if record["split"] != "train":
                continue
            number += 1
            if number in wanted:
                names[number] = str(record["name"])
                if len(names) == len(wanted):
                    break
    return names


def _document_numbers(corpus: Corpus, stream: TokenStream | KeptDocuments, span_len: int) -> NDArray[np.int64]:
    """[documents of the stream] their numbers among all training documents of the corpus."""
    whole = corpus.stream("train")
    if isinstance(stream, KeptDocuments):
        return np.flatnonzero(np.diff(whole.starts, append=len(whole)) <= span_len)
    return np.arange(len(whole.starts))
