"""Processes for tests of faults: a small loop of exchanges under a `Watch`, with one thing that goes wrong in it.

ended = run_doomed(3, {"what": "kill", "rank": 1, "step": 4})
assert ended.codes == [4, -9, 4]

They are forked off a server that has torch loaded, so that each takes a moment and not seconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BOUNDS = {"beat_s": 0.2, "silent_s": 4.0, "hang_s": 4.0, "startup_s": 8.0, "grace_s": 0.6, "sample_s": 0.02,
          "window_s": 1.0, "straggler_windows": 2}  # fmt: skip
"""Seconds in place of minutes."""


@dataclass
class Ended:
    """How the processes ended."""

    codes: list[int | None]
    """Exit codes by rank, negative for a signal; None: it had to be killed by the test."""
    errors: list[str]
    """What each printed on stderr, without what torch's own network code logs."""
    seconds: list[float]
    """From the fault until each ended."""
    pids: list[int]

    @property
    def lines(self) -> list[str]:
        """All lines of all processes."""
        return [line for text in self.errors for line in text.splitlines()]

    def error_line(self) -> str:
        """The one line that says why the run ended; AssertionError if there are more, or none."""
        found = [line for line in self.lines if line.startswith("pithwood: error: ")]
        assert len(found) == 1, "\n".join(self.errors)
        return found[0].removeprefix("pithwood: error: ")


def run_doomed(
    size: int, fault: dict[str, Any], bounds: dict[str, Any] | None = None, steps: int = 100_000, device: str = "cpu"
) -> Ended:
    """Start `size` processes, let `fault` happen in one of them, wait for all to end.

    fault   "what" (see `misfortune`), "rank", "step"; further entries by kind
    device  "cpu" (gloo) or "cuda" (NCCL, a GPU for each process)
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.doomed_loop"])
    # as the command line sets it in one of several processes; read when torch is loaded, by the server
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    with TemporaryDirectory(prefix="doomed-") as folder:
        processes = [
            context.Process(
                target=_start,
                args=(sys.path, folder, rank, size, fault, {**BOUNDS, **(bounds or {})}, steps, device),
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        moment = Path(folder, "fault")
        ends: dict[int, float] = {}
        limit = time.monotonic() + 60
        while len(ends) < size and time.monotonic() < limit:
            for rank, process in enumerate(processes):
                if rank not in ends and process.exitcode is not None:
                    ends[rank] = time.time()
                elif rank not in ends and fault["what"] == "freeze" and rank == fault["rank"] and len(ends) == size - 1:
                    process.kill()  # a frozen process ends when somebody ends it
            time.sleep(0.02)
        codes = [process.exitcode if rank in ends else None for rank, process in enumerate(processes)]
        for process in processes:
            process.kill()
            process.join()
        began = moment.stat().st_mtime if moment.exists() else time.time()
        return Ended(
            codes,
            [_own_lines(Path(folder, f"stderr.{rank}").read_text()) for rank in range(size)],
            [ends.get(rank, float("inf")) - began for rank in range(size)],
            [process.pid or 0 for process in processes],
        )


def _own_lines(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "[c10d]" not in line)


def _start(path: list[str], folder: str, rank: int, *rest: Any) -> None:
    sys.path[:] = path
    descriptor = os.open(Path(folder, f"stderr.{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from tests.parallel.doomed_loop import loop

    loop(folder, rank, *rest)


def misfortune(fault: dict[str, Any], folder: str) -> None:
    """What goes wrong, in the process that it befalls."""
    Path(folder, "fault").touch()
    what = fault["what"]
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise {"ValueError": ValueError, "RuntimeError": RuntimeError, "MemoryError": MemoryError}[fault["kind"]](
            "the data is not there"
        )
    elif what == "hang":
        time.sleep(1000)
    elif what == "hang holding the interpreter":
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock
    elif what == "interrupt":
        raise KeyboardInterrupt
