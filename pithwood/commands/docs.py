"""`pithwood docs`: bring what is generated in the documents up to date."""

from __future__ import annotations

import argparse
from typing import Any

from pithwood.commands.common import add_command, json_text

HELP = """examples:
  pithwood docs tables
  pithwood docs tables --check --json

For work on pithwood itself: run it in a checkout. Tables and numbers come from bench/results, the configuration page
from the dataclasses; the markers are described in pithwood/pages/generate.py."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "docs", "regenerate tables, numbers and the configuration page in the docs", HELP)
    parser.add_argument("what", metavar="tables", choices=("tables",), help="all that stands between markers")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    parser.add_argument("--json", action="store_true", help="print the pages as one JSON object on stdout")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The pages that were, or would be, changed."""
    from pithwood.pages.generate import ROOT, outdated, pages

    changed, total = outdated(ROOT), len(pages(ROOT))
    if not args.check:
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
    names = [path.relative_to(ROOT).as_posix() for path in changed]
    code = 1 if args.check and names else 0
    if args.json:
        return code, json_text({"pages": total, "changed": names, "written": bool(names) and not args.check})
    if not names:
        return code, f"all {total} pages are up to date"
    return code, "\n".join(f"{'outdated' if args.check else 'written'}: {name}" for name in names)
