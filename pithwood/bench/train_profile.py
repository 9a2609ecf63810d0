"""Profiles steps of the real trainer: kernel by kernel, part by part, each part beside the least time it needs."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pithwood.bench.timing import Timer
from pithwood.bench.train import Started, Tell, one_step
from pithwood.bench.train_rows import MESH
from pithwood.bench.train_text import busy_ms
from pithwood.estimate.devices import DEVICES
from pithwood.estimate.work import Peaks, Stages, floors_ms, meta_model, repeated, step_work
from pithwood.observe.step_timeline import Timeline
from pithwood.observe.step_trace import STEP, Communication, StepProfile, read_trace
from pithwood.parallel.config import MeshConfig
from pithwood.run import Run


def profile_steps(
    started: Started, first: int, count: int, step_ms: float | None, tell: Tell, trace: Path | None = None
) -> StepProfile:
    """Do steps `first` to first + count under the profiler, the first of them only to warm it up, and read the trace;
    on a mesh all processes do, and each reads its own.

    started  a trainer that has done `first` steps
    step_ms  time of a step without the profiler
    trace    where to keep the chrome trace (.json or .json.gz); None keeps none
    """
    device = started.trainer.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=0, warmup=1, active=count - 1, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"

        def export(profiler: profile) -> None:
            profiler.export_chrome_trace(str(path))

        # acc_events: there is one cycle only, and without it torch warns that it keeps no others
        with profile(
            activities=activities, schedule=plan, on_trace_ready=export, with_stack=True, acc_events=True
        ) as profiler:
            for step in range(first, first + count):
                with record_function(STEP):
                    one_step(started, step)
                    started.wait()
                profiler.step()
        started.watch.phase("reading the trace", math.inf)
        tell(f"profiled {count - 1} steps; reading {path.stat().st_size / 1e6:,.0f} MB of trace")
        content = json.loads(path.read_bytes())
        if trace is not None:
            _keep(path, trace)
    return read_trace(content, step_ms, gpu=device.type == "cuda")


def _keep(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != ".gz":
        shutil.copyfile(path, target)
        return
    with path.open("rb") as source, gzip.open(target, "wb", compresslevel=3) as packed:
        shutil.copyfileobj(source, packed)


BREAKDOWN_STEPS = 3
"""Steps that `breakdown` does; the first warms the profiler up."""


def breakdown(started: Started, first: int, step_ms: float, tell: Tell) -> tuple[dict[str, Any], list[Timeline]]:
    """The `breakdown` of a row of train.json: `ms`, `floor_ms` and `repeated` (work over the floor's, by recomputation)
    by part, `total_ms`, `unattributed_share`, the peaks that the floors assume, and the longest kernels. It spends the
    trainer: the peaks need its memory.

    On a mesh all processes call it. Shown is the busiest process, `rank`, beside the floors of what it has: its layers
    of a pipeline, with the embedding or the head, and of those an even share of the work. `processes` has `rank`, `ms`
    and `floor_ms` of all, `communication` says what of the shown one's exchanges was hidden (None on a CPU), and with
    it come the timelines of a step, of every process with a GPU; processes but the first get nothing.
    """
    found = profile_steps(started, first, BREAKDOWN_STEPS, step_ms, tell)
    run, mesh, dtype = started.trainer.run, started.trainer.mesh, started.trainer.dtype
    started.spend()
    timelines: list[Timeline] = []
    if mesh.world.size > 1 and mesh.device.type == "cuda":
        timelines = mesh.world.all_gather_objects(Timeline.of(found.spans, found.last_ms))
    everyone = mesh.world.all_gather_objects(dataclasses.replace(found, spans=[], kernels=found.kernels[:MOST_KERNELS]))
    if not mesh.is_first:
        return {}, []
    peaks = device_peaks(mesh.device, dtype)
    rank = busiest([each.parts for each in everyone])
    found, stages = everyone[rank], [Stages.of(run, other) for other in range(len(everyone))]
    floors = floors_of_processes(run, stages, peaks)
    fields = {
        "ms": found.parts,
        "floor_ms": floors[rank],
        "repeated": repeated(run, stages[rank]),
        "total_ms": found.total_ms,
        "profiled_ms": found.profiled_ms,
        "unattributed_share": found.unattributed_share,
        "overlapped_ms": found.overlapped_ms,
        "peaks": vars(peaks),
        "kernels": [
            {"part": kernel.part, "name": kernel.name[:NAME_LENGTH], "count": kernel.count, "ms": kernel.ms}
            for kernel in found.kernels[:MOST_KERNELS]
        ],
    }
    if mesh.world.size > 1:
        fields |= {
            "rank": rank,
            "processes": [
                {"rank": other, "ms": each.parts, "floor_ms": floors[other]} for other, each in enumerate(everyone)
            ],
            "communication": communication_fields(found.communication),
        }
    return fields, timelines


def busiest(parts: Sequence[dict[str, float]]) -> int:
    """The process that computes longest, by the parts of all: others wait for it."""
    return max(range(len(parts)), key=lambda rank: busy_ms(parts[rank]))


def floors_of_processes(run: Run, stages: Sequence[Stages], peaks: Peaks) -> list[dict[str, float]]:
    """The floors of each process's parts: an even share, among those of equal stages, of what these stages need."""
    model, sharing = meta_model(run), run.mesh.size // run.mesh.pp
    known = {some: floors_ms(step_work(run, model, some), peaks) for some in set(stages)}
    return [{part: ms / sharing for part, ms in known[some].items()} for some in stages]


def timeline_name(mesh: MeshConfig) -> str:
    """The file of a mesh's picture: timeline-dp_shard2-ep2.png, with the schedule where there is a pipeline, and with
    the overlap that was asked for."""
    sizes = [f"{size}{getattr(mesh, size)}" for size in MESH if getattr(mesh, size) > 1]
    how = [mesh.schedule] if mesh.pp > 1 else [mesh.overlap] if mesh.overlap != "none" else []
    return f"timeline-{'-'.join([*sizes, *how])}.png"


def communication_fields(found: Communication | None) -> dict[str, float] | None:
    """`ms`, `hidden_ms` and `hidden_share`."""
    return None if found is None else {**vars(found), "hidden_share": found.hidden_share}


NAME_LENGTH, MOST_KERNELS = 100, 12
"""What a row of train.json keeps of the kernels."""


def device_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Peaks that floors assume: those known of an H200; of others they are measured here, which takes 5 GB of a GPU."""
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        return DEVICES["h200"].peaks
    found = Timer(device).peaks(dtype)
    return Peaks(found.flops_per_s, found.bytes_per_s)


COLUMNS = ("part", "name", "count", "mean_us", "ms")


def write_kernels(found: StepProfile, path: Path) -> None:
    """Every kernel as a line of a CSV file: COLUMNS, longest first; count and ms are per step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(kernel, column) for column in COLUMNS] for kernel in found.kernels)


def profile_lines(found: StepProfile, device: str, most: int, width: int = 72) -> list[str]:
    """Parts, then the longest kernels, as lines of a table."""
    what = "kernel" if device == "cuda" else "op"
    lines = [f"{'part':<22}{'ms a step':>10}{'share':>9}"]
    lines += [f"{part:<22}{ms:>10.2f}{ms / found.total_ms:>9.1%}" for part, ms in found.parts.items()]
    lines += [f"{'total':<22}{found.total_ms:>10.2f}", ""]
    lines.append(f"{'ms a step':>10}{'count':>9}{'mean us':>11}  {'part':<20}{what}")
    for kernel in found.kernels[:most]:
        name = kernel.name if len(kernel.name) <= width else f"{kernel.name[: width - 3]}..."
        lines.append(f"{kernel.ms:>10.3f}{kernel.count:>9g}{kernel.mean_us:>11.1f}  {kernel.part:<20}{name}")
    if left := len(found.kernels) - most:
        rest = sum(kernel.ms for kernel in found.kernels[most:])
        lines += [f"{rest:>10.3f}  in {left} more kinds of {what}"] if left > 0 else []
    return lines
