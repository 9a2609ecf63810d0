"""Processes that run tasks of `prepare`: `python -c` programs that read a task a line and answer a line.

They are no `multiprocessing` children: those import the main program again, which breaks scripts without a main guard.
A worker ends when its standard input does, so none outlives a parent that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

from pithwood.data.tasks import Task, from_line, to_line

_WAITING = 2
"""Tasks that a worker holds, so that it goes on while the parent reads the source."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Runs tasks in `count` processes; in this one if count is 1. A context manager; processes start with the first
    task."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._processes:
            worker.end()

    def process_ids(self) -> list[int]:
        """Of the processes that were started."""
        return [worker.process.pid for worker in self._processes]

    def run(self, tasks: Iterable[tuple[Task, int]], advance: Callable[[int], None]) -> None:
        """Run all tasks that are not yet done, in any order; `advance` gets the number that comes with each one.

        raises what a task raises: ValueError or OSError; ChildProcessError if a process dies
        """
        if self._count > 1 and not self._processes:
            self._processes = [_Worker() for _ in range(self._count)]
        for task, size in tasks:
            if task.done():
                advance(size)
            elif not self._processes:
                task.run()
                advance(size)
            else:
                while all(len(worker.sizes) >= _WAITING for worker in self._processes):
                    self._collect(advance)
                self._collect(advance, timeout=0)
                min(self._processes, key=lambda worker: len(worker.sizes)).give(task, size)
        while any(worker.sizes for worker in self._processes):
            self._collect(advance)

    def _collect(self, advance: Callable[[int], None], timeout: float | None = None) -> None:
        """Wait for an answer and take all that are there."""
        with selectors.DefaultSelector() as selector:
            for worker in self._processes:
                if worker.sizes:
                    selector.register(worker.answers, selectors.EVENT_READ, worker)
            ready = selector.select(timeout) if selector.get_map() else []
        for key, _ in ready:
            advance(key.data.take())


class _Worker:
    def __init__(self) -> None:
        program = f"import sys; sys.path[:] = {sys.path!r}; from pithwood.data.workers import serve; serve()"
        # Each worker is one of several: threads of the tokenizer library and of numpy would only disturb the others.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._tasks: IO[bytes] = self.process.stdin
        self.answers: IO[bytes] = self.process.stdout
        self.sizes: list[int] = []
        """Of the tasks that it holds, in order."""

    def give(self, task: Task, size: int) -> None:
        self.sizes.append(size)
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed where its answer is missing
            self._tasks.write(to_line(task))

    def take(self) -> int:
        """The size of its first task, whose answer has come."""
        answer = self.answers.readline()
        if not answer:
            code = self.process.wait()
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise ChildProcessError(
                f"a worker process of prepare died ({why}); if memory ran out, take fewer workers. "
                "The same command goes on where this one stopped"
            )
        error = json.loads(answer)
        if error and error["errno"] is not None:
            raise OSError(error["errno"], error["message"], error["file"])
        if error:
            raise ValueError(error["message"])
        return self.sizes.pop(0)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._tasks.close()
        self.answers.close()


def serve() -> None:
    """The program of a worker: run the tasks of standard input; answer null, or what was raised."""
    # Ctrl-C reaches the whole group; the parent decides, and its death ends the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a stray print is no answer
    for line in sys.stdin.buffer:
        answer: dict[str, Any] | None = None
        try:
            from_line(line).run()
        except ValueError as error:
            answer = {"message": str(error), "errno": None, "file": None}
        except OSError as error:
            answer = {"message": error.strerror or str(error), "errno": error.errno or 0, "file": error.filename}
        answers.write(json.dumps(answer, default=str).encode() + b"\n")
