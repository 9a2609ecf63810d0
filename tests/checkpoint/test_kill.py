"""A writer may be killed at any moment: the newest checkpoint is whole, and only steps since the last save are lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints, load_checkpoint
from pithwood.checkpoint.save import clean_leftovers, save_checkpoint

# Imports once and forks a writer for each line on stdin. A writer says "saving N" before and "saved N" after each save.
# "loop" saves for ever, every third save repeats the step of the one before it. "once" saves step 20, then replaces it,
# and kills itself before its n-th operation on the file system.
WRITERS = """
import json, os, pathlib, signal, sys, torch
from pithwood.checkpoint.load import latest_checkpoint, load_checkpoint
from pithwood.checkpoint.lock import RunLock
from pithwood.checkpoint.save import clean_leftovers, save_checkpoint
torch.set_num_threads(1)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def save(run_dir, step, **keep):
    say("saving", step)
    tensors = {f"layer{i}": torch.full((20_000,), float(step + i)) for i in range(5)}
    save_checkpoint(run_dir, step, tensors, {"tokens": 10 * step}, **keep)
    say("saved", step)

def loop(run_dir):
    with RunLock(run_dir):
        clean_leftovers(run_dir)
        path = latest_checkpoint(run_dir)
        step = 0 if path is None else load_checkpoint(path, names=[])[1]["step"]
        say("started", step)
        count = 0
        while True:
            count += 1
            step += count % 3 > 0
            save(run_dir, step, keep=1, keep_every=40)

def once(run_dir, nth):
    left = nth
    def count(event, arguments):
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    save(run_dir, 20, keep=1)
    save(run_dir, 20, keep=1)

for line in sys.stdin:
    task = json.loads(line)
    pid = os.fork()
    if pid == 0:
        run_dir = pathlib.Path(task["run_dir"])
        loop(run_dir) if task["nth"] is None else once(run_dir, task["nth"])
        os._exit(0)
    say("pid", pid)
    say("dead", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@contextmanager
def writers() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], run_dir: Path, nth: int | None) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"run_dir": str(run_dir), "nth": nth}) + "\n")
    process.stdin.flush()


def read_until(process: subprocess.Popen[str], words: set[str]) -> dict[str, list[int]]:
    """The numbers said after each word, up to the line with which all of `words` have been said."""
    assert process.stdout is not None
    said: dict[str, list[int]] = {}
    while not words <= said.keys():
        line = process.stdout.readline()
        assert line, "the writers died"
        word, number = line.split()
        said.setdefault(word, []).append(int(number))
    return said


def check_whole(run_dir: Path) -> int:
    """Step of the newest checkpoint after cleaning up; its content and that of all others must be right."""
    clean_leftovers(run_dir)
    assert latest_checkpoint(run_dir) is not None
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [path.name for _, path in list_checkpoints(run_dir)]
    step = -1
    for step, path in list_checkpoints(run_dir):
        tensors, state = load_checkpoint(path)
        assert state["step"] == step
        assert state["tokens"] == 10 * step
        for i in range(5):
            assert tensors[f"layer{i}"].equal(torch.full((20_000,), float(step + i)))
    return step


def test_killed_at_random_moments_the_latest_checkpoint_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng, num_kills = random.Random(0), 30
    start, mid_save = 0, 0
    with writers() as process:
        for _ in range(num_kills):
            ask(process, tmp_path, None)
            # One save makes sure that every round moves; from there on the moment is arbitrary.
            before = read_until(process, {"pid", "saved"})
            assert before["started"] == [start]
            time.sleep(rng.uniform(0, 0.05))
            subprocess.run(["kill", "-KILL", str(before["pid"][0])], check=True)
            after = read_until(process, {"dead"})
            assert after["dead"] == [-signal.SIGKILL]
            saving = [*before["saving"], *after.get("saving", [])]
            saved = [*before["saved"], *after.get("saved", [])]
            mid_save += len(saving) > len(saved)
            start = check_whole(tmp_path)
            assert max(saved) <= start <= max(saving)
    # Unless most kills hit a save, the test would say little.
    assert mid_save >= num_kills // 2
    assert capsys.readouterr().err == "", "a checkpoint was found damaged"


def test_killed_before_any_file_operation_the_latest_checkpoint_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors = {f"layer{i}": torch.full((20_000,), 10.0 + i) for i in range(5)}
    with writers() as process:
        for nth in range(1, 200):
            run_dir = tmp_path / str(nth)
            save_checkpoint(run_dir, 10, tensors, {"tokens": 100})
            ask(process, run_dir, nth)
            said = read_until(process, {"pid", "dead"})
            step = check_whole(run_dir)
            assert step == 20 if "saved" in said else step in (10, 20), nth
            if said["dead"] == [0]:
                break
            assert said["dead"] == [-signal.SIGKILL]
    # Two saves make at least: folder, three files, hashes, syncs, rename; then the old one is removed.
    assert said["dead"] == [0]
    assert nth > 30
    assert capsys.readouterr().err == "", "a checkpoint was found damaged"
