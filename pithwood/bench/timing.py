"""Times, peaks and memory of one device: CUDA events with a cold L2 on a GPU, the host clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20
"""Written before each timed run, so that none finds its inputs in the L2 cache (50 MB on Hopper)."""
MOST_FLUSHES = 100
"""Times that they are written at most, while the host queues the run."""
TARGET_S = 0.6
"""Timed seconds of one measurement that the number of repetitions aims at."""
WARM_UP_S = 0.15
LEAST_REPS, MOST_REPS = 5, 100
LONG_S = 2.0
"""Runs longer than this are repeated only LONG_REPS times."""
LONG_REPS = 2
MATMUL_SIZE, CPU_MATMUL_SIZE = 8192, 1024


@dataclass(frozen=True)
class Timing:
    """Of `reps` runs after a warm-up."""

    median_ms: float
    spread: float
    """Interquartile range in ms; with fewer than four runs their whole range."""
    reps: int


@dataclass(frozen=True)
class Peaks:
    """What the device reached at the start of this benchmark."""

    flops_per_s: float
    bytes_per_s: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Measures functions on one device; holds the buffer that displaces the L2 cache."""

    def __init__(self, device: torch.device, target_s: float = TARGET_S) -> None:
        self.device, self.target_s = device, target_s
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one run, with everything that it starts."""
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - start

    def measure(self, run: Callable[[], object], most_s: float = float("inf")) -> Timing:
        """Median and spread. `run` was called before (kernels are compiled); at most about most_s are spent."""
        seconds = self.once(run)
        warm = min(int(WARM_UP_S / seconds), MOST_REPS)
        for _ in range(warm):
            run()
        reps = min(max(round(self.target_s / seconds), LEAST_REPS), MOST_REPS)
        if seconds > LONG_S:
            reps = LONG_REPS
        reps = max(1, min(reps, int((most_s - seconds * (warm + 1)) / seconds)) if most_s < float("inf") else reps)
        on_gpu = self.device.type == "cuda"
        times = self._on_gpu(run, reps) if on_gpu else [1e3 * self.once(run) for _ in range(reps)]
        if len(times) < 4:
            return Timing(statistics.median(times), max(times) - min(times), reps)
        low, _, high = statistics.quantiles(times, n=4)
        return Timing(statistics.median(times), high - low, reps)

    def _on_gpu(self, run: Callable[[], object], reps: int) -> list[float]:
        # All runs are queued before any is waited for, and while the cache is displaced the host queues the next one,
        # so that the events time the GPU and not the launches: in a training step, too, the host is ahead.
        assert self._flush is not None
        flushes = self._flushes(run)
        begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(reps)] for _ in range(2))
        for i in range(reps):
            for _ in range(flushes):
                self._flush.zero_()
            begin[i].record()
            run()
            end[i].record()
        torch.cuda.synchronize(self.device)
        return [b.elapsed_time(e) for b, e in zip(begin, end, strict=True)]

    def _flushes(self, run: Callable[[], object]) -> int:
        """How often the cache is displaced before a run, so that this takes longer than the host needs to queue it."""
        flush = self._flush
        assert flush is not None
        flush_s = self.once(lambda: [flush.zero_() for _ in range(8)]) / 8
        synchronize(self.device)
        start = time.perf_counter()
        run()
        host_s = time.perf_counter() - start
        return min(max(1, math.ceil(1.5 * host_s / flush_s)), MOST_FLUSHES)

    def peaks(self, dtype: torch.dtype) -> Peaks:
        """Best of several measurements of a large matmul (random normal values) and of a copy (read and write)."""
        size = MATMUL_SIZE if self.device.type == "cuda" else CPU_MATMUL_SIZE
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        flops = 2.0 * size**3 / self._best(lambda: torch.mm(a, b, out=out), 1 if size == CPU_MATMUL_SIZE else 10)
        elements = (1 << 30) if self.device.type == "cuda" else (1 << 24)
        source = torch.zeros(elements, dtype=torch.int16, device=self.device)
        target = torch.empty_like(source)
        copied = 4.0 * elements / self._best(lambda: target.copy_(source), 3)
        return Peaks(flops, copied)

    def _best(self, run: Callable[[], Tensor], calls: int, rounds: int = 8) -> float:
        """Seconds per run in the fastest of several rounds of a few runs in a row."""
        run()

        def several() -> None:
            for _ in range(calls):
                run()

        return min(self.once(several) for _ in range(rounds)) / calls

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most bytes that torch has allocated while `run` runs, those there before included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def allocated(device: torch.device) -> int:
    """Bytes that torch holds on a GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
