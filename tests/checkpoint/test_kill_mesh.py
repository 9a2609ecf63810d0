"""Processes of a mesh may be killed at any moment of a save beside the training: what was saved before is whole."""

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

from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints, load_checkpoint
from pithwood.checkpoint.save import clean_leftovers
from tests.checkpoint.synthetic import whole_tensor
from tests.checkpoint.test_kill import read_until

# Imports once and forks a mesh of two processes for each line on stdin. Weights of step s are those of step 0 plus s.
# "loop" resumes, then trains and saves every step for ever; the first process says "saving N" when a save has begun and
# "saved N" when it is complete. "once" saves step 1, then step 2 twice, and one process kills itself before its n-th
# operation on the file system after step 1. When one process has died the other is ended, as a watchdog would; by
# SIGTERM, so that "dead N", the exit code of the process named in "rank", tells this end from a SIGKILL and from an
# exception. Which of the two is waited for first says nothing: both may have died by then.
WRITERS = """
import json, os, pathlib, signal, sys, time, torch
import torch.distributed as dist
from pithwood.checkpoint.background import begin_save
from pithwood.checkpoint.load import latest_checkpoint, load_checkpoint
from pithwood.checkpoint.save import clean_leftovers
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import join_mesh
from tests.checkpoint.synthetic import held_on
torch.set_num_threads(1)
CFG = MeshConfig(dp_shard=2, ep=2)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def kill_before(nth):
    left = nth
    def count(event, arguments):
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

def train(task, rank):
    run_dir = pathlib.Path(task["run_dir"])
    mesh = join_mesh(CFG, torch.device("cpu"), rank, 2, dist.FileStore(task["store"], 2))
    if rank == 0:
        clean_leftovers(run_dir)
    mesh.world.barrier()
    held, step, saving = held_on(mesh, filled=True), 0, None
    path = latest_checkpoint(run_dir, mesh)
    if path is not None:
        _, state = load_checkpoint(path, held, mesh=mesh, verify=False)
        step = state["step"]
    if rank == 0:
        say("started", step)
    while task["nth"] is None or step < 2:
        step += 1
        for part in held.values():
            part.tensor.add_(1)
        mesh.world.all_reduce(torch.ones(1))
        for again in range(1 if task["nth"] is None or step == 1 else 2):
            before = saving
            saving = begin_save(run_dir, step, held, {"tokens": 10 * step}, keep=1, mesh=mesh, after=before)
            if rank == 0 and before is not None:
                say("saved", before.step)
            if rank == 0:
                say("saving", step)
        if step == 1 and task["nth"] is not None:
            saving.wait()
            mesh.world.barrier()
            if rank == task["rank"]:
                kill_before(task["nth"])
    saving.wait()
    if rank == 0:
        say("saved", step)
    mesh.world.barrier()

for line in sys.stdin:
    task = json.loads(line)
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                train(task, rank)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
        say(f"pid{rank}", pid)
    first, status = os.wait()
    if status:
        os.kill(sum(children) - first, signal.SIGTERM)
    ended = dict([(first, status), os.wait()])
    say("dead", os.waitstatus_to_exitcode(ended[children[task["rank"]]]))
"""


@contextmanager
def writers() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], **task: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()


def check_whole(run_dir: Path) -> int:
    """Step of the newest checkpoint after cleaning up; its content and that of all others must be right."""
    clean_leftovers(run_dir)
    assert latest_checkpoint(run_dir) is not None
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [path.name for _, path in list_checkpoints(run_dir)]
    step = -1
    for step, path in list_checkpoints(run_dir):
        tensors, state = load_checkpoint(path)
        assert state["tokens"] == 10 * step
        for name, tensor in tensors.items():
            expected = whole_tensor(name)
            for _ in range(step):
                expected += 1
            assert tensor.equal(expected), name
    return step


def test_a_mesh_killed_at_random_moments_goes_on_from_its_last_checkpoint(tmp_path: Path, capsys):
    rng, num_kills, start, mid_save = random.Random(0), 12, 0, 0
    with writers() as process:
        for count in range(num_kills):
            store, rank = str(tmp_path / f"store{count}"), count % 2
            ask(process, run_dir=str(tmp_path / "run"), store=store, nth=None, rank=rank)
            # one save makes sure that every round moves; from there on the moment is arbitrary
            before = read_until(process, {"pid0", "pid1", "saved"})
            assert before["started"] == [start]
            time.sleep(rng.uniform(0, 0.05))
            subprocess.run(["kill", "-KILL", str(before[f"pid{rank}"][0])], check=True)
            after = read_until(process, {"dead"})
            assert after["dead"] == [-signal.SIGKILL]
            saving, saved = ([*before[word], *after.get(word, [])] for word in ("saving", "saved"))
            mid_save += saving[-1] > saved[-1]
            start = check_whole(tmp_path / "run")
            assert saved[-1] <= start <= saving[-1]
    # unless most kills hit a save, the test would say little
    assert mid_save >= num_kills // 2
    assert capsys.readouterr().err == "", "a checkpoint was found damaged"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, capsys, rank):
    with writers() as process:
        # of the first process's many operations every other one, the second save being like the first
        for nth in range(1, 200, 2 - rank):
            ask(process, run_dir=str(tmp_path / str(nth)), store=str(tmp_path / f"store{nth}"), nth=nth, rank=rank)
            said = read_until(process, {"dead"})
            step = check_whole(tmp_path / str(nth))
            assert step == 2 if 2 in said.get("saved", []) else step in (1, 2), nth
            if said["dead"] == [0]:
                break
            assert said["dead"] == [-signal.SIGKILL]
    assert said["dead"] == [0]
    # the first process makes folders, the manifest and renames; the other a file, its listing, and reads the outcome
    assert nth > (30 if rank == 0 else 8)
    assert capsys.readouterr().err == "", "a checkpoint was found damaged"
