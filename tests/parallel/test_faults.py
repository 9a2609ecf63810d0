"""Faults of one process among several: all end in time, one line says who and why, exit codes tell the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pithwood.parallel.faults import OTHER_FAILED, Watch
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.verdicts import Bounds
from tests.parallel.doomed import BOUNDS, Ended, run_doomed

SOON_S = 3.0
"""What starting, printing and leaving may take beside the bounds on a busy machine."""


def assert_others_left_quietly(ended: Ended, culprit: int, within_s: float) -> None:
    """Every process but the culprit left with the code for that, in time, and nothing but the one line was printed."""
    for rank, code in enumerate(ended.codes):
        if rank != culprit:
            assert code == OTHER_FAILED, (rank, ended.codes, ended.errors)
            assert ended.seconds[rank] < within_s + SOON_S, ended.seconds
    assert len(ended.lines) == 1, ended.lines


LEAVING_S = BOUNDS["grace_s"] + 3.5 * BOUNDS["beat_s"]
"""From a verdict until the last process has left: that it is read, the grace period, and a store that stays a while."""


@pytest.mark.parametrize("rank", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_all_and_is_named(rank):
    ended = run_doomed(3, {"what": "kill", "rank": rank, "step": 30})
    assert ended.codes[rank] == -9
    assert_others_left_quietly(ended, rank, 2 * BOUNDS["beat_s"] + LEAVING_S)
    line = ended.error_line()
    assert line.startswith(f"rank {rank} of 3 (")
    assert f"process {ended.pids[rank]})" in line
    assert ("died without a word (killed, or out of memory)" if rank else "is gone or stopped") in line
    assert re.search(r"last heard of in step \d+ (begins|forward|exchange)", line)


@pytest.mark.parametrize(
    ("kind", "rank", "code"), [("ValueError", 1, 2), ("MemoryError", 0, 3), ("RuntimeError", 2, 1)]
)
def test_an_error_is_told_once_by_the_process_where_it_came_first(kind, rank, code):
    ended = run_doomed(3, {"what": "raise", "kind": kind, "rank": rank, "step": 4})
    assert ended.codes == [code if other == rank else OTHER_FAILED for other in range(3)]
    assert max(ended.seconds) < 2 * BOUNDS["beat_s"] + LEAVING_S + SOON_S
    assert ended.error_line().endswith(
        "failed in step 4 forward: " + ("RuntimeError: " if kind == "RuntimeError" else "") + "the data is not there"
    )
    # words that explain themselves need no traceback; the others' errors of broken exchanges are never shown
    tracebacks = [line for line in ended.lines if line.startswith("Traceback")]
    assert len(tracebacks) == (kind == "RuntimeError")
    assert not [text for other, text in enumerate(ended.errors) if other != rank and text]


def test_an_interruption_ends_all():
    ended = run_doomed(2, {"what": "interrupt", "rank": 1, "step": 4})
    assert ended.codes == [OTHER_FAILED, 130]
    assert ended.error_line().endswith("failed in step 4 forward: interrupted")


@pytest.mark.parametrize(
    ("rank", "exchange_s"),
    [pytest.param(0, None, marks=pytest.mark.slow), (1, None), pytest.param(1, 60.0, marks=pytest.mark.slow)],
)
def test_a_hang_is_named_with_rank_phase_and_place(rank, exchange_s):
    """exchange_s: the others may wait for long, which excuses nobody."""
    limit = 1.5
    ended = run_doomed(3, {"what": "hang", "rank": rank, "step": 30, "exchange_s": exchange_s}, {"hang_s": limit})
    assert_others_left_quietly(ended, rank, limit + 6 * BOUNDS["beat_s"] + LEAVING_S)
    assert min(ended.seconds) > limit
    assert ended.codes[rank] == OTHER_FAILED
    line = ended.error_line()
    assert line.startswith(f"rank {rank} of 3")
    assert re.search(r"hangs in step 30 forward for \d s, at parallel/doomed.py:\d+ \(misfortune\)", line)
    assert line.endswith("while 2 others wait")


@pytest.mark.slow
def test_a_hang_before_the_first_step_has_the_time_of_the_start():
    limit = 3.0
    ended = run_doomed(2, {"what": "hang", "rank": 1, "step": -1}, {"hang_s": 0.5, "startup_s": limit})
    assert ended.codes == [OTHER_FAILED, OTHER_FAILED]
    assert limit < min(ended.seconds) < limit + 6 * BOUNDS["beat_s"] + LEAVING_S + SOON_S
    assert "rank 1 of 2" in ended.error_line()
    assert "hangs in start" in ended.error_line()


@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("freeze", 0),
        ("hang holding the interpreter", 1),
        pytest.param("freeze", 1, marks=pytest.mark.slow),
        pytest.param("hang holding the interpreter", 0, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_cannot_answer_is_named_and_the_others_end(what, rank):
    ended = run_doomed(3, {"what": what, "rank": rank, "step": 30})
    assert_others_left_quietly(ended, rank, BOUNDS["silent_s"] + 3 * BOUNDS["beat_s"] + LEAVING_S)
    assert ended.codes[rank] == (-9 if what == "freeze" else 1)
    assert re.match(rf"rank {rank} of 3 \(.*(has not answered for \d s|is gone or stopped)", ended.error_line())


@pytest.mark.slow
def test_a_process_that_saves_alone_for_long_is_no_hang_and_no_straggler():
    fault = {"what": "save", "rank": 0, "step": 10, "seconds": 4.0}
    # of one window, but three times the others': a busy machine starves a process by a fifth, the save is far more
    bounds = {"hang_s": 2.0, "straggler_share": 2.0, "straggler_windows": 1}
    ended = run_doomed(3, fault, bounds, steps=150)
    assert ended.codes == [0, 0, 0]
    assert not ended.lines


def test_those_that_waited_for_one_that_saves_have_time_to_go_on():
    # the sleep of all that follows lies in the phase in which the others are late already
    fault = {"what": "save", "rank": 0, "step": 10, "seconds": 3.0, "then": 1.2}
    ended = run_doomed(3, fault, {"hang_s": 2.0}, steps=30)
    assert ended.codes == [0, 0, 0], ended.errors


@pytest.mark.slow
def test_a_starved_process_is_reported_once_and_the_run_goes_on():
    ended = run_doomed(3, {"what": "slow", "rank": 1, "step": 4, "seconds": 0.04}, steps=100)
    assert ended.codes == [0, 0, 0]
    (line,) = ended.lines
    found = re.match(r"WARNING: rank 1 of 3 \(.*\) is slow: (\S+) s of work in a step, (\d+)% over the median", line)
    assert found
    # 60 ms against 20 ms of sleep
    assert 0.05 < float(found[1]) < 0.12
    assert int(found[2]) > 100


def test_all_processes_stop_after_the_same_step_when_one_is_told_to(tmp_path):
    ended = run_doomed(3, {"what": "signal", "rank": 1, "step": 10, "folder": str(tmp_path)})
    assert ended.codes == [0, 0, 0]
    assert not ended.lines
    # the step after the one in which the signal came
    assert [(tmp_path / f"done.{rank}").read_text() for rank in range(3)] == ["11"] * 3


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import start_mesh, stop_mesh
from pithwood.parallel.verdicts import Bounds

torch.set_num_threads(1)
saved = Path(sys.argv[1])
mesh = start_mesh(MeshConfig(dp_shard=2), torch.device("cpu"))
with Watch(mesh, bounds=Bounds(beat_s=0.2, silent_s=6.0, grace_s=0.6)) as watch:
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start, 12):
        watch.step(step)
        watch.phase("forward")
        if (mesh.rank, step, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, 7, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.ones(1)
        mesh.world.all_reduce(total)
        if mesh.is_first and (step + 1) % 5 == 0:
            saved.write_text(str(step + 1))
    if mesh.is_first:
        print(f"went from step {start} to 12", file=sys.stderr, flush=True)
stop_mesh(mesh)
"""


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
                   "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
    done = subprocess.run(
        [*words, str(tmp_path / "program.py"), str(tmp_path / "saved")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "went from step 5 to 12" in done.stderr
    # although torchrun sends SIGTERM to the other at once
    assert len(re.findall(r"pithwood: error: rank 1 of 2 \(.*died without a word", done.stderr)) == 1, done.stderr


def test_bad_input_is_told_once_by_processes_that_all_refuse_it(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pithwood"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "train", "debug", "mesh.dp_shard=3"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("pithwood: error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pithwood: error: rank 0: ")


@pytest.mark.quick
def test_a_single_process_is_not_watched_and_its_errors_stay_its_own():
    def fail() -> None:
        with Watch(Mesh.single()) as watch:
            watch.step(0)
            watch.phase("forward")
            assert not watch.active
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()


@pytest.mark.quick
def test_the_bounds_of_a_run_end_every_process_within_half_a_minute_of_a_death():
    b = Bounds()
    # heard last just after a beat; judged and read a beat later each; the process of a store stays a little longer
    assert b.silent_s + 3 * b.beat_s + b.grace_s + 2.5 * b.beat_s < 30


@pytest.mark.quick
def test_the_step_after_a_change_of_what_is_computed_may_take_as_long_as_a_first_one():
    watch = Watch(Mesh.single())
    assert watch._limit() == watch.bounds.startup_s
    for step in range(3):
        watch.step(step)
    assert watch._limit() == watch.bounds.hang_s
    watch.begin_anew()
    watch.step(3)
    assert watch._limit() == watch.bounds.startup_s
    watch.step(4)
    assert watch._limit() == watch.bounds.hang_s
