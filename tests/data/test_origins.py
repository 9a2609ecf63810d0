"""Samples traced back: the documents that a sample holds a part of, and its text."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from pithwood.data.batches import BatchSource
from pithwood.data.curriculum import Stage
from pithwood.data.mixture import MixtureConfig, MixturePart, open_data
from pithwood.data.origins import document_names, step_origins, step_texts
from pithwood.data.prepare import prepare
from pithwood.data.sources import TextFolder
from pithwood.data.usage import training_batches
from tests.test_train import small_run

pytestmark = pytest.mark.quick


def test_each_sample_names_the_documents_whose_text_it_holds(tmp_path: Path):
    run = small_run(tmp_path / "text")
    corpus = prepare(run.data, tmp_path / "corpora")
    source = BatchSource(corpus, "train", seq_len=48, samples_per_batch=2, samples_per_step=4, seed=0)
    contents = {path.name: path.read_text() for path in (tmp_path / "text").glob("*.txt")}
    for step in range(4):
        origins, texts = step_origins(source, corpus, step), step_texts(source, corpus, step)
        assert [len(batch) for batch in origins] == [2, 2]
        for micro, (batch, batch_texts) in enumerate(zip(origins, texts, strict=True)):
            assert [sample["sample"] for sample in batch] == source.samples(step, micro).tolist()
            for sample, pieces in zip(batch, batch_texts, strict=True):
                assert all(piece in contents[name] for name, piece in zip(sample["documents"], pieces, strict=True))


def test_a_corpus_without_a_list_of_documents_knows_numbers_only(tmp_path: Path):
    run = small_run(tmp_path / "text")
    corpus = prepare(run.data, tmp_path / "corpora")
    source = BatchSource(corpus, "train", seq_len=48, samples_per_batch=2, seed=0)
    (corpus.folder / "documents.jsonl").unlink()
    assert document_names(corpus, [0, 1]) == {}
    assert all(
        isinstance(number, int) for sample in step_origins(source, corpus, 0)[0] for number in sample["documents"]
    )


@pytest.mark.parametrize("long_documents", ["cut", "drop"])
def test_samples_of_a_mixture_name_their_part_and_the_documents_that_are_kept(tmp_path: Path, long_documents):
    contents = {}
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        for number in range(40):
            # every third document is longer than a sample
            text = " ".join(f"{part}{number}x{place}" for place in range(60 if number % 3 == 0 else 3))
            (tmp_path / part / f"{part}-{number:02}.txt").write_text(text)
            contents[f"{part}-{number:02}.txt"] = text
    parts = {
        name: MixturePart(TextFolder(str(tmp_path / name)), weight=weight, long_documents=long_documents)
        for name, weight in (("one", 3.0), ("two", 1.0))
    }
    mixture = open_data(
        MixtureConfig(parts, tokenizer_part="one", vocab_size=300, dedup_threshold=None),
        tmp_path / "corpora",
        lambda line: None,
    )
    stages = [
        Stage(2, 48, 4, 2, (Fraction(3, 4), Fraction(1, 4))),
        Stage(4, 96, 2, 1, (Fraction(1, 2), Fraction(1, 2))),
    ]
    source = training_batches(mixture, stages, seed=0, steps=4)
    seen = set()
    for step in range(4):
        origins, texts = step_origins(source, mixture, step), step_texts(source, mixture, step)
        for batch, batch_texts in zip(origins, texts, strict=True):
            for sample, pieces in zip(batch, batch_texts, strict=True):
                seen.add(sample["part"])
                for name, piece in zip(sample["documents"], pieces, strict=True):
                    assert name.startswith(sample["part"])
                    assert piece in contents[name]
    assert seen == {"one", "two"}
