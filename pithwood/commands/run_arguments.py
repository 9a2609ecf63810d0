"""Arguments that all commands share which open a run: which run, which checkpoint, where to compute."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pithwood.commands.common import add_common


def add_run_arguments(parser: argparse.ArgumentParser, result: str) -> None:
    """RUN, --step, --device, --import, --json (prints `result`) and --runs-dir."""
    parser.add_argument("run", metavar="RUN", help="a run folder, its name, or the start of its name")
    parser.add_argument("--step", metavar="N", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--part", metavar="NAME", help="which part's text, of a run that was trained on a mixture")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: a GPU if any)"
    )
    add_import(parser)
    add_common(parser, result)


def add_import(parser: argparse.ArgumentParser) -> None:
    """--import FILE."""
    parser.add_argument(
        "--import", dest="imports", metavar="FILE", action="append", default=[],
        help="Python file that defines classes of the run's settings, such as a mixer of your own",
    )  # fmt: skip


def import_files(args: argparse.Namespace) -> None:
    """Import what --import named."""
    from pithwood.recipes import import_file

    for file in args.imports:
        import_file(Path(file))


def tell(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
