"""Spikes: which steps are called one, what is written about them, and that a quiet run has none."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
from pathlib import Path

import pytest

from pithwood.data.batches import BatchSource
from pithwood.data.origins import step_origins, step_texts
from pithwood.data.prepare import prepare
from pithwood.data.sources import TextFolder
from pithwood.observe.events import read_events
from pithwood.observe.spikes import SpikeConfig, SpikeDetector
from pithwood.run import Phase, Run
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.test_train import losses, small_run

CALM = [2.0 + 0.05 * (i * 7919 % 13 - 6) / 6 for i in range(40)]


def looked(detector: SpikeDetector, values: list[float], **fields) -> list[dict | None]:
    return [detector.look({"kind": "train", "loss": value, "grad_norm": 1.0, **fields}) for value in values]


def of_kind(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_events(folder) if event["kind"] == kind]


@pytest.mark.quick
def test_a_high_loss_is_a_spike_and_says_what_is_usual():
    detector = SpikeDetector(SpikeConfig())
    assert looked(detector, CALM) == [None] * 40
    found = looked(detector, [2.6])[0]
    assert found["reason"] == "loss"
    assert found["usual"] == pytest.approx(2.0, abs=0.02)
    assert 2.1 < found["threshold"] < 2.6


@pytest.mark.quick
def test_falling_losses_and_few_steps_are_no_spikes():
    assert not any(looked(SpikeDetector(SpikeConfig()), [8.0 * 0.97**i for i in range(120)]))
    assert not any(looked(SpikeDetector(SpikeConfig()), [2.0] * 15 + [9.0]))


@pytest.mark.quick
def test_gradient_norms_skips_and_nan_are_reasons_of_their_own():
    detector = SpikeDetector(SpikeConfig())
    looked(detector, CALM)
    assert detector.look({"loss": 2.0, "grad_norm": 4.1})["reason"] == "gradient norm"
    assert detector.look({"loss": 2.0, "grad_norm": float("nan"), "skipped": 1.0})["reason"] == "skipped"
    assert detector.look({"loss": float("nan"), "grad_norm": 1.0})["reason"] == "loss is not finite"
    assert detector.look({"loss": 2.0, "grad_norm": 1.0}) is None


@pytest.mark.quick
def test_a_lasting_rise_becomes_usual():
    detector = SpikeDetector(SpikeConfig(window=16))
    looked(detector, CALM)
    found = looked(detector, [3.0] * 40)
    assert found[0] is not None
    assert found[-1] is None


@pytest.mark.quick
@pytest.mark.parametrize("field", ["steps_around=-1", "window=15", "loss_deviations=0", "grad_norm_factor=1"])
def test_impossible_settings_are_refused(field):
    name, _, value = field.partition("=")
    with pytest.raises(ValueError, match=field):
        SpikeConfig(**{name: int(value)}).validate()


def poisoned_run(folder: Path) -> Run:
    """Sixty documents of one sentence, and one of noise that no step but that which reads it can expect."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(60):
        (text / f"doc{number:02}.txt").write_text(f"{number} " + "the quick brown fox jumps over the lazy dog. " * 12)
    rng = random.Random(1)
    noise = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(150))
    (text / "poison.txt").write_text(noise)
    run = small_run(folder / "other")
    source = TextFolder(str(text), "*.txt")
    data = dataclasses.replace(run.data, source=source, seed=3)
    return dataclasses.replace(
        run, data=data, steps=60, samples_per_step=2, samples_per_micro_batch=1, log_every=5, validate_every=60,
        checkpoint_every=20, spikes=SpikeConfig(steps_around=2, window=16),
    )  # fmt: skip


def steps_that_read(run: Run, runs_dir: Path, name: str) -> list[int]:
    corpus = prepare(run.data, runs_dir / "corpora")
    source = BatchSource(
        corpus, "train", seq_len=run.seq_len, samples_per_batch=1, samples_per_step=2, seed=run.seed
    )  # fmt: skip
    return [
        step + 1
        for step in range(run.steps)
        if any(name in sample["documents"] for micro in step_origins(source, corpus, step) for sample in micro)
    ]


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """The run with the noise, trained to its end."""

    run: Run
    runs_dir: Path
    summary: dict
    console: str


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    """Read only."""
    folder = tmp_path_factory.mktemp("poisoned")
    run, err = poisoned_run(folder), io.StringIO()
    with contextlib.redirect_stderr(err):
        summary = train(run, runs_dir=folder / "runs")
    return Poisoned(run, folder / "runs", summary, err.getvalue())


def test_a_poisoned_sample_is_found_with_its_step_its_document_and_its_text(poisoned: Poisoned):
    run, folder = poisoned.run, Path(poisoned.summary["run_dir"])
    expected = [step for step in steps_that_read(run, poisoned.runs_dir, "poison.txt") if step > 16]
    spikes = of_kind(folder, "spike")
    assert expected, "the noise must lie behind the steps that the detector needs"
    assert next(event["step"] for event in spikes if event["reason"] == "loss") == expected[0]
    spike = spikes[0]
    assert spike["value"] > spike["threshold"] > spike["usual"]
    assert (spike["first_step"], spike["last_step"]) == (spike["step"] - 2, spike["step"] + 2)

    around = {event["step"]: event for event in of_kind(folder, "spike_step")}
    assert set(range(spike["step"] - 2, spike["step"] + 3)) <= set(around)
    micro_batches = around[spike["step"]]["batches"]
    assert [len(batch) for batch in micro_batches] == [1, 1]
    assert any("poison.txt" in sample["documents"] for batch in micro_batches for sample in batch)
    gradients = {step: event["gradient_norms"] for step, event in around.items()}
    assert gradients[spike["step"]]["embed_tokens"] > 2 * gradients[spike["step"] - 2]["embed_tokens"]
    for name in ("weight_norms", "update_norms"):
        assert set(around[spike["step"]][name]) == set(gradients[spike["step"]])
    assert set(around[spike["step"]]["activation_rms"]) == {"layers.0", "layers.1"}

    corpus = prepare(run.data, poisoned.runs_dir / "corpora")
    source = BatchSource(corpus, "train", seq_len=64, samples_per_batch=1, samples_per_step=2, seed=run.seed)
    texts = step_texts(source, corpus, spike["step"] - 1)
    assert any(
        0x4E00 <= ord(char) < 0x9FFF for batch in texts for sample in batch for piece in sample for char in piece
    )
    assert f"step {spike['step']}/60 | spike: loss" in poisoned.console


def test_an_overlong_step_is_followed_by_a_spike_with_its_update(tmp_path: Path):
    run = small_run(tmp_path / "text")
    phases = (Phase(24), Phase(25, lr_scales={"*": 300.0}), Phase(32))
    run = dataclasses.replace(run, steps=32, phases=phases, spikes=SpikeConfig(steps_around=3), log_every=4)
    folder = Path(train(run, runs_dir=tmp_path / "runs", console=False)["run_dir"])
    spikes = of_kind(folder, "spike")
    # the update of step 25 is the wrong one, so step 26 is the first whose loss is high
    assert spikes[0]["step"] == 26
    updates = {event["step"]: event["update_norms"]["lm_head"] for event in of_kind(folder, "spike_step")}
    assert updates[25] > 30 * updates[24]


def test_a_quiet_run_has_no_spike(tmp_path: Path):
    run = dataclasses.replace(small_run(tmp_path / "text"), steps=48, validate_every=24, checkpoint_every=24)
    folder = Path(train(run, runs_dir=tmp_path / "runs", console=False)["run_dir"])
    assert not of_kind(folder, "spike")
    assert not of_kind(folder, "spike_step")


def test_measuring_changes_no_digit_and_can_be_turned_off(poisoned: Poisoned, tmp_path: Path):
    summary = train(dataclasses.replace(poisoned.run, spikes=None), runs_dir=tmp_path / "off", console=False)
    assert losses(summary) == losses(poisoned.summary)
    assert Path(summary["run_dir"]).name == Path(poisoned.summary["run_dir"]).name
    assert not of_kind(Path(summary["run_dir"]), "spike")


@pytest.mark.slow
def test_a_resumed_run_tells_the_same_spikes_as_an_unbroken_one(poisoned: Poisoned, tmp_path: Path, monkeypatch):
    run, whole = poisoned.run, Path(poisoned.summary["run_dir"])
    step = Trainer.train_step

    def fail_at_30(self, number, *args, **kwargs):
        if number == 30:
            raise RuntimeError("power cut")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", fail_at_30)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, runs_dir=tmp_path / "broken", console=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    broken = Path(train(run, runs_dir=tmp_path / "broken", console=False)["run_dir"])
    assert [(e["step"], e["reason"]) for e in of_kind(broken, "spike")] == [
        (e["step"], e["reason"]) for e in of_kind(whole, "spike")
    ]
