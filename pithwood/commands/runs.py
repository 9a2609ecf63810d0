"""`pithwood runs`: list runs, compare them, branch off one, train one on, delete one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text
from pithwood.commands.run_arguments import add_import, import_files, tell
from pithwood.errors import promising

HELP = """examples:
  pithwood runs
  pithwood runs compare demo demo_dense --picture compare.png
  pithwood runs branch demo@200 optim.lr=0.01 steps=400
  pithwood runs extend demo steps=1200
  pithwood runs delete demo-1a2b3c4d.old1 --yes

`pithwood runs ACTION --help` tells more."""

CURVE_POINTS = 20
"""Points of each curve in the JSON of a comparison."""


def add(commands: Any) -> None:
    """Add the command and its actions to the command line."""
    parser = add_command(commands, "runs", "list, compare, branch, extend or delete runs", HELP)
    _add_limit(parser, default=20)
    add_common(parser, "the result")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")

    listing = _add_action(actions, "list", "list the runs, the one that changed last first", "pithwood runs list")
    _add_limit(listing, default=argparse.SUPPRESS)

    compare = _add_action(
        actions,
        "compare",
        "show in which settings runs differ, and their losses at equal tokens",
        "pithwood runs compare demo demo_dense",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="two runs or more")
    compare.add_argument("--picture", metavar="FILE", type=Path, help="draw the losses into this PNG file")

    branch = _add_action(
        actions,
        "branch",
        "train a new run from another's checkpoint, with its settings but for the changes given",
        "pithwood runs branch demo@200 optim.lr=0.01 steps=400",
    )
    branch.add_argument("run", metavar="RUN@STEP", help="the checkpoint to start from; RUN alone takes its newest")
    extend = _add_action(
        actions,
        "extend",
        "train a run on to more steps; without changes, finish one that was stopped",
        "pithwood runs extend demo steps=1200",
    )
    extend.add_argument("run", metavar="RUN", help="a run folder, its name, or the start of its name")
    for action in (branch, extend):
        action.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting")
        action.add_argument("--dry-run", action="store_true", help="print the settings and what they would cost")
        add_import(action)

    delete = _add_action(
        actions, "delete", "delete runs with their checkpoints, after asking", "pithwood runs delete demo-1a2b3c4d"
    )
    delete.add_argument("runs", metavar="RUN", nargs="+", help="a run folder or its whole name")
    delete.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The action's result, in words or as JSON."""
    actions = {"compare": _compare, "branch": _branch, "extend": _extend, "delete": _delete}
    return actions.get(args.action, _list)(args)


def _add_action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(actions, name, summary, f"examples:\n  {example}")
    # no defaults of their own: they would undo what stands before the action
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object on stdout"
    )
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=argparse.SUPPRESS, help="where runs live (default: runs)"
    )
    return parser


def _add_limit(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--limit", metavar="N", type=int, default=default, help="list at most N runs, 0 for all (default: 20)"
    )


def _list(args: argparse.Namespace) -> tuple[int, str]:
    if args.limit < 0:
        raise ValueError(f"--limit={args.limit} must be 0 (all) or more")

    from pithwood.facts.listing import list_runs

    rows = list_runs(args.runs_dir)
    shown = rows[: args.limit] if args.limit else rows
    if args.json:
        return 0, json_text({"runs_dir": str(args.runs_dir), "total": len(rows), "runs": shown})
    if not rows:
        return 0, f"no runs in {args.runs_dir}/; start one with: pithwood train demo"

    from pithwood.observe.inspect_tables import Table, count, number, render

    now = time.time()
    cells = [
        [
            row["name"],
            row["state"],
            "-" if row["step"] is None else f"{row['step']:,}/{row['steps'] or '?'}",
            count(row["tokens"]),
            number(row["validation_bits_per_byte"]),
            f"{count(row['bytes'])}B",
            _ago(now - row["changed"]),
        ]
        for row in shown
    ]
    parts: list[Any] = [
        Table(f"runs in {args.runs_dir}/", ("run", "state", "step", "tokens", "bits/byte", "disk", "changed"), cells)
    ]
    notes = [f"{row['name']} is broken: {' '.join(row['reason'].split())[:200]}" for row in shown if row["reason"]]
    if len(shown) < len(rows):
        notes.append(f"{len(rows) - len(shown)} more; --limit 0 lists all")
    if notes:
        parts += ["", *notes]
    return 0, render(parts).lstrip("\n")


def _compare(args: argparse.Namespace) -> tuple[int, str]:
    from pithwood.facts.compare import compare_runs
    from pithwood.facts.curves import thin_curve
    from pithwood.run_folder import find_run

    if len(args.runs) < 2:
        raise ValueError(f"comparing takes two runs or more, given only {args.runs[0]}")
    folders = [find_run(reference, args.runs_dir) for reference in args.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        names = ", ".join(f"{given} is {folder.name}" for given, folder in zip(args.runs, folders, strict=True))
        raise ValueError(f"a run is named twice: {names}; give whole names")
    result = compare_runs(folders)
    if args.picture is not None:
        from pithwood.observe.inspect_plots import plot_comparison

        plot_comparison(dict(zip(result["runs"], result["curves"], strict=True)), args.picture)
        result["picture"] = str(args.picture)
    if args.json:
        wanted = [f"{kind}{name}" for kind in ("", "validation/") for name in ("loss", "bits_per_byte")]
        result["curves"] = [
            {name: thin_curve(log[name], CURVE_POINTS) for name in wanted if name in log} for log in result["curves"]
        ]
        return 0, json_text(result)
    return 0, _comparison_text(result)


def _comparison_text(result: dict[str, Any]) -> str:
    from pithwood.observe.inspect_tables import Table, count, number, render

    runs = tuple(result["runs"])
    settings = [[row["key"], *(_short(value) for value in row["values"])] for row in result["settings"]]
    rows = []
    for at in result["metrics"]:
        where = f"at {count(at['tokens'])} tokens"
        for title, key in (
            ("train loss", "train_loss"),
            ("train bits/byte", "train_bits_per_byte"),
            ("validation loss", "validation_loss"),
            ("validation bits/byte", "validation_bits_per_byte"),
        ):
            cells = [
                number(values[key]) + ("~" if values["interpolated"] and key.startswith("validation") else "")
                for values in at["values"]
            ]
            if any(cell != "-" for cell in cells):
                rows.append([where, title, *cells])
                where = ""
    rows.append(["whole run", "tokens/s, median", *(count(speed) for speed in result["speed"])])
    parts: list[Any] = [
        Table("settings that differ", ("setting", *runs), settings) if settings else "the settings are the same",
        Table("losses at equal tokens", ("", "", *runs), rows, left=(0, 1)),
        "",
        "training: mean over the last 5% of the tokens up to there; ~ stands between two validations",
    ]
    for name, start in zip(result["runs"], result["logged_from"], strict=True):
        if start > result["metrics"][0]["tokens"]:
            parts.append(f"{name} was logged from {count(start)} tokens on, as branches are")
    if not result["same_text"]:
        parts.append("the runs' texts or tokenizers differ: their losses do not compare")
    if "picture" in result:
        parts.append(f"picture: {result['picture']}")
    return render(parts).lstrip("\n")


def _branch(args: argparse.Namespace) -> tuple[int, str]:
    from pithwood.config import apply_overrides
    from pithwood.run_folder import find_checkpoint, load_run, run_dir

    import_files(args)
    origin = find_checkpoint(args.run, args.runs_dir)
    folder, step = origin.parent.parent, int(origin.name.rpartition("-")[2])
    run = apply_overrides(load_run(folder), args.overrides)
    target = run_dir(run, args.runs_dir)
    if target.resolve() == folder.resolve():
        raise ValueError(
            "a branch must differ from its origin in more than length and logging; change another setting, such as "
            f"seed=1 or optim.lr, or train on with: pithwood runs extend {folder.name} steps=N"
        )
    if run.steps <= step:
        raise ValueError(f"steps={run.steps} leaves nothing to train from step {step}; add steps=N with more")
    inside = folder.parent.resolve() == args.runs_dir.resolve()
    return _train(args, run, args.runs_dir, branch_from=f"{folder.name if inside else folder}@{step}")


def _extend(args: argparse.Namespace) -> tuple[int, str]:
    from pithwood.config import apply_overrides
    from pithwood.run import LENGTH_AND_LOGGING
    from pithwood.run_folder import find_run, finished_summary, load_run, run_dir

    import_files(args)
    folder = find_run(args.run, args.runs_dir)
    old = load_run(folder)
    run = apply_overrides(old, args.overrides)
    if run_dir(old, folder.parent).name != folder.name:
        raise ValueError(
            f"{folder} does not have the name that its settings give it ({run_dir(old, folder.parent).name}); "
            "rename it so to train it on"
        )
    if run_dir(run, folder.parent).name != folder.name:
        raise ValueError(
            f"only length and logging of a run can change ({', '.join(LENGTH_AND_LOGGING)}); for anything else: "
            f"pithwood runs branch {folder.name} {' '.join(args.overrides)}"
        )
    if run.steps < old.steps:
        raise ValueError(f"steps={run.steps} is less than the {old.steps} that {folder.name} has; give more")
    if finished_summary(folder, run) is not None:
        raise ValueError(f"{folder.name} is finished with {run.steps} steps; give more: steps={2 * run.steps}")
    return _train(args, run, folder.parent, branch_from=None)


def _train(args: argparse.Namespace, run: Any, runs_dir: Path, branch_from: str | None) -> tuple[int, str]:
    if args.dry_run:
        from pithwood.config import to_dict
        from pithwood.preflight import dry_run

        figures = dry_run(run, runs_dir, branch_from=branch_from, tell=tell)
        return 0, json_text({"config": to_dict(run), "plan": figures}, indent=None if args.json else 2)

    from pithwood.observe.summary import closing_lines
    from pithwood.train import train

    with promising("checkpoints are intact, and the same command goes on from the last one"):
        summary = train(run, runs_dir=runs_dir, branch_from=branch_from, console=True, command=args.command_line)
    code = 128 + int(summary["interrupted"]) if summary.get("interrupted") else 0
    if args.json:
        return code, json_text(summary)

    import shlex

    from pithwood.commands.common import program_name

    program = program_name()
    imports = [word for file in args.imports for word in ("--import", file)]
    again = f"{program} {shlex.join(['runs', 'extend', str(summary['run_dir']), *imports])}"
    return code, "\n".join(closing_lines({**summary, "recipe": run.name, "command": again, "program": program}))


def _delete(args: argparse.Namespace) -> tuple[int, str]:
    from pithwood.delete_run import delete_run, find_to_delete
    from pithwood.facts.listing import describe_run

    # all are found and checked before the first is touched
    folders = list(dict.fromkeys(find_to_delete(name, args.runs_dir) for name in args.runs))
    rows = [describe_run(folder) for folder in folders]
    if not args.yes:
        _ask(rows)
    for folder in folders:
        delete_run(folder)
    freed = sum(row["bytes"] for row in rows)
    if args.json:
        return 0, json_text({"deleted": [str(folder) for folder in folders], "bytes": freed})

    from pithwood.observe.inspect_tables import count

    return 0, "\n".join([*(f"deleted {folder}" for folder in folders), f"{count(freed)}B freed"])


def _ask(rows: list[dict[str, Any]]) -> None:
    """Ask on the terminal whether to delete these; ValueError if the answer is no, or nobody is there to give one."""
    from pithwood.observe.inspect_tables import count

    if not sys.stdin.isatty():
        names = ", ".join(row["name"] for row in rows)
        raise ValueError(f"nothing was deleted: nobody can be asked about {names} here; add --yes to delete for good")
    for row in rows:
        tell(f"{row['name']}: {row['state']}, {len(row['checkpoints'])} checkpoints, {count(row['bytes'])}B")
    print("delete for good? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was deleted")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json_text(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _ago(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"
