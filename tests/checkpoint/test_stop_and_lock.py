"""Signals set a flag, and one process holds a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pithwood.checkpoint.lock import RunLock
from pithwood.checkpoint.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop
        assert stop.signal_name is None
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal_number == number
        assert stop.signal_name == number.name
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_interrupt_raises_and_a_second_sigterm_does_not():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, "again"), (signal.SIGTERM, "twice")])
def test_the_first_signal_is_answered_at_once_in_one_line(number, again, capfd):
    with StopRequest(tell=True) as stop:
        signal.raise_signal(number)
        assert stop.requested
        told = capfd.readouterr().err
        signal.raise_signal(signal.SIGTERM)
    assert told == (f"{number.name}: stopping after this step, then saving; Ctrl-C {again} ends it at once, unsaved\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_that_can_be_taken_up_again_ends_at_once(number, capfd):
    done = []

    def work() -> str:
        done.append("begun")
        signal.raise_signal(number)
        done.append("ended")
        return "result"

    with StopRequest(tell=True) as stop:
        assert stop.unless_stopped(lambda: "result") == "result"
        assert stop.unless_stopped(work) is None
        assert stop.signal_number == number
        assert stop.unless_stopped(work) is None  # it was asked already
        assert done == ["begun"]
    assert capfd.readouterr().err == f"{number.name}: stopping; the same command goes on from here\n"


def test_after_such_work_a_signal_is_a_request_again():
    with StopRequest() as stop:
        stop.unless_stopped(lambda: None)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


PRINTS_WITHOUT_END = """
import sys
from pithwood.checkpoint.signals import StopRequest
with StopRequest(tell=True) as stop:
    while not stop:
        print("x" * 200, file=sys.stderr, flush=True)
print("stopped")
"""


def test_a_signal_in_the_middle_of_a_print_does_no_harm():
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS_WITHOUT_END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()
    # the pipe is full by then, so that the signal meets a write that waits
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "stopped\n")
    assert "SIGTERM: stopping after this step" in err
    assert "Traceback" not in err


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_are_refused():
    caught = []

    def enter() -> None:
        try:
            StopRequest().__enter__()
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


HOLDER = """
import sys, pathlib
from pithwood.checkpoint.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_locked_folder_names_its_holder_and_a_killed_holder_lets_go(tmp_path):
    run_dir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .*another folder"), RunLock(run_dir):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunLock(run_dir):
        assert (run_dir / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_free_after_the_block(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} "), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("left", ["process 1 on host\n", ""])
def test_a_folder_in_which_nothing_came_to_be_goes_with_its_lock(tmp_path, left):
    run_dir = tmp_path / "runs" / "run"
    with RunLock(run_dir):
        (run_dir / "checkpoints").mkdir()
    assert not (tmp_path / "runs").exists()
    # as a killed process leaves it
    run_dir.mkdir(parents=True)
    (run_dir / ".lock").write_text(left)
    with RunLock(run_dir):
        pass
    assert not run_dir.exists()
    assert run_dir.parent.exists()


def test_a_folder_that_holds_or_held_anything_stays(tmp_path):
    (tmp_path / "empty").mkdir()
    with RunLock(tmp_path / "empty"):
        pass
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").touch()
    with RunLock(tmp_path / "own"):
        pass
    assert (tmp_path / "empty").is_dir()
    assert (tmp_path / "own" / "notes.txt").is_file()
