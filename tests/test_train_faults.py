"""A training run of two processes that is told to stop, then loses a process, ends where an unbroken one ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 100
SMALL = ["seq_len=128", "samples_per_step=4", "samples_per_micro_batch=2", "data.max_bytes=200_000"]
RUN = ["debug", "device=cpu", "mesh.dp_shard=2", f"steps={STEPS}", "log_every=5", "validate_every=1000", *SMALL]
ENDS_S = 400
"""Seconds that a run may take on a busy machine."""


def launch(folder: Path, restarts: int, every: int) -> subprocess.Popen[str]:
    """`pithwood launch` of RUN with two processes; every: steps between checkpoints."""
    words = [sys.executable, "-m", "pithwood", "launch", *RUN, f"checkpoint_every={every}", "--runs-dir", str(folder)]
    words += ["--nodes", "1", "--gpus-per-node", "2", "--max-restarts", str(restarts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PITHWOOD_TRACEBACK": ""}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def worker(launched: subprocess.Popen[str], rank: int) -> int:
    """The number of the training process of a rank below a launched command."""
    family = {launched.pid}
    for _ in range(4):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            if int(fields[1]) in family:
                family.add(int(stat.parent.name))
    for number in sorted(family):
        if f"RANK={rank}" in Path(f"/proc/{number}/environ").read_text().split("\0"):
            return number
    raise AssertionError(f"no process of rank {rank} among {family}")


def events(folder: Path) -> list[dict[str, Any]]:
    """What the run in a folder has written so far."""
    return [json.loads(line) for path in folder.glob("debug-*/events.jsonl") for line in path.read_text().splitlines()]


def wait_until(folder: Path, kind: str, step: int) -> None:
    """Return when an event of a kind was written at that step or later."""
    end = time.monotonic() + ENDS_S
    while not any(event["kind"] == kind and event["step"] >= step for event in events(folder)):
        assert time.monotonic() < end, events(folder)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_lost_a_process_ends_where_an_unbroken_one_ends(tmp_path):
    broken = tmp_path / "broken"
    # SIGTERM reaches one process; both save and leave after the same step
    with launch(broken, restarts=0, every=1000) as first:
        wait_until(broken, "train", 5)
        os.kill(worker(first, 1), signal.SIGTERM)
        assert "pithwood: error" not in first.communicate(timeout=ENDS_S)[1]
    (saved,) = (event["step"] for event in events(broken) if event["kind"] == "checkpoint")
    assert 5 < saved < STEPS

    # the same command goes on from there; a process is killed, and torchrun starts all of them again
    with launch(broken, restarts=1, every=5) as second:
        wait_until(broken, "checkpoint", saved + 5)
        os.kill(worker(second, 1), signal.SIGKILL)
        said = second.communicate(timeout=ENDS_S)[1]
    assert second.returncode == 0, said
    (line,) = re.findall(r"pithwood: error: .*", said)
    assert re.search(r"rank 1 of 2 \(.*\) died without a word", line)
    assert next(event["step"] for event in events(broken) if event["kind"] == "resume") == saved

    whole = tmp_path / "whole"
    shutil.copytree(broken / "corpora", whole / "corpora")
    with launch(whole, restarts=0, every=1000) as third:
        assert third.communicate(timeout=ENDS_S)[1]
    assert third.returncode == 0

    def losses(folder: Path) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in events(folder) if event["kind"] == "train"}

    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == STEPS
