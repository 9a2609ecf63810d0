"""Evaluations of run folders: the run's own numbers come out again, other attention, other text, kept results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pithwood.checkpoint.load import list_checkpoints
from pithwood.data.mixture import MixtureConfig, MixturePart
from pithwood.data.prepare import prepare
from pithwood.data.sources import TextFolder
from pithwood.evaluate.run import Asked, evaluate_run, read_evaluations, save_evaluation
from pithwood.observe.events import read_events
from pithwood.observe.summary import read_summary
from pithwood.train import train


def evaluate(trained, run: str = "small", step: int | None = None, **asked):
    return evaluate_run(run, Asked(**asked), runs_dir=trained.runs_dir, step=step, device="cpu")


def test_the_runs_last_validation_comes_out_to_the_last_digit(trained):
    for name, folder in (("small", trained.moba), ("dense", trained.dense)):
        result, summary = evaluate(trained, name), read_summary(folder)
        assert result["loss"] == summary["validation_loss"]
        assert result["bits_per_byte"] == summary["validation_bits_per_byte"]


def test_an_earlier_checkpoint_is_evaluated_on_request(trained):
    result = evaluate(trained, step=4)
    validated = next(e for e in read_events(trained.moba) if e["kind"] == "validation" and e["step"] == 4)
    assert (result["step"], result["trained_tokens"]) == (4, 4 * 4 * 64)
    assert result["loss"] == pytest.approx(validated["loss"], rel=1e-6)


def test_the_training_split_can_be_evaluated(trained):
    train, validation = evaluate(trained, split="train"), evaluate(trained)
    assert train["tokens"] > 5 * validation["tokens"]
    assert train["split"] == "train"


def test_full_attention_takes_the_same_weights_and_gives_other_losses(trained):
    moba, full = evaluate(trained), evaluate(trained, attention="full")
    assert moba["mixers"] == ["MoBA", "MoBA"]
    assert full["mixers"] == ["FullAttention", "FullAttention"]
    assert 0 < abs(full["loss"] - moba["loss"]) < 0.1 * moba["loss"]
    # in contexts no longer than top_k blocks both see everything
    short = {"seq_len": 16}
    assert evaluate(trained, attention="full", **short)["loss"] == pytest.approx(
        evaluate(trained, **short)["loss"], rel=1e-6
    )


def test_text_is_evaluated_with_every_byte_paid_for(trained, tmp_path):
    text = "document 1\r\nbada bidu — naïve\n" * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"document 2\n")
    result = evaluate(trained, texts=(tmp_path / "a.txt", tmp_path / "b.txt"))
    assert result["bytes"] == len(text.encode()) + 11
    assert result["documents"] == 2
    assert result["split"] is None


def test_another_corpus_of_the_same_tokenizer_is_evaluated(trained, tmp_path):
    corpus = next((trained.runs_dir / "corpora").glob("[!.]*"))
    result = evaluate(trained, corpus=corpus)
    assert result["loss"] == read_summary(trained.moba)["validation_loss"]
    assert result["corpus"] == str(corpus)
    other = prepare(dataclasses.replace(trained.run.data, vocab_size=300), tmp_path)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        evaluate(trained, corpus=other.folder)
    with pytest.raises(ValueError, match="there is no folder"):
        evaluate(trained, corpus=tmp_path / "none")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"samples": 0}, "--samples=0 must be at least 1"),
        ({"seq_len": -1}, "--seq-len=-1 must be at least 1"),
        ({"samples": 10_000}, "--samples=10000 is more than the validation split has"),
        ({"seq_len": 1_000_000}, "--seq-len=1000000 is more than the validation split has"),
        ({"buckets": 65}, "--buckets=65 must lie between 1 and the 64 positions"),
        ({"texts": (Path("missing.txt"),)}, "--text missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(trained, asked, message):
    with pytest.raises(ValueError, match=message):
        evaluate(trained, **asked)


def test_text_that_is_empty_or_not_utf8_is_refused(trained, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        evaluate(trained, texts=(tmp_path / "empty.txt",))
    with pytest.raises(ValueError, match=r"latin.txt cannot be read as UTF-8"):
        evaluate(trained, texts=(tmp_path / "latin.txt",))


def test_moba_cannot_be_had_of_a_run_that_has_none(trained):
    with pytest.raises(ValueError, match="the run has no MoBA in its settings"):
        evaluate(trained, "dense", attention="moba")


def test_the_corpus_is_prepared_again_if_it_is_gone(copied):
    for path in (copied.runs_dir / "corpora").iterdir():
        path.rename(copied.runs_dir / "corpora" / f".gone-{path.name}")
    assert evaluate(copied)["loss"] == read_summary(copied.moba)["validation_loss"]


def test_a_corpus_whose_text_changed_meanwhile_is_refused(copied, tmp_path):
    for path in (copied.runs_dir / "corpora").iterdir():
        path.rename(copied.runs_dir / "corpora" / f".gone-{path.name}")
    config = json.loads((copied.moba / "config.json").read_text())
    text = tmp_path / "text"
    text.mkdir()
    for path in Path(config["run"]["data"]["source"]["path"]).iterdir():
        (text / path.name).write_text(path.read_text() + " changed")
    config["run"]["data"]["source"]["path"] = str(text)
    (copied.moba / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its source gives another one now"):
        evaluate(copied)


def test_a_damaged_checkpoint_is_refused(copied):
    _, path = list_checkpoints(copied.moba)[-1]
    victim = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=victim.name):
        evaluate(copied, step=8)


def test_a_kept_result_is_read_back_and_never_replaced(copied):
    result = evaluate(copied)
    first = save_evaluation(copied.moba, result)
    assert save_evaluation(copied.moba, evaluate(copied)) == first  # the same result keeps its file
    other = save_evaluation(copied.moba, {**result, "loss": 1.0})
    assert other != first
    named = save_evaluation(copied.moba, result, "mine")
    with pytest.raises(ValueError, match="exists; choose another --name"):
        save_evaluation(copied.moba, result, "mine")
    assert [entry["name"] for entry in read_evaluations(copied.moba)] == [first.stem, other.stem, named.stem]
    assert read_evaluations(copied.moba)[0]["loss"] == result["loss"]


def test_results_of_different_things_have_different_names(trained, tmp_path):
    (tmp_path / "a.txt").write_text("document 1 bada " * 20)
    asked = [
        {},
        {"split": "train"},
        {"samples": 1},
        {"seq_len": 32},
        {"attention": "full"},
        {"buckets": 2},
        {"texts": (tmp_path / "a.txt",)},
    ]
    names = [evaluate(trained, **words)["name"] for words in asked]
    assert len(set(names)) == len(names)


def test_a_damaged_kept_result_is_named(copied):
    path = save_evaluation(copied.moba, evaluate(copied))
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        read_evaluations(copied.moba)


def test_a_run_trained_on_a_mixture_is_evaluated_part_by_part(trained, tmp_path):
    (tmp_path / "other").mkdir()
    for number in range(20):
        (tmp_path / "other" / f"{number}.txt").write_text(f"other text {number} " + f"kuku {number * 7} lele " * 40)
    parts = {
        "a": MixturePart(trained.run.data.source, weight=1),
        "b": MixturePart(TextFolder(str(tmp_path / "other"), "*.txt"), weight=1),
    }
    data = MixtureConfig(parts=parts, vocab_size=320, tokenizer_part="a", validation_fraction=0.2, dedup_threshold=None)
    run = dataclasses.replace(trained.run, name="mixed", data=data, steps=2)
    train(run, runs_dir=tmp_path / "runs", console=False)

    def on(**asked):
        return evaluate_run("mixed", Asked(**asked), runs_dir=tmp_path / "runs", device="cpu")

    a, b = on(part="a"), on(part="b")
    assert a["tokens"] != b["tokens"]
    assert a["name"] != b["name"]
    for asked in ({}, {"part": "c"}):
        with pytest.raises(ValueError, match="choose which part to measure on with --part: a, b"):
            on(**asked)
    with pytest.raises(ValueError, match="names a part of a mixture, but small-"):
        evaluate(trained, part="a")
