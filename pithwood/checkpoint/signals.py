"""Stop requests by signal: the handler sets a flag and says so, the training loop saves and leaves after the step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopNow(KeyboardInterrupt):
    """Leaves the work of `unless_stopped`; whatever cleans up after Ctrl-C does so after it."""


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a flag; a second SIGINT raises KeyboardInterrupt at once.

    with StopRequest() as stop:
        for step in steps:
            ...
            if stop: save and leave

    Raises ValueError outside the main thread, where Python cannot install handlers. The old handlers come back at the
    end.
    """

    def __init__(self, tell: bool = False) -> None:
        """tell: say on stderr, at the first signal, what happens now and what a second one does"""
        self._tell = tell
        self.signal_number = 0
        """The first signal that came; 0 as long as none has. A process leaving because of it exits with 128 + it."""
        self._interrupts = 0
        self._at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal that came, as "SIGTERM"; None as long as none has."""
        return signal.Signals(self.signal_number).name if self.signal_number else None

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopRequest must be entered in the main thread: signals are handled there only")
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None if a signal comes before its end, which stops it where it is.

        For work that the next run takes up again. The request stays, for whoever looks later.
        """
        try:
            try:
                self._at_once = True
                return None if self.requested else work()
            finally:
                self._at_once = False
        except _StopNow:
            return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        at_once, self._at_once = self._at_once, False
        name = signal.Signals(number).name
        if self._tell and not self.signal_number and at_once:
            _say(f"{name}: stopping; the same command goes on from here")
        elif self._tell and not self.signal_number:
            again = "again" if number == signal.SIGINT else "twice"
            _say(f"{name}: stopping after this step, then saving; Ctrl-C {again} ends it at once, unsaved")
        self.signal_number = self.signal_number or number
        if at_once:
            raise _StopNow


def _say(line: str) -> None:
    """Print a line on stderr from a signal handler.

    One write(2), past Python's buffered stream: that may be in the middle of a write of its own, and refuses to be
    entered twice. On a terminal a line is begun, since a progress line may stand there.
    """
    begin = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody reads stderr any more: the run is saved all the same
        os.write(2, f"{begin}{line}\n".encode())
