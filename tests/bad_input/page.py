"""docs/errors.md, made of what the cases produce. `python -m tests.bad_input.page` writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bad_input.case import Case, Seen, Worlds
from tests.bad_input.corpus_cases import CORPUS
from tests.bad_input.run_cases import RUNS, SETTINGS, SYSTEM
from tests.command_lines import ROOT, Server

PAGE = ROOT / "docs" / "errors.md"
SECTIONS = {
    "Command line and settings": SETTINGS,
    "What the system refuses": SYSTEM,
    "Text, tokenizers and shards": CORPUS,
    "Runs and checkpoints": RUNS,
}
CASES = tuple(case for cases in SECTIONS.values() for case in cases)

_HEAD = """# When something is wrong

What `pithwood` says to bad input, case by case: what was given, what is allowed, what to change. A test tries every
row, finds the line and the exit code, and compares all files before and after: none that was there is harmed, but for
those that a run which goes on writes anyway. `python -m tests.bad_input.page` writes this page from the same cases.

Exit codes: 0 done, 2 bad input, 3 memory or disk space ran out. Errors are one line on stderr; PITHWOOD_TRACEBACK=1
shows where one comes from. Names of runs, process numbers and sizes differ from machine to machine. The commands meet
a folder `notes`, and a run `debug` of four steps with checkpoints of steps 2 and 4.
"""


def row(case: Case, seen: Seen) -> str:
    """A case's line of the table."""
    before = f"`pithwood {_cell(case.first)}` (interrupted), then " if case.first and case.code == 0 else ""
    before = f"`pithwood {_cell(case.first)}`, then " if case.first and not before else before
    command = f"{before}`pithwood {_cell(case.command)}`"
    # a line that holds a backtick is set between two
    ticks = "``" if "`" in seen.line else "`"
    return f"| {case.what} | {command} | {ticks}{_cell(seen.line)}{ticks} | {seen.finished.code} |"


def page(rows: dict[str, str]) -> str:
    """The page, given the row of each case by its name."""
    parts = [_HEAD]
    for title, cases in SECTIONS.items():
        table = "\n".join(["| what is wrong | command | what you see | exit |", "|---|---|---|---|",
                           *(rows[case.name] for case in cases)])  # fmt: skip
        parts.append(f"## {title}\n{table}\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.removeprefix("pithwood: ").replace("|", "\\|")


def main() -> None:
    """Try every case and write the page."""
    with tempfile.TemporaryDirectory() as scratch, Server(Path(scratch)) as server:
        worlds = Worlds(server, Path(scratch))
        PAGE.write_text(page({case.name: row(case, worlds.attempt(case)) for case in CASES}), encoding="utf-8")


if __name__ == "__main__":
    main()
