"""Faults of a process whose exchanges run on GPUs, where the others do not notice by themselves."""

from __future__ import annotations

import re

import pytest

from tests.parallel.doomed import run_doomed

pytestmark = pytest.mark.multi_gpu

BOUNDS = {"startup_s": 60.0, "silent_s": 6.0, "hang_s": 6.0, "grace_s": 3.0}
"""Making NCCL's first connection takes seconds."""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(rank):
    ended = run_doomed(2, {"what": "kill", "rank": rank, "step": 20}, BOUNDS, device="cuda")
    assert ended.codes == ([-9, 4] if rank == 0 else [4, -9]), ended.errors
    assert max(ended.seconds) < 20
    assert ended.error_line().startswith(f"rank {rank} of 2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_process_is_named_while_the_other_waits_for_its_device(rank):
    ended = run_doomed(2, {"what": "hang", "rank": rank, "step": 20}, BOUNDS, device="cuda")
    assert ended.codes == [4, 4], ended.errors
    assert max(ended.seconds) < 30
    line = ended.error_line()
    assert line.startswith(f"rank {rank} of 2")
    assert re.search(r"hangs in step 20 forward for \d+ s, at parallel/doomed.py:\d+ \(misfortune\)", line)
    assert line.endswith("while 1 other waits")


def test_an_error_is_told_once():
    ended = run_doomed(2, {"what": "raise", "kind": "ValueError", "rank": 1, "step": 20}, BOUNDS, device="cuda")
    assert ended.codes == [4, 2], ended.errors
    assert ended.error_line().endswith("failed in step 20 forward: the data is not there")


def test_a_frozen_process_is_named():
    ended = run_doomed(2, {"what": "freeze", "rank": 1, "step": 20}, BOUNDS, device="cuda")
    assert ended.codes == [4, -9], ended.errors
    assert ended.error_line().startswith("rank 1 of 2")
