"""`pithwood bench train`: measure speed and memory of the real trainer and write train.json."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.train_arguments import add_train_arguments, overrides_of, run_of, silent, tell

HELP = """examples:
  pithwood bench train debug --steps 6
  pithwood bench train qwen3_30b_8l --routing balanced --json
  pithwood bench train qwen3_30b_8l --tokens real --routing learned --breakdown
  pithwood bench train qwen3_30b_8l seq_len=131072 samples_per_step=1 samples_per_micro_batch=1 --steps 6 --drop 2
  pithwood bench train qwen3_30b_8l --sweep issue --fit h200 --breakdown --budget-s 550
  pithwood bench train qwen3_30b_8l --sweep lengths --fit h200 --dry-run
  torchrun --nproc-per-node 2 -m pithwood bench train debug mesh.dp_shard=2 mesh.ep=2 --steps 6

A fresh model of the recipe does --steps optimizer steps; the device is idle at both ends of every step's clock (on a
mesh those of all processes), and the first --drop steps are not counted. The row replaces an equal one in
bench/results/<device>/train.json and is compared with the last committed one of the same workload. --breakdown adds
where the step's time goes, and the floor of each part. A sweep measures its rows one by one, cheap first, each in a
process of its own that writes its row; overrides and --breakdown hold for all of them, --fit adds recomputation where
it is needed. PITHWOOD_COMMIT, where it is set, names the commit of code that was copied.

Under torchrun all processes of the run's mesh do the steps, and the first writes the row: MFU is relative to all
devices, peak memory that of the fullest. If one of several runs out of memory, all end with exit code 3 or 4, and there
is no row. --breakdown then also says how much of the communication is hidden and draws a step of all processes as
timeline-MESH.png beside the results file."""


def add(subjects: Any) -> None:
    """Add the subject to `pithwood bench`."""
    parser = add_command(subjects, "train", "measure the training of a recipe and write train.json", HELP)
    add_train_arguments(parser, steps=13)
    parser.add_argument("--drop", metavar="N", type=int, default=3, help="first steps not counted (default: 3)")
    parser.add_argument("--breakdown", action="store_true", help="also profile where the step's time goes")
    parser.add_argument(
        "--limit", metavar="P", type=float, help="PASS, or FAIL if P percent slower or larger than the committed row"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of train.json (default: bench/results/<device>)"
    )
    parser.add_argument(
        "--sweep", metavar="NAME", help="measure several rows: issue, lengths (4K to 1M tokens), or N,N,... tokens"
    )
    parser.add_argument(
        "--fit", metavar="NAME", help="with --sweep: add what makes each row fit into h200 or h100, by estimate"
    )
    parser.add_argument("--budget-s", metavar="S", type=float, help="with --sweep: begin no row after these seconds")
    parser.add_argument("--dry-run", action="store_true", help="print the sweep's commands, or what the row would be")
    parser.add_argument("--json", action="store_true", help="print the row as one JSON object on stdout")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs and corpora live (default: runs)"
    )


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The measured row, in words or as JSON; exit code 1 if it has no speed."""
    check_steps(args.steps, args.drop)
    if args.sweep is not None:
        return _sweep(args)
    if args.limit is not None and not args.limit >= 0:
        raise ValueError(f"--limit={args.limit} must be 0 percent or more")
    if args.fit is not None:
        raise ValueError("--fit is for the rows of a --sweep; see pithwood estimate for what a single row needs")
    if args.budget_s is not None:
        raise ValueError("--budget-s is for the rows of a --sweep; a single row takes --steps")

    from pithwood.bench import train
    from pithwood.bench.results import device_name, merge_rows, read_results, write_results
    from pithwood.bench.train_plot import plot_lengths
    from pithwood.bench.train_rows import committed_rows, comparison, measured, row_key, verdict, workload

    settings = train.lengthened(run_of(args), args.steps)
    folder = args.out or Path("bench") / "results" / device_name()
    kept = read_results(folder / "train.json")
    committed, where = committed_rows()
    columns = workload(settings, args.recipe, overrides_of(args), args.tokens)
    if args.dry_run:
        return 0, json_text(columns, indent=None if args.json else 2) if train.is_first() else ""
    old = committed if kept is None else kept["rows"]
    # of several processes all do the steps, and the first alone tells, writes and compares
    first = train.is_first()
    say = tell if first else silent

    def save(row: dict[str, Any]) -> Path:
        rows = merge_rows(old, [row], row_key, measured)
        plot_lengths(rows, folder / "train.png")
        return write_results("train", rows, folder, args.command_line)

    with train.mesh_of(settings, say) as (mesh, watch):
        row, started = train.measure(
            settings,
            columns,
            mesh,
            watch,
            steps=args.steps,
            drop=args.drop,
            tokens=args.tokens,
            runs_dir=args.runs_dir,
            command=args.command_line,
            begun=args.started,
            tell=say,
        )
        path = save(row) if first else folder
        if args.breakdown and started is not None:
            from pithwood.bench.train_profile import breakdown, timeline_name
            from pithwood.bench.train_text import workload_words
            from pithwood.observe.step_timeline import plot_timelines

            row["breakdown"], timelines = breakdown(started, args.steps, row["step_ms"], say)
            if timelines:
                plot_timelines(timelines, folder / timeline_name(settings.mesh), workload_words(row))
            if first:
                save(row)
    if not first:
        return 0, ""
    against = comparison(row, committed, where)
    gate = [] if args.limit is None else [verdict(row, against, args.limit)]
    code = 0 if measured(row) and gate in ([], ["PASS"]) else 1
    if args.json:
        result = {"file": path, "row": row, "committed": against}
        return code, json_text({**result, "verdict": gate[0]} if gate else result)
    from pithwood.bench.train_text import row_lines

    return code, "\n".join([*row_lines(row, against, where), str(path), *gate])


def _sweep(args: argparse.Namespace) -> tuple[int, str]:
    """The outcome of every row of a sweep; exit code 1 if one has no speed."""
    if args.routing is not None or args.tokens != "fake":
        raise ValueError("--routing and --tokens are what the rows of a --sweep say themselves; drop them")
    if args.limit is not None:
        raise ValueError("--limit judges a single row; drop it or --sweep")
    if args.budget_s is not None and not args.budget_s > 0:
        raise ValueError(f"--budget-s={args.budget_s} must be above 0")

    from pithwood.bench.train_sweep import outcome, run_sweep, sweep_rows
    from pithwood.estimate.devices import DEVICES
    from pithwood.parallel.mesh import world_from_environment

    if world_from_environment()[1] > 1:
        raise ValueError("--sweep starts a process for every row; on a mesh measure one row per command, without it")

    if args.fit is not None and args.fit not in DEVICES:
        raise ValueError(f"--fit {args.fit} is not known; choose one of {', '.join(DEVICES)}")

    run_of(args)  # whatever is wrong with the recipe or the overrides is wrong with every row
    rows = sweep_rows(args.sweep, args.steps, args.drop)
    if args.fit is not None:
        rows = [row.fitted(args.recipe, args.overrides, DEVICES[args.fit], tell) for row in rows]
    more = [*args.overrides, *([] if args.out is None else ["--out", str(args.out)])]
    more += [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    more += ["--breakdown"] if args.breakdown else []
    if args.dry_run:
        commands = [shlex.join(["pithwood", *row.words(args.recipe, more)]) for row in rows]
        return 0, json_text(commands) if args.json else "\n".join(commands)
    results = run_sweep(rows, args.recipe, more, args.budget_s or float("inf"), tell)
    code = 0 if all(result["exit"] == 0 for result in results) else 1
    if args.json:
        return code, json_text(results)
    return code, "\n".join(f"{result['name']}: {outcome(result)}" for result in results)


def check_steps(steps: int, drop: int) -> None:
    """Raise ValueError unless something is left to time."""
    if drop < 1:
        raise ValueError(f"--drop {drop} must be at least 1: the first step compiles and allocates")
    if steps <= drop:
        raise ValueError(f"--steps {steps} leaves none to time after --drop {drop}; give at least --steps {drop + 1}")
