"""`pithwood report`: one HTML page about one or several runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text
from pithwood.commands.run_arguments import add_import, import_files, tell

HELP = """examples:
  pithwood report demo
  pithwood report demo demo_dense --out compared.html

The page holds curves, tables, maps of chosen blocks, expert loads, spikes and samples of text, and needs no network:
open it in any browser, mail it, keep it. RUN@STEP tells of an earlier checkpoint; several runs are compared over their
whole logs. Expert load and block choices are measured on validation samples."""

MOST_RUNS = 6
"""Runs on one page; their colours would repeat beyond."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "report", "write one HTML page about a run, or about several side by side", HELP)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, its name, or the start of its name")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the first run)")
    parser.add_argument(
        "--samples", metavar="N", type=int, default=16, help="validation samples to measure on (default: 16)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: a GPU if any)"
    )
    add_import(parser)
    add_common(parser, "where the page lies")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The path of the page."""
    if args.samples < 1:
        raise ValueError(f"--samples={args.samples} must be at least 1")
    if len(args.runs) > MOST_RUNS:
        raise ValueError(f"{len(args.runs)} runs are too many for one page; give at most {MOST_RUNS}")

    from pithwood.observe.events import write_atomically
    from pithwood.report.gather import gather_comparison, gather_run
    from pithwood.report.page import report_page
    from pithwood.run_folder import find_run

    import_files(args)
    folders = [find_run(reference.partition("@")[0], args.runs_dir) for reference in args.runs]
    for place, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:place]):
            raise ValueError(f"{folder.name} is named twice; name each run once")
    out: Path = args.out or folders[0] / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise ValueError(f"--out: {out} {what}; give the path of a file, such as report.html")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out.parent} cannot be written to; give another place with --out FILE")
    comparison = gather_comparison(folders)
    gathered = [
        gather_run(reference, args.runs_dir, samples=args.samples, device=args.device, progress=tell)
        for reference in args.runs
    ]
    page = report_page(gathered, comparison).encode()
    write_atomically(out, page)
    if args.json:
        names = [run["name"] for run in gathered]
        spikes = {run["name"]: len(run["spikes"]) for run in gathered}
        return 0, json_text({"page": str(out), "bytes": len(page), "runs": names, "spikes": spikes})
    return 0, f"{out} ({len(page) / 1e3:,.0f} kB); open it in a browser"
