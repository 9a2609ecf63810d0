"""Speed and memory of training: the real trainer over a few steps of a run, timed with the device idle at both ends.

What a step's clock holds is what the loop's does: cutting or drawing the batches, forward, backward, optimizer. Every
step waits for the device before and after; the first ones (compilation, allocation) are dropped. The statistics that a
run computes on its logging steps are left out.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from pithwood.bench.results import COMMIT, Row, told
from pithwood.bench.timing import synchronize
from pithwood.data.batches import Batch
from pithwood.data.mixture import open_data
from pithwood.data.random_tokens import RandomTokens
from pithwood.data.usage import training_batches
from pithwood.errors import is_out_of_memory
from pithwood.memory import check_memory
from pithwood.observe.metrics import mfu, peak_memory_gb
from pithwood.plan import plan
from pithwood.run import Run, check_device_settings, pick_device
from pithwood.trainer import Trainer

Tell = Callable[[str], None]
Tokens = Literal["fake", "real"]


class Batches(Protocol):
    """Where the batches of a step come from."""

    def step(self, step: int) -> list[Batch]: ...


class Started:
    """A trainer at its first step and what feeds it."""

    def __init__(self, trainer: Trainer, batches: Batches) -> None:
        self.trainer, self.batches = trainer, batches

    def spend(self) -> None:
        """Give back the trainer's memory; it cannot be used any more."""
        del self.trainer
        release()


@dataclass(frozen=True)
class Measured:
    """The timed steps of a run."""

    seconds: list[float]
    """Of each step that was not dropped."""
    first_step_s: float
    """From the start of the command to the end of the first step."""
    training_flops: float
    """Of a step: 3 x Cost.model_flops."""
    loss: float
    """Of the last step."""


def start(run: Run, steps: int, tokens: Tokens, runs_dir: Path, tell: Tell) -> Started:
    """A fresh model and optimizer for `run`, on its own text or on random tokens.

    raises  ValueError before any work for a run that cannot work, on a CPU also for one that by estimate does not fit
    """
    run = lengthened(run, steps)
    figures, device = plan(run), pick_device(run)
    check_device_settings(run, device)
    for line in _told_memory(run, figures, device):
        tell(line)
    if run.threads:
        torch.set_num_threads(run.threads)
    batches: Batches
    if tokens == "fake":
        corpus, batches = None, RandomTokens(run.stages(), vocab_size=run.model.vocab_size, seed=run.seed)
    else:
        corpus = open_data(run.data, runs_dir / "corpora", tell)
        batches = training_batches(corpus, run.stages(), seed=run.seed, steps=run.steps)
    return Started(Trainer(run, device, corpus), batches)


def _told_memory(run: Run, figures: dict[str, Any], device: torch.device) -> list[str]:
    """What the estimate of memory has to say. A GPU that has too little refuses without harm: there the run is tried,
    whatever the estimate.
    """
    try:
        return check_memory(run, figures, device)
    except ValueError as error:
        if device.type != "cuda":
            raise
        return [f"WARNING: {error}"]


def lengthened(run: Run, steps: int) -> Run:
    """The run with room for `steps` steps; its last phase then lasts as long."""
    if run.steps >= steps:
        return run
    phases = (*run.phases[:-1], replace(run.phases[-1], until_step=steps)) if run.phases else ()
    return replace(run, steps=steps, phases=phases)


def one_step(started: Started, step: int) -> tuple[dict[str, Any], float]:
    """A step as the loop does one that is not logged: (event fields, FLOPs that its mathematics needs)."""
    started.trainer.enter_phase(step)
    return started.trainer.train_step(step, started.batches.step(step))


def timed(started: Started, steps: int, drop: int, tell: Tell, begun: float) -> Measured:
    """Do `steps` steps and time those after the first `drop`; `begun` is when the command began (perf_counter)."""
    device = started.trainer.device
    seconds: list[float] = []
    first = flops = math.nan
    values: dict[str, Any] = {}
    for step in range(steps):
        synchronize(device)
        begin = time.perf_counter()
        values, flops = one_step(started, step)
        synchronize(device)
        took = time.perf_counter() - begin
        if step == 0:
            first = time.perf_counter() - begun
        if step >= drop:
            seconds.append(took)
        tell(f"step {step + 1} of {steps}: {took:.3f} s{' (not counted)' if step < drop else ''}")
    return Measured(seconds, first, flops, float(values["loss"]))


def measure(
    run: Run,
    columns: Row,
    *,
    steps: int,
    drop: int,
    tokens: Tokens,
    runs_dir: Path,
    command: str,
    begun: float,
    tell: Tell,
) -> tuple[Row, Started | None]:
    """A row of train.json, and the trainer as the steps left it (None if memory ran out).

    columns  what `train_rows.workload` says of the run
    raises   ValueError for settings that cannot work
    """
    origin = {"command": told(command), "commit": COMMIT, "date": datetime.now(UTC).date().isoformat()}
    try:
        started = start(run, steps, tokens, runs_dir, tell)
        result = timed(started, steps, drop, tell, begun)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        tell(f"out of memory: {str(error).partition(chr(10))[0]}")
        device = pick_device(run)
        failed = {**columns, "status": "out of memory", **memory_fields(device), **origin}
        release()
        return failed, None
    return {**columns, **fields(started.trainer, result, drop), **origin}, started


def fields(trainer: Trainer, result: Measured, drop: int) -> Row:
    """What the timed steps showed: the measured columns of a row."""
    run = trainer.run
    step_s = statistics.median(result.seconds)
    per_step = run.samples_per_step * run.seq_len
    counts = trainer.model.num_params()
    return {
        "status": "ok" if math.isfinite(result.loss) else "loss is not finite",
        "tokens_per_s": per_step / step_s,
        "spread": spread([per_step / seconds for seconds in result.seconds]),
        "step_ms": 1e3 * step_s,
        "step_spread_ms": 1e3 * spread(result.seconds),
        "steps": len(result.seconds),
        "dropped": drop,
        **{name: mfu(result.training_flops, step_s, peak) for name, peak in trainer.peaks.items()},
        "training_tflops": result.training_flops / 1e12,
        **memory_fields(trainer.device),
        "first_step_s": result.first_step_s,
        "loss": result.loss,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "breakdown": None,
    }


def memory_fields(device: torch.device) -> Row:
    """`peak_gb`, the most that torch had allocated (the process's resident set on a CPU), and on a GPU
    `peak_reserved_gb`, the most that it held of the device.
    """
    reserved = torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None
    return {"peak_gb": peak_memory_gb(device), "peak_reserved_gb": reserved}


def spread(values: list[float]) -> float:
    """Interquartile range; the whole range of fewer than four values."""
    if len(values) < 4:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def release() -> None:
    """Give back what a failed run held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
