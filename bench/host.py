"""What a step costs the host: milliseconds per layer of forward, backward and update, and where they go.

    python -m bench.host                                              a CPU's rows, one and two processes; 2 min
    python -m bench.host qwen3_30b_8l model.moe.routing=balanced      one run, on this machine's device
    torchrun --nproc-per-node 2 -m bench.host qwen3_30b_8l mesh.dp_shard=2 mesh.ep=2 samples_per_micro_batch=8

The first form takes a model so narrow that its products cost nothing, writes bench/results/cpu/host.json and prints
its path; the others print their rows as JSON. On a CPU times are those in which the thread had a core, so neither other
jobs nor what a partner keeps it waiting for count; plain torch runs there in place of the kernels. On a GPU the clock
starts with the device idle and stops when Python returns. Backward passes run in the thread that asks for them, so that
they can be profiled. Counting functions slows them down: the microseconds by function tell shares, not times.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.results import write_results
from pithwood.attention.full import FullAttentionConfig
from pithwood.bench.timing import synchronize
from pithwood.bench.train import Started, is_first, lengthened, mesh_of, spread, start
from pithwood.config import apply_overrides
from pithwood.losses import LossLedger
from pithwood.passes import loss_of
from pithwood.recipes import load_recipe
from pithwood.run import Run
from pithwood.trainer import Trainer

Row = dict[str, Any]

SMALL = (
    "model.num_layers=8", "model.moe.num_experts=8", "model.moe.expert_dim=32", "seq_len=64", "samples_per_step=2",
    "samples_per_micro_batch=1", "threads=1", "device=cpu", "optim.ns_dtype=fp32",
)  # fmt: skip
"""What `debug` is narrowed to: 64 tokens per process and micro-batch."""
MESHES = (
    (),
    ("mesh.dp_shard=2", "mesh.ep=2", "samples_per_step=4", "samples_per_micro_batch=2"),
    ("mesh.pp=2",),
)
WARM, REPEATS, PROFILED = 3, 15, 5
"""Passes that are dropped, timed, and run under the profiler."""
MOST = 12
"""Functions that a row keeps of each pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="without one: the rows of a CPU")
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--out", type=Path, help="folder of host.json (default bench/results/<device>)")
    args = parser.parse_args()
    if args.recipe is None:
        rows = [row for mesh in MESHES for row in apart(mesh)]
        print(write_results("host", rows, args.out))
        return
    run = apply_overrides(load_recipe(args.recipe), args.overrides)
    rows = measured(variants(run) if args.recipe == "debug" else [run])
    if is_first():
        print(json.dumps(rows))


def variants(run: Run) -> list[Run]:
    """The run with MoBA and full attention, each with activations kept and with norms computed again."""
    full = replace(run, model=replace(run.model, attention=FullAttentionConfig()))
    return [replace(one, recompute=how) for one in (run, full) for how in ("none", "selective")]


def apart(overrides: tuple[str, ...]) -> list[Row]:
    """The rows of the small model on a mesh, measured by processes of their own."""
    count = 2 if overrides else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "bench.host", "debug", *SMALL, *overrides]
    print(" ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    found: list[Row] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measured(runs: list[Run]) -> list[Row]:
    """A row per run, all on the mesh of the first; every process of the mesh calls it."""
    runs = [lengthened(run, 2 + WARM + REPEATS + PROFILED) for run in runs]
    rows = []
    with mesh_of(runs[0], tell) as (mesh, watch), torch.autograd.set_multithreading_enabled(False):
        for run in runs:
            started = start(run, mesh, watch, "fake", Path("runs"), tell)
            rows.append(row_of(run, started))
            started.spend()
    return rows


def row_of(run: Run, started: Started) -> Row:
    """Milliseconds of the host per layer of this process: medians, with interquartile ranges.

    forward, backward   of one micro-batch, ends of the model included; None in a pipeline, whose passes interleave
    gradients           of a step, per micro-batch: all passes and exchanges, the batches' way to the device included
    update              of a step
    until_idle_ms       on a GPU: the same until the device had done it
    """
    trainer = started.trainer
    layers, micro_batches = len(trainer.model.layers), run.samples_per_step // run.samples_per_micro_batch
    step = Steps(started)
    times: dict[str, list[float]] = {"gradients": [], "update": []}
    if trainer.pipeline is None:
        times = {"forward": [], "backward": [], **times}
    per = {name: layers * (micro_batches if name == "gradients" else 1) for name in times}
    on_gpu = trainer.device.type == "cuda"
    idle: dict[str, list[float]] = {name: [] for name in times}
    for repeat in range(WARM + REPEATS):
        seconds = {**step.whole(plain), **({} if trainer.pipeline else step.passes(plain))}
        for name, taken in times.items():
            if repeat >= WARM:
                taken.append(1e3 * seconds[name] / per[name])
                idle[name].append(1e3 * step.until_idle[name] / per[name])
    profiles = {name: cProfile.Profile(clock(trainer.device)) for name in times}

    def profiled(name: str) -> Any:
        return running(profiles[name])

    for _ in range(PROFILED):
        step.whole(profiled)
        if trainer.pipeline is None:
            step.passes(profiled)
    sizes = {name: getattr(run.mesh, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "ep")}
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"
    mixer = type(run.model.mixers()[0]).__name__.removesuffix("Config")
    return {
        "recipe": run.name, "mesh": mesh, "attention": mixer, "recompute": run.recompute, "layers": layers,
        "tokens": run.samples_per_micro_batch * run.seq_len, "device": trainer.device.type, "processes": run.mesh.size,
        "ms_per_layer": {name: statistics.median(taken) for name, taken in times.items()},
        "until_idle_ms": {name: statistics.median(taken) for name, taken in idle.items()} if on_gpu else None,
        "spread_ms": {name: spread(taken) for name, taken in times.items()},
        "functions": {name: functions(profiles[name], PROFILED * per[name]) for name in times},
    }  # fmt: skip


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds that passed, on a GPU; elsewhere those in which this thread had a core."""
    return time.perf_counter if device.type == "cuda" else time.thread_time


@contextmanager
def plain(name: str) -> Iterator[None]:
    yield


@contextmanager
def running(profile: cProfile.Profile) -> Iterator[None]:
    profile.enable()
    try:
        yield
    finally:
        profile.disable()


class Steps:
    """Steps of a trainer, pass by pass, each under a clock and what the caller puts around it."""

    def __init__(self, started: Started) -> None:
        self.started, self.trainer, self.step = started, started.trainer, 0
        self.until_idle: dict[str, float] = {}
        """Seconds from the beginning of each pass, when it ran last, until its device had done it."""

    def clocked(self, name: str, around: Callable[[str], Any], call: Callable[[], Any]) -> tuple[Any, float]:
        """(what the call returns, seconds until it returned) with all devices idle before."""
        now = clock(self.trainer.device)
        self.started.wait()
        with around(name):
            begin = now()
            result = call()
            seconds = now() - begin
        synchronize(self.trainer.device)
        self.until_idle[name] = now() - begin
        return result, seconds

    def whole(self, around: Callable[[str], Any]) -> dict[str, float]:
        """Seconds of one optimizer step's gradients and update."""
        trainer, batches = self.trainer, self._batches()
        _, gradients = self.clocked("gradients", around, lambda: trainer.gradients(self.step, trainer.local(batches)))
        _, update = self.clocked("update", around, lambda: trainer.optimizer.step(self.step, None))
        trainer.optimizer.zero_grad()
        synchronize(trainer.device)
        return {"gradients": gradients, "update": update}

    def passes(self, around: Callable[[str], Any]) -> dict[str, float]:
        """Seconds of a micro-batch's forward and backward pass."""
        trainer = self.trainer
        local, objective = trainer.local(self._batches()[:1])[0], trainer.run.phase(self.step).objective
        totals = {"tokens": float(local.batch.num_tokens), **objective.totals([local.batch])}
        ledger = LossLedger(totals)
        if trainer.part is not None:
            trainer.part.begin_step(1)
        hidden_TD, forward = self.clocked("forward", around, lambda: _forward(trainer, local, ledger))
        loss = loss_of(trainer.model, objective, local.batch, ledger, hidden_TD)
        _, backward = self.clocked("backward", around, loss.backward)
        if trainer.part is not None:
            trainer.part.shards.finish_step()
        trainer.optimizer.zero_grad()
        synchronize(trainer.device)
        return {"forward": forward, "backward": backward}

    def _batches(self) -> list[Any]:
        self.started.watch.step(self.step)
        return self.started.batches.step(self.step, self.trainer.share)


def _forward(trainer: Trainer, local: Any, ledger: LossLedger) -> torch.Tensor:
    columns, packing = local.batch.columns, local.batch.packing
    return trainer.model.hidden(columns["tokens"], packing, dtype=trainer.dtype, ledger=ledger, cp=local.cp)


def functions(profile: cProfile.Profile, times: int) -> list[Row]:
    """The functions that took longest by themselves: microseconds and calls per layer, of `times` layers."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:MOST]
    return [
        {"function": _name(*where), "own_us": 1e6 * own / times, "all_us": 1e6 * whole / times, "calls": calls / times}
        for where, (_, calls, own, whole, _) in longest
    ]


def _name(path: str, line: int, function: str) -> str:
    if path == "~":
        return function
    parts = Path(path).parts
    known = next((index for index, part in enumerate(parts) if part in ("pithwood", "torch", "triton")), -2)
    return f"{'/'.join(parts[known:])}:{line} {function}"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
