"""Faults in real runs, `pithwood train` under torchrun: all end in time, one line says why, and it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints
from pithwood.observe.events import read_events

ROOT = Path(__file__).parents[2]
RECIPE = f"{ROOT}/tests/parallel/doomed_recipe.py:doomed"
ENDED_S = 30.0
"""From a fault until every process has ended."""


@dataclass
class Launched:
    """A run under torchrun that has ended."""

    code: int
    err: str
    seconds: float
    """From the fault until the launcher ended, or from the start if there was no fault."""

    def error_line(self) -> str:
        """The one line that says why the run ended; AssertionError if there are more, or none."""
        found = [line for line in self.err.splitlines() if line.startswith("pithwood: error: ")]
        assert len(found) == 1, self.err
        return found[0].removeprefix("pithwood: error: ")


def launch(
    folder: Path,
    fault: dict[str, Any] | None = None,
    *,
    settings: Sequence[str] = (),
    options: Sequence[str] = (),
    bounds: str = "",
    meddle: Callable[[subprocess.Popen[str], Path], None] | None = None,
) -> Launched:
    """Run the doomed recipe on two processes in `folder`.

    fault    see doomed_recipe.py; None: none
    bounds   the variable PITHWOOD_BOUNDS
    meddle   is given the launcher and the folder while it runs; its return is the moment of the fault
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    words += ["-m", "pithwood", "train", RECIPE, "data.max_bytes=200_000", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PITHWOOD_BOUNDS": bounds}
    if fault is not None:
        environment["MISFORTUNE"] = json.dumps({"folder": str(folder), **fault})
    moment = folder / "fault"
    moment.unlink(missing_ok=True)
    log = folder / "stderr"
    with log.open("w") as err:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=err, stderr=err, text=True)
        began = time.time()
        try:
            if meddle is not None:
                meddle(process, folder)
                began = time.time()
            code = process.wait(timeout=120)
        finally:
            process.kill()
    if moment.exists():
        began = moment.stat().st_mtime
    return Launched(code, log.read_text(), time.time() - began)


def run_folder(folder: Path) -> Path:
    return next(path for path in (folder / "runs").glob("doomed-*") if path.is_dir())


def losses(folder: Path) -> dict[int, float]:
    """Of the steps in the log."""
    return {event["step"]: event["loss"] for event in read_events(run_folder(folder) / "events.jsonl")
            if event["kind"] == "train"}  # fmt: skip


def rank_processes(launcher: int) -> dict[int, int]:
    """Process ids by rank of what a launcher started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            environment = entry.joinpath("environ").read_bytes() if parent == launcher else b""
        except (OSError, ValueError, IndexError):
            continue
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", environment)
        if rank:
            found[int(rank[1])] = int(entry.name)
    return found


def wait_for(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Until it is true; AssertionError if the run ends first."""
    while not true():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[int, float]:
    """Losses of the run to which nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = launch(folder)
    assert done.code == 0, done.err
    found = losses(folder)
    assert list(found) == list(range(1, 17))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_same_command_goes_on(tmp_path, unbroken, rank):
    ended = launch(tmp_path, {"what": "kill", "rank": rank, "micro_batch": 22})
    assert ended.code != 0
    assert ended.seconds < ENDED_S
    line = ended.error_line()
    assert line.startswith(f"rank {rank} of 2 (")
    assert "died without a word" in line or "is gone or stopped" in line
    assert "last heard of in step" in line or "last heard of in start" in line
    done = launch(tmp_path)
    assert done.code == 0, done.err
    assert "resuming after step 8" in done.err
    assert losses(tmp_path) == unbroken


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_and_is_told_once(tmp_path):
    ended = launch(tmp_path, {"what": "raise", "kind": "ValueError", "rank": 1, "micro_batch": 5})
    assert ended.code != 0
    assert ended.seconds < ENDED_S
    line = ended.error_line()
    assert line.startswith("rank 1 of 2 (")
    assert line.endswith("failed in step 2 forward and backward: the data is not there")
    assert ended.err.count("the data is not there") == 1


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(tmp_path, unbroken):
    def stop(process: subprocess.Popen[str], folder: Path) -> None:
        wait_for(lambda: "step 5/" in (folder / "stderr").read_text(), process)
        process.send_signal(signal.SIGTERM)

    stopped = launch(tmp_path, meddle=stop)
    assert stopped.seconds < ENDED_S
    assert "pithwood: error" not in stopped.err
    last = max(losses(tmp_path))
    assert 5 <= last < 16
    assert max(dict(list_checkpoints(run_folder(tmp_path)))) == last
    done = launch(tmp_path)
    assert done.code == 0, done.err
    assert f"resuming after step {last}" in done.err
    assert losses(tmp_path) == unbroken


@pytest.mark.slow
def test_the_launcher_starts_a_killed_run_again_from_its_last_checkpoint(tmp_path, unbroken):
    fault = {"what": "kill", "rank": 1, "micro_batch": 22}
    done = launch(tmp_path, fault, options=["--max-restarts", "1"])
    assert done.code == 0, done.err
    assert done.error_line().startswith("rank 1 of 2 (")
    assert "resuming after step 8" in done.err
    assert losses(tmp_path) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path, unbroken, rank):
    def kill(process: subprocess.Popen[str], folder: Path) -> None:
        checkpoints = folder / "runs"
        wait_for(lambda: any(checkpoints.glob("doomed-*/checkpoints/.tmp-step-00000003-*/step-*")), process)
        os.kill(rank_processes(process.pid)[rank], signal.SIGKILL)

    ended = launch(tmp_path, settings=["checkpoint_every=1"], meddle=kill)
    assert ended.code != 0
    assert ended.seconds < ENDED_S
    assert ended.error_line().startswith(f"rank {rank} of 2 (")
    left = latest_checkpoint(run_folder(tmp_path))
    assert left is not None
    last = int(left.name.removeprefix("step-"))
    # the third was under way; it may have come to its end after all
    assert last in (2, 3)
    done = launch(tmp_path, settings=["checkpoint_every=1"])
    assert done.code == 0, done.err
    assert f"resuming after step {last}" in done.err
    assert losses(tmp_path) == unbroken


@pytest.mark.slow
def test_a_hang_is_named_with_rank_phase_and_place(tmp_path):
    ended = launch(tmp_path, {"what": "hang", "rank": 1, "micro_batch": 9}, bounds="hang_s=3,grace_s=1")
    assert ended.code != 0
    assert 3 < ended.seconds < ENDED_S
    line = ended.error_line()
    assert line.startswith("rank 1 of 2 (")
    assert re.search(r"hangs in step 4 forward and backward for \d+ s, at parallel/doomed.py:\d+ \(misfortune\)", line)
    assert line.endswith("while 1 other waits")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_is_named(tmp_path, rank):
    def free(process: subprocess.Popen[str], folder: Path) -> None:
        wait_for((folder / "fault").exists, process)

    fault = {"what": "freeze", "rank": rank, "micro_batch": 9}
    ended = launch(tmp_path, fault, bounds="beat_s=0.5,silent_s=4,grace_s=1", meddle=free)
    assert ended.code != 0
    assert re.match(rf"rank {rank} of 2 \(.*(has not answered for \d+ s|is gone or stopped)", ended.error_line())
