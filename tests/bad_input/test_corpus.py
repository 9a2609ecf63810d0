"""Bad text, tokenizers and shards: what the user sees, and that nothing is harmed."""

from __future__ import annotations

import hashlib

import pytest

from tests.bad_input.case import Case, Worlds
from tests.bad_input.checks import check
from tests.bad_input.corpus_cases import CORPUS
from tests.command_lines import Limits

PREPARE = "prepare notes vocab_size=300 --out out"


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_the_user_is_told_and_nothing_is_harmed(case: Case, worlds: Worlds):
    check(case, worlds)


def test_an_interrupted_prepare_ends_with_the_files_of_an_unbroken_one(worlds: Worlds):
    unbroken, broken = worlds.copy(), worlds.copy()
    assert worlds.call(PREPARE, unbroken).code == 0
    assert worlds.call(PREPARE, broken, Limits(file_bytes=20_000)).code == 3
    assert not (broken / "out").exists()
    assert worlds.call(PREPARE, broken).code == 0
    shards, others = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (world / "out").iterdir()}
        for world in (unbroken, broken)
    )
    assert shards == others
