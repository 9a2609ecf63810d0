"""`pithwood config`: a recipe's settings in full, or the JSON schema of all settings."""

from __future__ import annotations

import argparse
from typing import Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.run_arguments import add_import, import_files

HELP = """examples:
  pithwood config demo
  pithwood config demo model.attention.top_k=2 --json
  pithwood config --schema > schema.json

Both are JSON; --json puts it on one line. The schema is JSON Schema 2020-12."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "config", "print a recipe's settings in full, or the JSON schema of all", HELP)
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a name that `pithwood recipes` lists, or path/to/file.py:function"
    )
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    parser.add_argument("--schema", action="store_true", help="print the schema that every run's settings follow")
    parser.add_argument("--json", action="store_true", help="print the JSON on one line")
    add_import(parser)


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The settings or the schema, as JSON."""
    if args.schema == (args.recipe is not None):
        raise ValueError("give a recipe to print its settings, or --schema to print the schema of all")
    import_files(args)
    if args.schema:
        from pithwood.facts.settings import import_rooms
        from pithwood.run import Run
        from pithwood.schema import schema

        import_rooms()
        content = schema(Run)
    else:
        from pithwood.config import apply_overrides, to_dict
        from pithwood.recipes import load_recipe

        run = apply_overrides(load_recipe(args.recipe), args.overrides)
        run.validate()
        content = to_dict(run)
    return 0, json_text(content, indent=None if args.json else 2)
