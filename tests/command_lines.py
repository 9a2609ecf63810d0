"""Command lines in processes of their own, started by forking one that has imported everything already.

A fresh interpreter spends seconds on importing torch; a fork of a prepared one answers in milliseconds and is as
separate: it has its own working directory, limits and exit code, and can be killed. `python -m
tests.command_lines` is the prepared process; it reads requests from stdin, one JSON object a line, and answers
each with one.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Limits:
    """What the system denies to a process; 0 and False deny nothing."""

    file_bytes: int = 0
    """Largest file that it can write: a longer one ends with the kernel's EFBIG."""
    more_memory: int = 0
    """Bytes of address space beyond what it has when it starts."""
    files: int = 0
    """Open files at a time."""
    obey_modes: bool = False
    """Obey the mode bits of files and folders even as root, as any other user has to."""
    jumping_clock: bool = False
    """Set the wall clock a day ahead after its second reading, and after its fourth an hour behind the true time."""


@dataclass(frozen=True)
class Finished:
    """What a command line did."""

    code: int
    """Exit code, minus the signal's number if one killed it."""
    out: str
    err: str


class Started:
    """A command line that runs."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
        self.pid, self._server, self._out, self._err = pid, server, out, err

    def wait(self, seconds: float = 120) -> Finished:
        """Its end; killed if it takes longer."""
        code = self._server.ask({"do": "wait", "pid": self.pid, "seconds": seconds})["code"]
        read = [path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err)]
        return Finished(code, *read)


class Server:
    """The prepared process, seen from the tests; a context manager."""

    def __init__(self, scratch: Path) -> None:
        """scratch: folder for what the command lines print"""
        self._scratch, self._count = scratch, 0
        command = [sys.executable, "-m", "tests.command_lines"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PITHWOOD")}
        environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=240)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv: list[str], folder: Path, limits: Limits | None = None, stdin: str = os.devnull) -> Started:
        """Start `pithwood argv...` in a folder, with a file or terminal as what it reads."""
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        request = {"do": "start", "argv": argv, "folder": str(folder), "in": stdin, "out": str(out), "err": str(err)}
        pid = self.ask({**request, "limits": vars(limits or Limits())})["pid"]
        return Started(self, pid, out, err)

    def call(self, argv: list[str], folder: Path, limits: Limits | None = None, stdin: str = os.devnull) -> Finished:
        """`pithwood argv...` in a folder, to its end."""
        return self.start(argv, folder, limits, stdin).wait()


def serve() -> None:
    """Answer requests until stdin ends."""
    # imported and measured here once, for all forks
    import torch

    import pithwood.generate.run
    import pithwood.preflight
    import pithwood.recipes.demo
    import pithwood.train  # noqa: F401
    from pithwood.observe.metrics import measure_peak_flops

    torch.set_num_threads(1)
    measure_peak_flops(torch.device("cpu"))
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"pid": _fork(request)} if request["do"] == "start" else {"code": _wait(**request)}
        os.write(1, (json.dumps(answer) + "\n").encode())


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(request["folder"])
        for number, path in enumerate((request["in"], request["out"], request["err"])):
            flags = os.O_RDONLY | os.O_NOCTTY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            handle = os.open(path, flags, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        _impose(Limits(**request["limits"]))
        from pithwood.cli import main

        sys.argv = [str(ROOT / "pithwood" / "__main__.py"), *request["argv"]]
        code = main(request["argv"])
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, seconds: float, **_: Any) -> int:
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            deadline = float("inf")
        time.sleep(0.002)


def _impose(limits: Limits) -> None:
    if limits.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if limits.files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.files, limits.files))
    if limits.more_memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.more_memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if limits.jumping_clock:
        time.time = jumping(time.time)
    if limits.obey_modes and os.geteuid() == 0:
        _drop_override()


def jumping(true_time: Callable[[], float]) -> Callable[[], float]:
    """A wall clock that is set a day ahead after its second reading, and an hour behind after its fourth."""
    readings = itertools.count()

    def read() -> float:
        number = next(readings)
        return true_time() + (0 if number < 2 else 86_400 if number < 4 else -3_600)

    return read


def _drop_override() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes over mode bits (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    keep = ~(1 << 1 | 1 << 2) & 0xFFFFFFFF
    data[0] &= keep
    data[1] &= keep
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    serve()
