"""What every case has to show, whatever it is about."""

from __future__ import annotations

from tests.bad_input.case import Case, Worlds
from tests.bad_input.page import PAGE, row


def check(case: Case, worlds: Worlds) -> None:
    """The message, the exit code, no traceback, nothing harmed, and the committed page's row."""
    seen = worlds.attempt(case)
    printed = seen.finished.err
    assert seen.line, f"no line holds {case.words}:\n{printed}"
    assert seen.finished.code == case.code, printed
    assert "Traceback" not in printed
    assert case.code == 0 or printed.count("pithwood: error:") == 1, printed
    assert not seen.harmed
    wanted = row(case, seen)
    assert wanted in PAGE.read_text(encoding="utf-8").splitlines(), (
        f"docs/errors.md lacks this row; write it with python -m tests.bad_input.page\n{wanted}"
    )
