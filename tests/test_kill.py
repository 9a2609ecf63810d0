"""A trainer that is killed at any moment loses at most the steps since its last save, and repeats the unbroken run's
digits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pithwood.checkpoint.load import list_checkpoints, verify_checkpoint
from pithwood.observe.events import read_events

STEPS, SAVE_EVERY = 40, 4
KILLS = 10

SCRIPT = """
import dataclasses, sys
from pathlib import Path
from tests.test_train import small_run
from pithwood.train import train
run = small_run(Path(sys.argv[1]))
run = dataclasses.replace(run, steps=int(sys.argv[3]), checkpoint_every=int(sys.argv[4]), log_every=1)
train(run, runs_dir=Path(sys.argv[2]), console=False)
"""


def start(corpus: Path, runs: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(runs), str(STEPS), str(SAVE_EVERY)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"})


def run_folder(runs: Path) -> Path | None:
    return next((path for path in runs.glob("small-*") if path.is_dir()), None)


def trained(folder: Path) -> list[tuple[int, float, float]]:
    return [
        (e["step"], e["loss"], e["grad_norm"]) for e in read_events(folder / "events.jsonl") if e["kind"] == "train"
    ]


def last_line(folder: Path | None) -> int:
    try:
        return trained(folder)[-1][0] if folder else 0
    except (OSError, ValueError, IndexError):
        return 0


@pytest.mark.slow
def test_ten_kills_mid_save_included_leave_the_losses_of_an_unbroken_run(tmp_path):
    corpus = tmp_path / "text"
    assert start(corpus, tmp_path / "unbroken").wait(timeout=300) == 0
    unbroken_folder = run_folder(tmp_path / "unbroken")
    assert unbroken_folder is not None
    expected = trained(unbroken_folder)
    assert [step for step, _, _ in expected] == list(range(1, STEPS + 1))

    runs, rng = tmp_path / "killed", random.Random(0)
    mid_save = kills = 0
    while kills < KILLS:
        process = start(corpus, runs)
        # every second kill waits for a save in progress (its temporary folder), the others for a random moment after
        # some progress
        begun, deadline = last_line(run_folder(runs)), time.monotonic() + 120
        want_save = kills % 2 == 1
        while time.monotonic() < deadline and process.poll() is None:
            folder = run_folder(runs)
            saving = folder is not None and any((folder / "checkpoints").glob(".tmp-*"))
            if saving and want_save:
                break
            if not want_save and last_line(folder) > begun + rng.randint(0, 3):
                time.sleep(rng.random() * 0.05)
                break
            time.sleep(0.0005 if want_save else 0.002)
        if process.poll() is not None:
            pytest.fail(f"the trainer ended by itself with code {process.returncode} after {kills} kills: raise STEPS")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        folder = run_folder(runs)
        if folder is not None:
            mid_save += any((folder / "checkpoints").glob(".tmp-*"))
            saved = dict(list_checkpoints(folder))
            for path in saved.values():
                verify_checkpoint(path)
            assert last_line(folder) - max(saved, default=0) <= SAVE_EVERY
    assert mid_save >= 1, "no kill fell into a save: the test did not test what it says"

    assert start(corpus, runs).wait(timeout=300) == 0
    folder = run_folder(runs)
    assert folder is not None
    assert trained(folder) == expected
    first, second = (json.loads((f / "summary.json").read_text()) for f in (unbroken_folder, folder))
    assert first["validation_loss"] == second["validation_loss"]
    assert (folder / "sample.txt").read_text() == (unbroken_folder / "sample.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_polite_signal_saves_and_the_next_command_goes_on(tmp_path, number):
    corpus, runs = tmp_path / "text", tmp_path / "runs"
    process = start(corpus, runs)
    deadline = time.monotonic() + 120
    while last_line(run_folder(runs)) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=240) == 0
    folder = run_folder(runs)
    assert folder is not None
    stopped = last_line(folder)
    assert 5 <= stopped < STEPS
    assert max(dict(list_checkpoints(folder))) == stopped
