"""`pithwood profile`: where the time of a training step goes, by kernel and by part."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text
from pithwood.commands.train_arguments import add_train_arguments, run_of, silent, tell

HELP = """examples:
  pithwood profile debug --steps 7
  pithwood profile qwen3_30b_8l --routing balanced --steps 7 --json
  pithwood profile lm_100m samples_per_step=4 --top 40 --trace trace.json.gz

Takes the real trainer through --steps optimizer steps from a fresh model: some to warm up, some timed, the last under
torch's profiler. The table has every kernel's (on a CPU every op's) count, mean and total in a step, and the parts of
the step, which add up to it. idle is what remains of a step's time without the profiler; on a CPU, the time outside
ops. A kernel belongs to the part whose code launched it; the share that nothing could be told of stands below.

Under torchrun all processes of the run's mesh do the same steps. Shown is what the process did that computed longest,
with its rank, and how long each of the others computed; --trace keeps the first one's. exchange is the time of NCCL's
kernels, waiting for slower partners included, while no other kernel runs."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "profile", "show where a training step's time goes, by kernel and by part", HELP)
    add_train_arguments(parser, steps=7)
    parser.add_argument("--top", metavar="N", type=int, default=25, help="kernels to show (default: 25)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write all kernels to a CSV file")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="also keep the chrome trace (.json or .json.gz)")
    add_common(parser, "parts and kernels")


LEAST_STEPS = 4
"""One to warm up, one timed, one that warms up the profiler, one profiled."""


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The parts and the longest kernels, as tables or as JSON."""
    if args.steps < LEAST_STEPS:
        raise ValueError(f"--steps {args.steps} is too few to warm up, time and profile; give at least {LEAST_STEPS}")
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    for option, suffixes in (("csv", (".csv",)), ("trace", (".json", ".gz"))):
        path = getattr(args, option)
        if path is not None and path.suffix not in suffixes:
            raise ValueError(f"--{option} {path} must end in {' or '.join(suffixes)}")

    import dataclasses
    import statistics

    from pithwood.bench.train import is_first, lengthened, mesh_of, start, timed
    from pithwood.bench.train_profile import (
        busiest,
        communication_fields,
        profile_lines,
        profile_steps,
        write_kernels,
    )
    from pithwood.bench.train_text import communication_line, processes_line
    from pithwood.memory import explained_memory

    settings = lengthened(run_of(args), args.steps)
    first = is_first()
    say = tell if first else silent
    profiled = 1 + max(1, args.steps // 3)
    plain = args.steps - profiled
    with explained_memory(settings, args.runs_dir), mesh_of(settings, say) as (mesh, watch):
        started = start(settings, mesh, watch, args.tokens, args.runs_dir, say)
        measured = timed(started, plain, plain // 2, say, args.started)
        step_ms = 1e3 * statistics.median(measured.seconds)
        found = profile_steps(started, plain, profiled, step_ms, say, args.trace if first else None)
        everyone = mesh.world.all_gather_objects(dataclasses.replace(found, spans=[]))
    if not first:
        return 0, ""
    rank = busiest([each.parts for each in everyone])
    found, processes = everyone[rank], [{"rank": other, "ms": each.parts} for other, each in enumerate(everyone)]
    if args.csv is not None:
        write_kernels(found, args.csv)
    if args.json:
        result = {
            "recipe": args.recipe,
            "step_ms": step_ms,
            "profiled_ms": found.profiled_ms,
            "total_ms": found.total_ms,
            "parts": found.parts,
            "unattributed_share": found.unattributed_share,
            "overlapped_ms": found.overlapped_ms,
            "communication": communication_fields(found.communication),
            "rank": rank,
            "processes": processes,
            "kinds": len(found.kernels),
            "kernels": [vars(kernel) for kernel in found.kernels[: args.top]],
            "csv": args.csv,
            "trace": args.trace,
        }
        return 0, json_text(result)
    device = started.trainer.device.type
    lines = profile_lines(found, device, args.top)
    lines.append(
        f"{found.steps} steps profiled at {found.profiled_ms:.1f} ms each; without the profiler {step_ms:.1f} ms; "
        f"{found.unattributed_share:.1%} of the busy time could not be attributed (in other)"
    )
    if found.overlapped_ms > 0:
        lines.append(f"{found.overlapped_ms:.2f} ms a step of kernels and copies ran beside others, counted once")
    if len(processes) > 1:
        lines.append(processes_line(rank, processes))
    if (exchanged := communication_fields(found.communication)) is not None:
        lines.append(communication_line(exchanged))
    return 0, "\n".join([*lines, *(str(path) for path in (args.csv, args.trace) if path is not None)])
