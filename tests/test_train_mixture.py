"""Mixtures and curricula through the whole of training: digits, validation by part, refusals, what is reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pithwood.attention.full import FullAttentionConfig
from pithwood.data.mixture import MixtureConfig, MixturePart, open_data
from pithwood.data.sources import TextFolder
from pithwood.data.usage import training_batches
from pithwood.observe.events import read_events
from pithwood.plan import plan
from pithwood.recipes.mixtures import demo_mixture
from pithwood.run import Phase, Run
from pithwood.run_folder import run_dir
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.test_train import losses, small_corpus, small_run


def small_mixture(folder: Path) -> Run:
    """Made-up words and digits, 3 to 1; two lengths, then another mixture, each for four steps."""
    base = small_run(folder / "words")
    (folder / "digits").mkdir()
    for number in range(30):
        text = " ".join(str((number * 7919 + place * 104729) % 997) for place in range(40 + number))
        (folder / "digits" / f"{number:02}.txt").write_text(text + "\n")
    parts = {
        "words": MixturePart(small_corpus(folder / "words"), weight=3),
        "digits": MixturePart(TextFolder(str(folder / "digits")), weight=1),
    }
    return dataclasses.replace(
        base,
        name="mixed",
        data=MixtureConfig(
            parts, tokenizer_part="words", vocab_size=320, validation_fraction=0.1, dedup_threshold=None
        ),
        steps=12,
        phases=(Phase(4, seq_len=16), Phase(8), Phase(100, weights={"words": 0, "digits": 1})),
    )


def limit_epochs(run: Run, name: str, limit: float) -> Run:
    assert isinstance(run.data, MixtureConfig)
    parts = {**run.data.parts, name: dataclasses.replace(run.data.parts[name], max_epochs=limit)}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, parts=parts))


def fail_at(monkeypatch, step: int) -> None:
    original = Trainer.train_step

    def failing(self, number, *args, **kwargs):
        if number == step:
            raise RuntimeError("power cut")
        return original(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", failing)


@pytest.mark.slow
def test_a_mixture_with_a_curriculum_resumes_with_the_same_digits(tmp_path, monkeypatch):
    run = dataclasses.replace(small_mixture(tmp_path), checkpoint_every=1)
    whole = train(run, runs_dir=tmp_path / "a", console=False)
    for stop in (2, 4, 7, 8, 10):
        with monkeypatch.context() as patch:
            fail_at(patch, stop)
            with pytest.raises(RuntimeError, match="power cut"):
                train(run, runs_dir=tmp_path / "b", console=False)
    resumed = train(run, runs_dir=tmp_path / "b", console=False)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 12
    for name in ("validation_loss", "validation_loss/words", "validation_loss/digits"):
        assert resumed[name] == whole[name]


def test_extending_a_run_by_steps_reads_on_where_it_stood(tmp_path):
    run = small_mixture(tmp_path)
    long = train(dataclasses.replace(run, steps=14), runs_dir=tmp_path / "a", console=False)
    short = train(run, runs_dir=tmp_path / "b", console=False)
    extended = train(dataclasses.replace(run, steps=14), runs_dir=tmp_path / "b", console=False)
    assert extended["run_dir"] == short["run_dir"]
    corpus = open_data(run.data, tmp_path / "b" / "corpora")
    batches = [training_batches(corpus, r.stages(), seed=0, steps=1) for r in (run, dataclasses.replace(run, steps=14))]
    for step in range(14):
        first, second = (source.batch(step, 1).columns["tokens"].tolist() for source in batches)
        assert first == second
    assert extended["epochs"] == long["epochs"] != short["epochs"]


def test_the_log_and_the_summary_tell_each_parts_loss_and_epochs(tmp_path):
    run = small_mixture(tmp_path)
    summary = train(run, runs_dir=tmp_path / "runs", console=False)
    events = read_events(summary["run_dir"])
    checks = [event for event in events if event["kind"] == "validation"]
    assert [event["step"] for event in checks] == [4, 8, 12]
    for event in checks:
        assert event["loss"] == pytest.approx(0.75 * event["loss/words"] + 0.25 * event["loss/digits"])
        for part in ("words", "digits"):
            assert event[f"bits_per_byte/{part}"] > 0
    # The last phase trains on digits alone.
    assert checks[-1]["loss/digits"] < checks[-2]["loss/digits"]
    assert summary["validation_bits_per_byte/digits"] == checks[-1]["bits_per_byte/digits"]
    assert checks[-1]["epochs/words"] == checks[1]["epochs/words"] > checks[0]["epochs/words"] > 0
    assert {part: checks[-1][f"epochs/{part}"] for part in ("digits", "words")} == summary["epochs"]
    for event in checks:
        assert event["tokens/words"] + event["tokens/digits"] == event["tokens"]
    # 256 tokens a step: 3 to 1, and digits alone from step 8 on.
    assert [event["tokens/digits"] for event in checks] == [256, 512, 1536]
    phases = [(event["step"], event["seq_len"], event["shares"]) for event in events if event["kind"] == "phase"]
    assert phases == [(4, 64, {"digits": 0.25, "words": 0.75}), (8, 64, {"digits": 1.0, "words": 0.0})]
    begun = next(event for event in events if event["kind"] == "run")
    assert begun["epochs"] == summary["epochs"]
    assert set(begun["epochs"]) == {"words", "digits"}
    assert [event["tokens"] for event in events if event["kind"] == "train"] == [256 * n for n in range(1, 13)]


def test_a_limit_of_epochs_can_be_raised_without_leaving_the_run_folder(tmp_path):
    run = small_mixture(tmp_path)
    folders = {run_dir(limit_epochs(run, "words", limit), tmp_path) for limit in (1.0, 2.5)}
    assert folders == {run_dir(run, tmp_path)}
    assert run_dir(dataclasses.replace(run, seed=1), tmp_path) not in folders


def test_a_corpus_run_reports_its_epochs_too(tmp_path):
    summary = train(small_run(tmp_path / "text"), runs_dir=tmp_path / "runs", console=False)
    assert list(summary["epochs"]) == ["corpus"]
    assert 0 < summary["epochs"]["corpus"] < 1
    assert not [name for name in summary if name.startswith("validation_loss/")]


def test_the_plan_tells_what_is_read_once_the_data_is_prepared(tmp_path):
    run = small_mixture(tmp_path)
    assert plan(run, tmp_path / "runs" / "corpora")["data"] is None
    open_data(run.data, tmp_path / "runs" / "corpora")
    result = plan(run, tmp_path / "runs" / "corpora")
    assert [stage["seq_len"] for stage in result["data"]["stages"]] == [16, 64, 64]
    assert [stage["samples_per_micro_batch"] for stage in result["data"]["stages"]] == [8, 2, 2]
    assert result["data"]["stages"][2]["shares"] == {"digits": 1.0, "words": 0.0}
    assert sum(part["tokens_read"] for part in result["data"]["parts"].values()) == result["tokens"] == 12 * 256
    assert result["data"]["parts"]["words"]["samples"] == 3 * 4 * 16 // 4 + 3 * 4 * 4 // 4
    limited = dataclasses.replace(limit_epochs(run, "digits", 0.5), steps=90)
    with pytest.raises(ValueError, match=r"data\.parts\.digits\.max_epochs=0\.5, but 90 steps read"):
        plan(limited, tmp_path / "runs" / "corpora")


def test_epochs_are_refused_before_anything_of_the_run_is_written(tmp_path):
    run = limit_epochs(small_mixture(tmp_path), "words", 0.001)
    with pytest.raises(ValueError, match=r"data\.parts\.words\.max_epochs=0\.001, but 12 steps read .*set steps=0"):
        train(run, runs_dir=tmp_path / "runs", console=False)
    assert not list((tmp_path / "runs").glob("mixed-*/*.json*"))


@pytest.mark.quick
def test_phases_that_change_only_the_model_do_not_change_the_samples(tmp_path):
    run = small_run(tmp_path / "text")
    phases = (Phase(2), Phase(5, attention=FullAttentionConfig(), trainable=("*norm*",)), Phase(8))
    phased = dataclasses.replace(run, phases=phases)
    assert [dataclasses.replace(stage, until_step=0) for stage in phased.stages()] == [
        dataclasses.replace(stage, until_step=0) for stage in run.stages()
    ]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((Phase(8, seq_len=0),), r"phases\.0\.seq_len=0 must be at least 1"),
        ((Phase(4), Phase(8, seq_len=256)), r"phases\.1\.seq_len=256 does not divide the 128 tokens of a micro-batch"),
        ((Phase(4, seq_len=48), Phase(8)), r"phases\.0\.seq_len=48 does not divide the 128 tokens"),
        ((Phase(4, weights={"a": 1}), Phase(8)), r"phases\.0\.weights needs parts, but data is one corpus"),
        ((Phase(4, seq_len=16), Phase(4)), r"rising until_step"),
        ((Phase(4, seq_len=16), Phase(2)), r"rising until_step"),
    ],
)
def test_phases_of_the_data_that_cannot_be_are_refused(tmp_path, phases, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_run(tmp_path / "text"), phases=phases).validate()


@pytest.mark.quick
def test_lengths_that_cut_the_text_at_different_places_are_refused(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), samples_per_micro_batch=6, samples_per_step=6)
    with pytest.raises(ValueError, match=r"seq_len=48 must divide the longest seq_len of the run, 64"):
        dataclasses.replace(run, phases=(Phase(4, seq_len=48), Phase(8))).validate()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"words": 1}, r"phases\.0\.weights lacks 'digits'; give every part a weight, 0 to leave it out"),
        (
            {"words": 1, "digits": 1, "code": 1},
            r"phases\.0\.weights has 'code', which is no part; parts are digits, words",
        ),
        ({"words": -1, "digits": 1}, r"phases\.0\.weights: the weight of 'words' is -1"),
        ({"words": 0, "digits": 0}, r"phases\.0\.weights: all weights are 0"),
        ({"words": float("nan"), "digits": 1}, r"phases\.0\.weights: the weight of 'words' is nan"),
    ],
)
def test_weights_of_a_phase_that_cannot_be_are_refused(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_mixture(tmp_path), phases=(Phase(100, weights=weights),)).validate()


def test_a_run_from_before_a_setting_existed_is_resumed_in_its_folder(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), phases=(Phase(4), Phase(8, trainable=("*norm*",))))
    train(dataclasses.replace(run, steps=4), runs_dir=tmp_path / "a", console=False)
    begun = train(dataclasses.replace(run, steps=4), runs_dir=tmp_path / "b", console=False)
    older = (tmp_path / "b" / "small-01234567").absolute()
    Path(begun["run_dir"]).rename(older)
    config = json.loads((older / "config.json").read_text())
    del config["run"]["data"]["tokenizer"]
    for phase in config["run"]["phases"]:
        del phase["seq_len"], phase["weights"]
    (older / "config.json").write_text(json.dumps(config))
    assert run_dir(dataclasses.replace(run, seed=1), tmp_path / "b") != older
    mixed = dataclasses.replace(run, phases=(Phase(4, seq_len=32), Phase(8, trainable=("*norm*",))))
    assert run_dir(mixed, tmp_path / "b") != older
    resumed = train(run, runs_dir=tmp_path / "b", console=False)
    assert Path(resumed["run_dir"]) == older
    assert losses(resumed) == losses(train(run, runs_dir=tmp_path / "a", console=False))


def test_a_checkpoint_of_one_corpus_is_no_start_for_a_mixture(tmp_path):
    run = small_mixture(tmp_path)
    train(small_run(tmp_path / "words"), runs_dir=tmp_path / "runs", console=False)
    with pytest.raises(ValueError, match="was trained on another corpus than `data` describes now"):
        train(run, runs_dir=tmp_path / "runs", branch_from="small@4", console=False)


def test_the_recipe_of_a_mixture_trains_in_both_of_its_phases(tmp_path):
    run = demo_mixture()
    short = dataclasses.replace(run, steps=4, phases=(dataclasses.replace(run.phases[0], until_step=2), run.phases[1]))
    summary = train(short, runs_dir=tmp_path / "runs", console=False)
    assert set(summary["epochs"]) == {"code", "prose"}
    assert [event["step"] for event in read_events(summary["run_dir"]) if event["kind"] == "phase"] == [2]
    curve = losses(summary)
    assert curve[-1][1] < curve[0][1]
