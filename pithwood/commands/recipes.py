"""`pithwood recipes`: what can be trained."""

from __future__ import annotations

import argparse
from typing import Any

from pithwood.commands.common import add_command, json_text

HELP = """examples:
  pithwood recipes
  pithwood recipes --json"""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "recipes", "list the recipes", HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Names and first docstring lines."""
    from pithwood.recipes import list_recipes

    found = list_recipes()
    if args.json:
        return 0, json_text({"recipes": [{"name": name, "summary": summary} for name, summary in found]})
    width = max((len(name) for name, _ in found), default=0)
    lines = [f"{name:<{width}}  {summary}" for name, summary in found]
    return 0, "\n".join([*lines, "", "train one with: pithwood train RECIPE"])
