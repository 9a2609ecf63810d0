"""`pithwood inspect`: what a run's model consists of, what it costs, what its routers and selections do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.run_arguments import add_run_arguments, import_files, tell

if TYPE_CHECKING:
    from pithwood.observe.inspect_tables import Table

HELP = """examples:
  pithwood inspect demo
  pithwood inspect demo --step 200 --samples 64
  pithwood inspect demo --pictures /tmp/pictures --json

Expert load and block choices are measured on validation samples. The pictures curves.png and routing.png are drawn into
RUN/inspect/ unless --pictures names another folder."""

FEW, MANY = 12, 4
"""Layers shown: all up to FEW, else the first and last MANY and the most uneven one."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands, "inspect", "show a run's parameters, cost per token, expert load, block choices and curves", HELP
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=16, help="validation samples to measure on (default: 16)"
    )
    parser.add_argument("--points", metavar="N", type=int, default=20, help="points per curve in --json (default: 20)")
    parser.add_argument("--pictures", metavar="DIR", type=Path, help="folder of the pictures (default: RUN/inspect)")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    add_run_arguments(parser, "everything measured")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The facts, as tables or as JSON."""
    for name, least in (("samples", 1), ("points", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
    if args.pictures is not None and args.no_pictures:
        raise ValueError("--pictures and --no-pictures exclude each other; give one of them")

    from pithwood.facts.curves import thin_curve
    from pithwood.facts.run import run_curves, run_facts
    from pithwood.observe.inspect_plots import plot_curves, plot_routing
    from pithwood.run_folder import find_run, open_run, open_run_corpus

    import_files(args)
    folder = find_run(args.run.partition("@")[0], args.runs_dir)
    pictures: Path | None = None if args.no_pictures else args.pictures or folder / "inspect"
    if pictures is not None:
        _make_folder(pictures)
    opened = open_run(args.run, args.runs_dir, step=args.step, device=args.device)
    corpus = open_run_corpus(opened, args.runs_dir, tell, args.part)
    facts = run_facts(opened, corpus, args.samples)
    title = f"{folder.name} at step {opened.step}"
    drawn: dict[str, str] = {}
    if pictures is not None:
        plot_curves(run_curves(opened), pictures / "curves.png", title)
        plot_routing(facts["routing"], pictures / "routing.png", title)
        drawn = {name: str(pictures / f"{name}.png") for name in ("curves", "routing")}
    if args.json:
        curves = {
            name: {"summary": curve["summary"], **thin_curve(_columns(curve), args.points)}
            for name, curve in facts["curves"].items()
        }
        return 0, json_text({**facts, "curves": curves, "pictures": drawn})
    return 0, _text(facts, title, drawn)


def _make_folder(folder: Path) -> None:
    import os

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"no folder {folder} can be made for the pictures ({error.strerror}); give --pictures DIR or --no-pictures"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to; give --pictures DIR or --no-pictures")


def _columns(curve: dict[str, Any]) -> dict[str, list[float]]:
    return {name: curve[name] for name in ("steps", "tokens", "values")}


def _text(facts: dict[str, Any], title: str, drawn: dict[str, str]) -> str:
    from pithwood.observe.inspect_tables import count, render

    about, routing = facts["run"], facts["routing"]
    parts: list[str | Table] = [
        f"{title} of {about['steps']}, {count(about['tokens'])} tokens trained, {about['precision']}",
        f"mixers: {_in_words(about['mixers'])}",
        _parameters(facts["parameters"]),
        _cost(facts["cost"]),
    ]
    if routing["experts"]:
        parts.append(_experts(routing))
    if routing["blocks"]:
        parts.append(_blocks(routing))
    parts.append(_curves(facts["curves"]))
    if drawn:
        parts += ["", f"pictures: {', '.join(drawn.values())}"]
    return render(parts)


def _in_words(mixers: list[str]) -> str:
    """[A, A, B] as "2 x A, 1 x B", in the order of first appearance."""
    return ", ".join(f"{mixers.count(name)} x {name}" for name in dict.fromkeys(mixers))


def _parameters(parameters: dict[str, Any]) -> Table:
    from pithwood.observe.inspect_tables import Table, count, percent

    total = parameters["total"]
    rows = [
        [row["part"], count(row["total"]), percent(row["total"] / total, 1), count(row["active"])]
        for row in parameters["parts"]
    ]
    rows.append(["all", count(total), "100.0%", count(parameters["active"])])
    return Table("parameters (active: those that one token meets)", ("part", "total", "share", "active"), rows)


def _cost(cost: dict[str, Any]) -> Table:
    from pithwood.observe.inspect_tables import Table, count, percent

    rows = [
        [row["part"], count(row["forward_flops"]), percent(row["share"], 1), count(row["executed_flops"])]
        for row in cost["parts"]
    ]
    rows.append(["all", count(cost["forward_flops"]), "100.0%", count(cost["executed_flops"])])
    title = f"forward FLOPs per token at length {cost['length']:,}; cache {count(cost['cache_bytes'])}B per token"
    return Table(title, ("part", "FLOPs", "share", "executed"), rows)


def _experts(routing: dict[str, Any]) -> Table:
    from pithwood.observe.inspect_tables import Table, number

    rows = [
        [
            str(row["layer"]),
            str(len(row["counts"])),
            number(row["max_over_mean"], 2),
            number(row["entropy"]),
            str(row["dead"]),
        ]
        for row in _few(routing["experts"], "max_over_mean")
    ]
    title = _measured("expert load", routing, len(rows), len(routing["experts"]))
    return Table(title, ("layer", "experts", "max/mean", "entropy", "dead"), rows)


def _blocks(routing: dict[str, Any]) -> Table:
    from pithwood.observe.inspect_tables import Table, number, percent

    rows = []
    for row in _few(routing["blocks"], "popular_share"):
        near = sum(part["share"] for part in row["distances"] if part["from"] == 1)
        rows.append(
            [
                str(row["layer"]),
                f"{row['block_size']} x {row['top_k']}",
                percent(row["own_share"]),
                percent(near),
                number(row["entropy"]),
                number(row["union_128"], 1),
                percent(row["popular_share"]),
            ]
        )
    title = _measured("block choices", routing, len(rows), len(routing["blocks"]))
    return Table(title, ("layer", "size x top_k", "own", "one back", "entropy", "union/128", "top 1%"), rows)


def _curves(curves: dict[str, Any]) -> Table:
    from pithwood.observe.inspect_tables import Table

    names = ("first", "last", "least", "greatest", "median")
    rows = [[name, *(f"{curve['summary'][column]:.4g}" for column in names)] for name, curve in curves.items()]
    return Table("curves", ("curve", *names), rows)


def _few(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """All rows if they are few, else the first, the last, and the one where `key` is greatest."""
    if len(rows) <= FEW:
        return rows
    kept = {row["layer"]: row for row in (*rows[:MANY], max(rows, key=lambda row: row[key]), *rows[-MANY:])}
    return [kept[layer] for layer in sorted(kept)]


def _measured(what: str, routing: dict[str, Any], shown: int, layers: int) -> str:
    some = f", {shown} of {layers} layers" if shown < layers else ""
    return f"{what} on {routing['samples']:,} validation samples ({routing['tokens']:,} tokens{some})"
