"""`pithwood explain`: what a setting means, what it may be, and which code reads it."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.run_arguments import add_import, import_files

HELP = """examples:
  pithwood explain
  pithwood explain model.attention.top_k
  pithwood explain top_k
  pithwood explain MoBAConfig --json

A key is a path as in overrides, the end of one, or a class. Without a key the settings of a run are listed."""

READERS = 6
"""Readers told of each setting; --json tells all."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "explain", "say what a setting means, what it may be and which code reads it", HELP)
    parser.add_argument("key", metavar="KEY", nargs="?", help="a setting or a class of settings")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    add_import(parser)


def run(args: argparse.Namespace) -> tuple[int, str]:
    """One setting at length, several as a list."""
    import_files(args)

    from pithwood.facts.settings import explain

    rows = explain("Run" if args.key is None else args.key)
    if args.json:
        return 0, json_text({"settings": rows})
    several = len({row["class"] for row in rows}) == 1 < len(rows)
    return 0, _list(rows) if several else "\n\n".join(_at_length(row) for row in rows)


def _list(rows: list[dict[str, Any]]) -> str:
    """A class's settings, one after another in short."""
    name = rows[0]["class"]
    places = [path.rpartition(".")[0] for path in rows[0]["paths"]]
    lines = [name + (f", at {' or '.join(places)}" if any(places) else "")]
    for row in rows:
        default = "required" if row["required"] else f"default {_value(row['default'])}"
        lines += ["", f"{row['field']}: {default}", *_wrapped(row["meaning"])]
    return "\n".join([*lines, "", f"more about one: pithwood explain {name}.{rows[0]['field']}"])


def _at_length(row: dict[str, Any]) -> str:
    lines = [f"{row['class']}.{row['field']}", *_wrapped(row["meaning"])]
    lines += _wrapped("path: " + " or ".join(row["paths"]))
    lines += _wrapped(f"type: {row['type']}")
    lines += _wrapped("it must be given" if row["required"] else f"default: {_value(row['default'])}")
    for message in row["refused"]:
        lines += _wrapped(f"refused with: {message}")
    for name, fields in row["holds"].items():
        lines += _wrapped(f"{name} has: {', '.join(fields) or 'no settings'}")
    for reader in row["readers"][:READERS]:
        lines += _wrapped(f"read by: {reader['file']}:{reader['line']} {reader['where']}")
    if len(row["readers"]) > READERS:
        lines += _wrapped(f"... and {len(row['readers']) - READERS} more; --json tells all")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _value(value: Any) -> str:
    """A default in one line: settings of a class as their type, its own defaults can be asked for."""
    if isinstance(value, dict) and "type" in value:
        return str(value["type"])
    text = json_text(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
