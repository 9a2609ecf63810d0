"""What all commands share: parsers that report in one line, common options, JSON text."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(unknown[1], re.findall(r"[\w-]+", unknown[2]), 1) if unknown else []
        message += f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{message}; see {self.prog} --help")


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """A parser whose epilog holds the examples, printed as they stand."""
    form = argparse.RawDescriptionHelpFormatter
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)


def add_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of one more command."""
    description = summary[0].upper() + summary[1:] + "."
    form = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False
    )


def add_common(parser: argparse.ArgumentParser, result: str) -> None:
    """The options --json (prints `result`) and --runs-dir."""
    parser.add_argument("--json", action="store_true", help=f"print {result} as one JSON object on stdout")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs live (default: runs)"
    )


def program_name() -> str:
    """How the user can call this program again: by its name if that finds it, else as it was called now."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m pithwood"
    found = shutil.which("pithwood")
    if found is not None and called.exists() and os.path.samefile(found, called):
        return "pithwood"
    return shlex.quote(os.path.relpath(called)) if called.exists() else "pithwood"


def json_text(value: Any, indent: int | None = None) -> str:
    """Valid JSON always: numbers that JSON lacks become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
