"""A wall clock that is set while a run trains moves the times of its events, and nothing else."""

from __future__ import annotations

import dataclasses
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pithwood.checkpoint.load import list_checkpoints
from pithwood.checkpoint.lock import RunLock
from pithwood.observe.events import read_events
from pithwood.optim.config import MuonConfig
from pithwood.run import Run
from pithwood.run_folder import run_dir
from pithwood.train import train
from tests.command_lines import jumping
from tests.test_train import losses, small_run

DAY_S, HOUR_S = 86_400, 3_600


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return dataclasses.replace(small_run(tmp_path / "text"), log_every=1, checkpoint_every=2, validate_every=3)


def jumped(run: Run, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The summary of a run during which the clock is set a day ahead and then an hour behind the true time."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping(time.time))
        return train(run, runs_dir=runs_dir)


def test_the_clock_jumps_between_steps_and_events_keep_their_order(run, tmp_path, monkeypatch):
    events = read_events(Path(jumped(run, tmp_path / "runs", monkeypatch)["run_dir"]))
    times = [event["time"] for event in events]
    forwards = [after - before for before, after in pairwise(times) if after - before > HOUR_S]
    back = [before - after for before, after in pairwise(times) if before - after > HOUR_S]
    assert [round(jump / HOUR_S) for jump in (*forwards, *back)] == [24, 25]
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert [event["step"] for event in events if event["kind"] == "train"] == list(range(1, 9))


def test_durations_speeds_and_the_time_left_are_those_of_a_steady_clock(run, tmp_path, monkeypatch, capsys):
    started = time.monotonic()
    summary = jumped(run, tmp_path / "runs", monkeypatch)
    wall_s = time.monotonic() - started
    events = read_events(Path(summary["run_dir"]))
    trained = [event for event in events if event["kind"] == "train"]
    assert all(0 < event["step_s"] < wall_s for event in trained)
    assert sum(event["step_s"] for event in trained) < wall_s
    assert all(event["tokens_per_s"] == pytest.approx(4 * 64 / event["step_s"]) for event in trained)
    pauses = [event["seconds"] for event in events if event["kind"] == "checkpoint"]
    pauses += [event["seconds"] for event in events if event["kind"] == "validation" and "seconds" in event]
    assert len(pauses) >= 4
    assert all(0 <= seconds < wall_s for seconds in pauses)
    assert 0 < summary["seconds"] < wall_s
    left = re.findall(r"([\d.]+s) left", capsys.readouterr().err)
    assert len(left) == 8  # a line for every step, none in minutes, hours or days
    assert all(float(seconds.removesuffix("s")) < 60 for seconds in left)


def test_a_run_that_goes_on_an_hour_earlier_repeats_the_digits_of_an_unbroken_one(run, tmp_path, monkeypatch):
    run = dataclasses.replace(run, optim=MuonConfig(lr=0.02))
    unbroken = train(run, runs_dir=tmp_path / "steady", console=False)
    first = jumped(dataclasses.replace(run, steps=4), tmp_path / "runs", monkeypatch)
    second = jumped(run, tmp_path / "runs", monkeypatch)
    folder = Path(second["run_dir"])
    assert second["run_dir"] == first["run_dir"]
    assert [event["kind"] for event in read_events(folder)].count("resume") == 1
    assert losses(second) == losses(unbroken)
    assert second["validation_loss"] == unbroken["validation_loss"]
    assert [step for step, _ in list_checkpoints(folder)] == [6, 8]


def test_a_lock_holds_whatever_the_clock_says(run, tmp_path, monkeypatch):
    folder = run_dir(run, tmp_path / "runs")
    with RunLock(folder), pytest.raises(ValueError, match="is in use by process"):
        jumped(run, tmp_path / "runs", monkeypatch)
