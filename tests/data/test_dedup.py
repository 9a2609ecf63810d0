from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pytest

from pithwood.data.dedup import (
    MISS_PROBABILITY,
    NUM_MINHASHES,
    SHINGLE_WORDS,
    band_keys,
    check_threshold,
    jaccard,
    least_agreement,
    minhashes,
    rows_per_band,
    shingles,
    sketch,
)
from pithwood.data.dedup import near_duplicates as find_near_duplicates
from tests.data.texts import AWKWARD, prose

pytestmark = pytest.mark.quick


def near_duplicates(contents: Sequence[bytes], threshold: float) -> list[int]:
    """Rows of the contents that repeat an earlier one."""
    least = [minhashes(shingles(content)) for content in contents]
    keys = np.stack([band_keys(one, rows_per_band(threshold)) for one in least])
    hashes = b"".join(blake2b(content, digest_size=16).digest() for content in contents)
    dropped = find_near_duplicates(
        [lambda band=band: keys[:, band] for band in range(keys.shape[1])],
        np.array([shingles(content).size for content in contents]),
        np.stack([sketch(one) for one in least]),
        np.frombuffer(hashes, dtype="V16"),
        contents.__getitem__,
        threshold,
    )
    return np.flatnonzero(dropped).tolist()


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
        check_threshold(threshold)


def test_result_does_not_depend_on_the_process():
    code = (
        "from pithwood.data.dedup import band_keys, minhashes, shingles\n"
        "from tests.data.texts import prose\n"
        "print(band_keys(minhashes(shingles(prose(4, 300).encode())), 4).tolist())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100


def test_words_are_those_of_the_regular_expression_wherever_a_long_document_is_cut():
    text = ("".join(AWKWARD) + prose(6, 2000) + "x" * 5000 + "; y = f(x)[0]\n") * 20
    expected = re.findall(rb"\w+|[^\w\s]", text.encode())
    assert len(text.encode()) > 1 << 18
    words = [b"".join(expected[i : i + 1]) for i in range(len(expected))]
    spaced = b" ".join(words)
    assert np.array_equal(shingles(text.encode()), shingles(spaced))
    assert shingles(text.encode()).size == len({tuple(words[i : i + 5]) for i in range(len(words) - 4)})


def test_documents_are_read_again_only_where_bands_agree():
    contents = [prose(seed, 300).encode() for seed in range(20)] + [edited(prose(3, 300), 0.01, 1).encode()]
    asked: list[int] = []

    def read(row: int) -> bytes:
        asked.append(row)
        return contents[row]

    least = [minhashes(shingles(content)) for content in contents]
    keys = np.stack([band_keys(one, 4) for one in least])
    sketches = np.stack([sketch(one) for one in least])
    hashes = np.frombuffer(b"".join(blake2b(c, digest_size=16).digest() for c in contents), dtype="V16")
    sizes = np.array([shingles(content).size for content in contents])
    bands = [lambda band=band: keys[:, band] for band in range(keys.shape[1])]
    dropped = find_near_duplicates(bands, sizes, sketches, hashes, read, 0.8)
    assert np.flatnonzero(dropped).tolist() == [20]
    assert sorted(asked) == [3, 20]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.1, 0.3])
def test_sketches_agree_as_often_as_documents_are_alike(share):
    agreed, expected = 0, 0.0
    for seed in range(20):
        base = prose(100 + seed, 500)
        other = edited(base, share, seed)
        pair = [sketch(minhashes(shingles(text.encode()))) for text in (base, other)]
        agreed += int((pair[0] == pair[1]).sum())
        expected += NUM_MINHASHES * true_similarity(base, other)
    # Three standard deviations of 20 * 64 draws, and bytes that agree by chance.
    assert abs(agreed - expected) < 3 * (20 * NUM_MINHASHES / 4) ** 0.5 + 20 * NUM_MINHASHES / 256


def test_sketches_rule_out_few_pairs_at_the_threshold_and_most_below_it():
    generator = np.random.Generator(np.random.PCG64(0))
    for threshold in (0.2, 0.5, 0.8, 0.95, 1.0):
        agreements = generator.binomial(NUM_MINHASHES, threshold, size=200_000)
        assert (agreements < least_agreement(threshold)).mean() <= 1.5 * MISS_PROBABILITY
    assert least_agreement(1.0) == NUM_MINHASHES
    assert 38 <= least_agreement(0.8) <= 42
