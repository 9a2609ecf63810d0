from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from pithwood.data.dedup import (
    MISS_PROBABILITY,
    NUM_MINHASHES,
    SHINGLE_WORDS,
    jaccard,
    near_duplicates,
    rows_per_band,
)
from tests.data.texts import prose

pytestmark = pytest.mark.quick


def edited(text: str, share: float, seed: int) -> str:
    """The text with this share of its words replaced at random places."""
    generator = random.Random(seed)
    words = text.split()
    for place in generator.sample(range(len(words)), int(share * len(words))):
        words[place] = f"new{generator.randrange(10**6)}"
    return " ".join(words)


def true_similarity(a: str, b: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_near_duplicates_are_dropped_and_others_kept():
    base = prose(1, 600)
    contents = [
        base,
        prose(2, 600),
        edited(base, 0.01, 1),
        prose(3, 600),
        base.replace(" ", "\n\n"),
        edited(base, 0.5, 2),
    ]
    assert near_duplicates([text.encode() for text in contents], 0.8) == [2, 4]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_decision_is_the_true_jaccard_similarity(threshold):
    base = prose(5, 400)
    for share in (0.0, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3):
        other = edited(base, share, seed=int(1000 * share))
        expected = [1] if true_similarity(base, other) >= threshold else []
        assert near_duplicates([base.encode(), other.encode()], threshold) == expected, share


def test_copies_of_a_dropped_document_are_measured_against_kept_ones():
    base = prose(7, 400)
    chain = [edited(base, 0.01 * step, seed=9) for step in range(12)]
    dropped = set(near_duplicates([text.encode() for text in chain], 0.8))
    kept = [text for index, text in enumerate(chain) if index not in dropped]
    assert 2 <= len(kept) < len(chain)
    assert all(true_similarity(a, b) < 0.8 for i, a in enumerate(kept) for b in kept[:i])


def test_short_and_blank_documents_are_compared_whole():
    contents = [b"one two", b"one  two\n", b"one three", b"   ", b"\n", b"   ", b"x", b"two one"]
    assert near_duplicates(contents, 0.8) == [1, 5]


def test_word_order_matters():
    words = prose(3, 200).split()
    assert near_duplicates([" ".join(words).encode(), " ".join(reversed(words)).encode()], 0.3) == []


def test_bands_miss_few_pairs_at_the_threshold_and_use_all_rows_allowed():
    for threshold in (0.2, 0.5, 0.8, 0.9, 1.0):
        rows = rows_per_band(threshold)
        assert (1 - threshold**rows) ** (NUM_MINHASHES // rows) <= MISS_PROBABILITY
    assert rows_per_band(0.8) == 4
    assert rows_per_band(0.01) == 1


def test_jaccard_of_sorted_sets():
    a, b = np.array([1, 2, 3, 4], dtype=np.uint64), np.array([3, 4, 5], dtype=np.uint64)
    assert jaccard(a, b) == 2 / 5
    assert jaccard(a, a) == 1.0


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5])
def test_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="dedup_threshold"):
        near_duplicates([b"x"], threshold)


def test_result_does_not_depend_on_the_process():
    code = (
        "from pithwood.data.dedup import _minhash_functions, _shingles, _signature\n"
        "from tests.data.texts import prose\n"
        "print(_signature(_shingles(prose(4, 300).encode(), {}), *_minhash_functions()).tolist())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100
