"""How long steps take: device time on CUDA without a host sync, monotonic host time elsewhere."""

from __future__ import annotations

import time

import torch


class StepTime:
    """Duration of one step. On CUDA the two marks are read only when `seconds` is asked."""

    def __init__(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event):
        self._start, self._end = start, end

    def seconds(self) -> float:
        """Elapsed seconds; on CUDA this waits for the device, so ask at a flush and not between steps."""
        if isinstance(self._start, torch.cuda.Event) and isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
            return self._start.elapsed_time(self._end) / 1000.0
        assert isinstance(self._start, float)
        assert isinstance(self._end, float)
        return self._end - self._start


class StepClock:
    """Laps between marks: `restart()` before the first step and after a pause (validation, save), `lap()` after a step.

    A lap reaches from mark to mark, so it contains everything in between: waiting for data, idle device time, logging.
    On CUDA the marks are events of the current stream, elsewhere readings of `time.perf_counter`. Neither is moved by
    changes of the wall clock.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._last = self._mark()

    def restart(self) -> None:
        """Begin the next lap here."""
        self._last = self._mark()

    def lap(self) -> StepTime:
        """Time since the last mark; the next lap begins here."""
        start, self._last = self._last, self._mark()
        return StepTime(start, self._last)

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
