"""Speed and memory of training: the real trainer over a few steps of a run, timed with the device idle at both ends.

What a step's clock holds is what the loop's does: cutting or drawing the batches, forward, backward, optimizer. Every
step waits for the device before and after, on a mesh for those of all processes; the first ones (compilation,
allocation) are dropped. The statistics that a run computes on its logging steps are left out.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from pithwood.bench.results import Row, origin
from pithwood.bench.timing import synchronize
from pithwood.data.batches import Batch
from pithwood.data.mixture import open_data
from pithwood.data.random_tokens import RandomTokens
from pithwood.data.together import open_together
from pithwood.data.usage import training_batches
from pithwood.errors import is_out_of_memory
from pithwood.memory import check_memory
from pithwood.observe.metrics import mfu, peak_memory_gb
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import (
    Mesh,
    check_world,
    own_device,
    start_mesh,
    stop_mesh,
    world_from_environment,
)
from pithwood.parallel.verdicts import Bounds
from pithwood.plan import plan
from pithwood.run import Run, check_device_settings, pick_device
from pithwood.trainer import Trainer

Tell = Callable[[str], None]
Tokens = Literal["fake", "real"]


class Batches(Protocol):
    """Where the batches of a step come from."""

    def step(self, step: int, share: tuple[int, int]) -> list[Batch]: ...


class Started:
    """A trainer at its first step and what feeds it."""

    def __init__(self, trainer: Trainer, batches: Batches, watch: Watch) -> None:
        self.trainer, self.batches, self.watch = trainer, batches, watch
        trainer.tell_phase = watch.phase

    def wait(self) -> None:
        """Until the devices of all processes are idle."""
        synchronize(self.trainer.device)
        self.trainer.mesh.world.barrier()

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
    """Of a step, over all processes: 3 x Cost.model_flops."""
    loss: float
    """Of the last step."""


def is_first() -> bool:
    """Whether this process is the first of those that were started together, or alone: it tells, writes, compares."""
    return world_from_environment()[0] == 0


@contextmanager
def mesh_of(run: Run, tell: Tell) -> Iterator[tuple[Mesh, Watch]]:
    """Context in which the processes of a run work together: this one and those that a launcher started with it.

    raises  ValueError before they meet for a run that cannot work or another number of processes than its mesh has, on
            a CPU also for a run that by estimate does not fit. Later errors end all processes with one line, as in
            training.
    """
    figures, bounds = plan(run), Bounds.from_environment()
    _, size, local_rank = world_from_environment()
    check_world(run.mesh, size)
    device = pick_device(run)
    if size > 1:
        device = own_device(device, local_rank)
    check_device_settings(run, device)
    for line in _told_memory(run, figures, device):
        tell(line)
    if run.threads:
        torch.set_num_threads(run.threads)
    mesh = start_mesh(run.mesh, device)
    with Watch(mesh, bounds=bounds) as watch:
        yield mesh, watch
        # none leaves while another may still be at work
        watch.phase("waiting for the end", math.inf)
        mesh.world.barrier()
    stop_mesh(mesh)


def start(run: Run, mesh: Mesh, watch: Watch, tokens: Tokens, runs_dir: Path, tell: Tell) -> Started:
    """A fresh model and optimizer for `run`, on its own text or on random tokens; `run` has steps enough."""
    if tokens == "fake":
        drawn = RandomTokens(run.stages(), vocab_size=run.model.vocab_size, seed=run.seed)
        return Started(Trainer(run, mesh.device, None, mesh), drawn, watch)
    corpora = runs_dir / "corpora"
    corpus = open_together(run.data, corpora, mesh, watch, partial(open_data, run.data, corpora, tell))
    assert corpus is not None  # nothing stops it
    batches = training_batches(corpus, run.stages(), seed=run.seed, steps=run.steps)
    watch.phase("start")
    return Started(Trainer(run, mesh.device, corpus, mesh), batches, watch)


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
    trainer = started.trainer
    if trainer.enter_phase(step):
        started.watch.begin_anew()
    started.watch.step(step)
    return trainer.train_step(step, started.batches.step(step, trainer.share))


def timed(started: Started, steps: int, drop: int, tell: Tell, begun: float) -> Measured:
    """Do `steps` steps and time those after the first `drop`; `begun` is when the command began (perf_counter)."""
    seconds: list[float] = []
    first = flops = math.nan
    values: dict[str, Any] = {}
    for step in range(steps):
        started.wait()
        begin = time.perf_counter()
        values, flops = one_step(started, step)
        started.wait()
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
    mesh: Mesh,
    watch: Watch,
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

    run      with steps enough, on the processes of `mesh_of`; all of them call this and get the row
    columns  what `train_rows.workload` says of the run
    raises   ValueError for settings that cannot work; what torch says where one of several processes has no memory
             left, for the others cannot go on without it
    """
    made = origin(command)
    try:
        started = start(run, mesh, watch, tokens, runs_dir, tell)
        result = timed(started, steps, drop, tell, begun)
    except Exception as error:
        if mesh.world.size > 1 or not is_out_of_memory(error):
            raise
        tell(f"out of memory: {str(error).partition(chr(10))[0]}")
        failed = {**columns, "status": "out of memory", **memory_fields(mesh), **made}
        release()
        return failed, None
    watch.phase("results", math.inf)
    return {**columns, **fields(started.trainer, result, drop), **made}, started


def fields(trainer: Trainer, result: Measured, drop: int) -> Row:
    """What the timed steps showed: the measured columns of a row."""
    run = trainer.run
    step_s = statistics.median(result.seconds)
    per_step = run.samples_per_step * run.seq_len
    counts = trainer.whole.num_params()
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
        **memory_fields(trainer.mesh),
        "first_step_s": result.first_step_s,
        "loss": result.loss,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "breakdown": None,
    }


def memory_fields(mesh: Mesh) -> Row:
    """`peak_gb`, the most that torch had allocated (the process's resident set on a CPU), and on a GPU
    `peak_reserved_gb`, the most that it held of the device; of several processes that with most.
    """
    device = mesh.device
    reserved = torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None
    found = mesh.world.all_gather_objects((peak_memory_gb(device), reserved))
    return {
        name: None if None in values else max(values)
        for name, values in zip(("peak_gb", "peak_reserved_gb"), zip(*found, strict=True), strict=True)
    }


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
