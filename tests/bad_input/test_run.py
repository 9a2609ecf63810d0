"""Bad settings, refusals of the system, damaged runs: what the user sees, and that nothing is harmed."""

from __future__ import annotations

import pytest

from tests.bad_input.case import TRAIN, Case, Worlds, hashes, newest_checkpoint
from tests.bad_input.checks import check
from tests.bad_input.page import CASES, PAGE, page
from tests.bad_input.run_cases import RUNS, SETTINGS, SYSTEM
from tests.command_lines import Limits


@pytest.mark.parametrize("case", [*SETTINGS, *SYSTEM, *RUNS], ids=lambda case: case.name)
def test_the_user_is_told_and_nothing_is_harmed(case: Case, worlds: Worlds):
    check(case, worlds)


@pytest.mark.quick
def test_the_page_holds_the_cases_in_their_order_and_no_others():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`pithwood " in line]
    assert len(rows) == len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    assert page({case.name: row for case, row in zip(CASES, rows, strict=True)}) == text


def test_a_run_that_met_a_full_disk_goes_on_when_there_is_room(worlds: Worlds):
    world = worlds.copy()
    assert worlds.call(f"{TRAIN} steps=6", world, Limits(file_bytes=1_000_000)).code == 3
    checkpoint = newest_checkpoint(world)
    before = hashes(checkpoint)
    done = worlds.call(f"{TRAIN} steps=6", world)
    assert done.code == 0, done.err
    assert (checkpoint.parent / "step-00000006").is_dir()
    assert hashes(checkpoint) == before
