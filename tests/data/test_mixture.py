from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pithwood.config import apply_overrides, config_hash, from_dict, to_dict
from pithwood.data.corpus import Corpus
from pithwood.data.curriculum import Stage
from pithwood.data.mixture import Mixture, MixtureConfig, MixturePart, find_data, open_data, training_streams
from pithwood.data.prepare import CorpusConfig
from pithwood.data.prepared import PreparedCorpus
from pithwood.data.sources import StdlibSource, TextFolder
from pithwood.data.tokenizer import TokenizerFile
from pithwood.data.usage import data_plan, training_batches
from tests.data.texts import prose

pytestmark = pytest.mark.quick

SHARES = (Fraction(1, 4), Fraction(3, 4))
"""Of digits and prose: parts stand in the order of their names."""


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> MixtureConfig:
    """Thirty long documents of prose and sixty short ones of digits."""
    root = tmp_path_factory.mktemp("texts")
    for name in ("prose", "digits"):
        (root / name).mkdir()
    for number in range(30):
        (root / "prose" / f"{number:02}.txt").write_text(prose(number, 150))
    for number in range(60):
        text = " ".join(str((number * 7919 + place * 104729) % 9973) for place in range(12 + number % 9))
        (root / "digits" / f"{number:02}.txt").write_text(text + "\n")
    parts = {
        "prose": MixturePart(TextFolder(str(root / "prose")), weight=3),
        "digits": MixturePart(TextFolder(str(root / "digits")), weight=1),
    }
    return MixtureConfig(parts, tokenizer_part="prose", vocab_size=300, validation_fraction=0.2, dedup_threshold=None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def mixture(cfg: MixtureConfig, cache: Path) -> Mixture:
    data = open_data(cfg, cache)
    assert isinstance(data, Mixture)
    return data


def change(cfg: MixtureConfig, name: str, **changes: object) -> MixtureConfig:
    return replace(cfg, parts={**cfg.parts, name: replace(cfg.parts[name], **changes)})


def test_all_parts_are_under_the_tokenizer_of_one(mixture, cfg, cache):
    assert list(mixture.corpora) == ["digits", "prose"]
    prints = {corpus.tokenizer.fingerprint() for corpus in mixture.corpora.values()}
    alone = open_data(cfg.corpus("prose"), cache)
    assert prints == {alone.tokenizer.fingerprint()}
    assert mixture.corpora["prose"].folder == alone.folder
    named = open_data(replace(cfg, tokenizer_part="digits", vocab_size=270), cache)
    assert named.tokenizer.fingerprint() not in prints


def test_a_loaded_tokenizer_serves_all_parts(mixture, cfg, cache, tmp_path):
    mixture.tokenizer.save(tmp_path / "tokenizer.json")
    loaded = open_data(replace(cfg, tokenizer=TokenizerFile(str(tmp_path)), tokenizer_part=None), cache)
    assert loaded.fingerprint == mixture.fingerprint


def test_corpora_of_different_tokenizers_are_no_mixture(mixture, cfg, cache):
    other = open_data(replace(cfg.corpus("digits"), vocab_size=270), cache)
    assert isinstance(other, Corpus)
    with pytest.raises(ValueError, match=r"tokenizers of 'digits' \(270 tokens\) and 'prose' \(300 tokens\) differ"):
        Mixture(cfg, {**mixture.corpora, "digits": other})


def test_every_batch_holds_the_shares_and_the_text_of_its_parts(mixture):
    stages = [Stage(6, 16, 16, 8, SHARES), Stage(20, 64, 4, 2, SHARES)]
    batches = training_batches(mixture, stages, seed=5, steps=20)
    bytes_V = mixture.tokenizer.bytes_per_token()
    streams = [mixture.corpora[name].stream("train") for name in ("digits", "prose")]
    for stage, steps in zip(stages, (range(6), range(6, 20)), strict=True):
        drawn = []
        for step in steps:
            for micro, batch in enumerate(batches.step(step)):
                parts, starts = batches.curriculum.samples(step, micro)
                drawn += parts.tolist()
                texts = [streams[p].read(s, s + stage.seq_len + 1) for p, s in zip(parts, starts, strict=True)]
                assert batch.columns["tokens"].tolist() == np.concatenate([t[:-1] for t in texts]).tolist()
                assert batch.columns["targets"].tolist() == np.concatenate([t[1:] for t in texts]).tolist()
                assert float(batch.columns["loss_weight"].sum()) == batch.num_tokens == 128
                assert torch.equal(batch.columns["target_bytes"], bytes_V[batch.columns["targets"]])
                assert batch.packing.num_docs == batches.max_docs_of_stage[stages.index(stage)]
                assert batch.packing.max_q == batch.packing.max_k == stage.seq_len
                begins = (batch.columns["tokens"] == mixture.tokenizer.end_of_text_id) | (
                    torch.arange(128) % stage.seq_len == 0
                )
                assert (batch.packing.position_T == 0).tolist() == begins.tolist()
        counts = np.arange(1, len(drawn) + 1) * 0.25 - np.cumsum(np.array(drawn) == 0)
        assert np.abs(counts).max() < 1


def test_the_plan_counts_documents_and_epochs(mixture, cfg):
    stages = [Stage(10, 16, 8, 8, SHARES), Stage(20, 64, 2, 2, SHARES)]
    batches = training_batches(mixture, stages, seed=0, steps=20)
    plan = data_plan(mixture, batches.curriculum, 20)
    assert [row["seq_len"] for row in plan["stages"]] == [16, 64]
    assert [(row["first_step"], row["until_step"]) for row in plan["stages"]] == [(0, 10), (10, 20)]
    assert plan["stages"][0]["shares"] == {"digits": 0.25, "prose": 0.75}
    assert {name: part["samples"] for name, part in plan["parts"].items()} == {"digits": 25, "prose": 75}
    for name, part in plan["parts"].items():
        stream = mixture.corpora[name].stream("train")
        lengths = np.diff(stream.starts, append=len(stream))
        assert part["documents"] == len(lengths)
        assert [row["seq_len"] for row in part["context"]] == [16, 64]
        assert [row["long_documents"] for row in part["context"]] == [int((lengths > n).sum()) for n in (16, 64)]
        assert part["epochs"] == pytest.approx(part["tokens_read"] / part["tokens_per_epoch"], abs=0.2)
    assert plan["parts"]["prose"]["context"][1]["cut_tokens"] > 0


def test_documents_longer_than_the_context_can_be_left_out(mixture, cfg):
    lengths = np.diff(mixture.corpora["digits"].stream("train").starts)
    limit = int(np.median(lengths))
    dropping = Mixture(change(cfg, "digits", long_documents="drop"), mixture.corpora)
    streams = training_streams(dropping, limit)
    kept = np.diff(streams["digits"].starts, append=len(streams["digits"]))
    assert 0 < kept.max() <= limit < lengths.max()
    assert len(streams["prose"]) == mixture.corpora["prose"].num_tokens("train")
    batches = training_batches(dropping, [Stage(9, limit, 8, 8, SHARES)], seed=0, steps=9)
    part = data_plan(dropping, batches.curriculum, 9)["parts"]["digits"]
    assert part["documents_dropped"] > 0
    assert part["context"][0]["long_documents"] == 0
    for batch in batches.step(3):
        assert batch.columns["tokens"].max() < dropping.vocab_size


def test_a_part_that_keeps_too_little_text_is_refused(mixture, cfg):
    dropping = Mixture(change(cfg, "prose", long_documents="drop"), mixture.corpora)
    with pytest.raises(
        ValueError, match=r"data\.parts\.prose has 0 training tokens of its documents no longer than seq_"
    ):
        training_streams(dropping, 16)
    with pytest.raises(ValueError, match=r"data\.parts\.digits has \d+ training tokens in all, .* sample needs 65537"):
        training_streams(mixture, 65_536)


def test_more_epochs_than_allowed_are_refused_with_the_steps_that_fit(mixture, cfg):
    stages = [Stage(1, 64, 8, 8, SHARES)]
    limited = Mixture(change(cfg, "digits", max_epochs=1.5), mixture.corpora)
    with pytest.raises(
        ValueError, match=r"data\.parts\.digits\.max_epochs=1\.5, but 500 steps read .* epochs"
    ) as error:
        training_batches(limited, stages, seed=0, steps=500)
    fits = int(str(error.value).partition("set steps=")[2].split()[0])
    training_batches(limited, stages, seed=0, steps=fits)
    with pytest.raises(ValueError, match="max_epochs"):
        training_batches(limited, stages, seed=0, steps=fits + 1)
    training_batches(mixture, stages, seed=0, steps=500)


def test_means_over_parts_are_weighted_by_their_shares(mixture):
    rates = {name: c.num_bytes("validation") / c.num_tokens("validation") for name, c in mixture.corpora.items()}
    bits = {name: c.gzip_bits_per_byte for name, c in mixture.corpora.items()}
    expected = (0.25 * rates["digits"] * bits["digits"] + 0.75 * rates["prose"] * bits["prose"]) / (
        0.25 * rates["digits"] + 0.75 * rates["prose"]
    )
    assert mixture.gzip_bits_per_byte == pytest.approx(expected)
    assert min(bits.values()) < mixture.gzip_bits_per_byte < max(bits.values())
    assert mixture.num_tokens("train") == sum(c.num_tokens("train") for c in mixture.corpora.values())


def test_a_corpus_that_was_prepared_elsewhere_opens_where_no_runs_folder_exists_yet(mixture, tmp_path):
    elsewhere = CorpusConfig(PreparedCorpus(str(mixture.corpora["digits"].folder)))
    opened = open_data(elsewhere, tmp_path / "runs" / "corpora")
    assert opened.fingerprint == mixture.corpora["digits"].fingerprint


def test_prepared_data_is_found_without_reading_its_source(mixture, cfg, cache, tmp_path):
    found = find_data(cfg, cache)
    assert isinstance(found, Mixture)
    assert found.fingerprint == mixture.fingerprint
    assert find_data(change(cfg, "digits", weight=2, max_epochs=1.0), cache) is not None
    assert find_data(replace(cfg, vocab_size=301), cache) is None
    assert find_data(cfg, tmp_path) is None
    one = cfg.corpus("digits")
    assert find_data(replace(one, vocab_size=260), cache) is None
    open_data(replace(one, vocab_size=260), cache)
    assert isinstance(find_data(replace(one, vocab_size=260), cache), Corpus)


def test_json_and_overrides_reach_every_part(cfg):
    changed = apply_overrides(cfg, ["parts.digits.weight=0.5", "parts.prose.max_epochs=2", "vocab_size=400"])
    assert changed.shares() == (Fraction(1, 7), Fraction(6, 7))
    assert [part.max_epochs for part in changed.parts.values()] == [2, None]
    assert from_dict(MixtureConfig, to_dict(changed)) == changed
    swapped = replace(cfg, parts=dict(reversed(cfg.parts.items())))
    assert config_hash(swapped) == config_hash(cfg)
    assert swapped.names == cfg.names


ONE = MixturePart(TextFolder("a"))
TWO = MixturePart(TextFolder("b"))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (MixtureConfig({}), r"data\.parts is empty"),
        (MixtureConfig({"a.b": ONE}), r"the name 'a\.b' may hold letters, digits"),
        (MixtureConfig({"Code": ONE, "code": TWO}), r"the names 'Code' and 'code' clash; they differ in case only"),
        (MixtureConfig({"a": ONE, "b": ONE}), r"'a' and 'b' have the same source"),
        (MixtureConfig({"a": ONE, "b": replace(ONE, max_bytes=9)}), r"'a' and 'b' have the same source"),
        (
            MixtureConfig({"a": replace(ONE, weight=-1), "b": TWO}),
            r"a\.weight=-1 must be a finite number above 0",
        ),
        (
            MixtureConfig({"a": replace(ONE, weight=math.nan), "b": TWO}),
            r"a\.weight=nan must be a finite number above 0",
        ),
        (
            MixtureConfig({"a": replace(ONE, weight=0), "b": TWO}),
            r"a\.weight=0 must be a finite number above 0",
        ),
        (MixtureConfig({"a": replace(ONE, weight=1e-7), "b": TWO}), r"the least share is one sample in 32768"),
        (MixtureConfig({"a": replace(ONE, max_epochs=0)}), r"data\.parts\.a\.max_epochs=0 must be above 0"),
        (MixtureConfig({"a": replace(ONE, max_epochs=math.nan)}), r"data\.parts\.a\.max_epochs=nan must be above 0"),
        (MixtureConfig({"a": replace(ONE, max_bytes=0)}), r"data\.parts\.a\.max_bytes=0"),
        (MixtureConfig({"a": MixturePart(TextFolder("a", "../x"))}), r"data\.parts\.a\.source\.pattern"),
        (MixtureConfig({"a": ONE}, vocab_size=3), r"data\.vocab_size=3"),
        (MixtureConfig({"a": ONE, "b": TWO}), r"data\.tokenizer_part is not set: name the part .* \(a, b\)"),
        (MixtureConfig({"a": ONE}, tokenizer_part="b"), r"data\.tokenizer_part='b' is no part; parts are a"),
        (
            MixtureConfig({"a": ONE}, tokenizer=TokenizerFile("t.json"), tokenizer_part="a"),
            r"data\.tokenizer loads one; drop one of the two",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        cfg.validate()


def test_a_missing_folder_is_named_by_its_part(tmp_path):
    cfg = MixtureConfig({"code": MixturePart(TextFolder(str(tmp_path / "none")))})
    with pytest.raises(ValueError, match=r"data\.parts\.code\.source\.path='.*none' is not a folder"):
        open_data(cfg, tmp_path / "cache")
    assert find_data(cfg, tmp_path / "cache") is None


def test_a_run_of_one_corpus_keeps_its_json_form_and_hash():
    run_data = {"source": {"type": "StdlibSource"}, "vocab_size": 512}

    from pithwood.recipes.demo import debug
    from pithwood.run import Run

    tree = to_dict(debug())
    assert "type" not in tree["data"]
    again = from_dict(Run, {**tree, "data": {**tree["data"], **run_data}})
    assert again == debug()
    assert isinstance(again.data, CorpusConfig)
    mixed = replace(debug(), data=MixtureConfig({"a": MixturePart(StdlibSource())}, vocab_size=512))
    assert to_dict(mixed)["data"]["type"] == "MixtureConfig"
    assert from_dict(Run, to_dict(mixed)) == mixed
