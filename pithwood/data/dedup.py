"""Near-duplicate documents: which ones repeat, by Jaccard similarity, an earlier one that was kept.

MinHash signatures in bands find candidates; every candidate is then verified on the full shingle sets, so a document
is never dropped on an estimate. All hashes are fixed functions of the bytes: the result is the same in every process
and on every machine.

Legend: W words of a document, X its distinct shingles, M MinHash functions.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
"""Consecutive words (or single punctuation marks) that make one shingle."""
NUM_MINHASHES = 64
MISS_PROBABILITY = 1e-3
"""Largest accepted chance that a pair exactly at the threshold shares no band; above it the chance falls."""

_WORD = re.compile(rb"\w+|[^\w\s]")
_U64 = np.uint64
_WordHash = dict[bytes, int]


def near_duplicates(contents: Sequence[bytes], threshold: float) -> list[int]:
    """Indices, ascending, of the documents whose Jaccard similarity with an earlier kept one is >= threshold.

    contents    documents as bytes, in order of precedence
    threshold   in (0, 1]; 1.0 drops only documents with the same set of shingles
    raises      ValueError if the threshold is out of range

    Documents are compared as sets of 5-word shingles (words in the sense of the ASCII regular expression `\\w+`,
    punctuation alone, white space ignored). O(M X) time for the signatures; candidates are compared pair by pair.
    Broder 1997, "On the resemblance and containment of documents".
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"data.dedup_threshold={threshold} must lie in (0, 1], or be null to keep near-duplicates")
    rows = rows_per_band(threshold)
    factors_M, shifts_M = _minhash_functions()
    known_words: _WordHash = {}
    kept: dict[int, NDArray[np.uint64]] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    dropped = []
    for index, content in enumerate(contents):
        shingles_X = _shingles(content, known_words)
        signature_M = _signature(shingles_X, factors_M, shifts_M)
        bands = [
            (start, signature_M[start : start + rows].tobytes()) for start in range(0, NUM_MINHASHES - rows + 1, rows)
        ]
        candidates = sorted({other for band in bands for other in buckets.get(band, ())})
        if any(jaccard(shingles_X, kept[other]) >= threshold for other in candidates):
            dropped.append(index)
            continue
        kept[index] = shingles_X
        for band in bands:
            buckets.setdefault(band, []).append(index)
    return dropped


def rows_per_band(threshold: float) -> int:
    """Most MinHashes per band that miss a pair at the threshold with at most MISS_PROBABILITY; 1 if none do."""
    allowed = [
        rows
        for rows in range(1, NUM_MINHASHES + 1)
        if (1.0 - threshold**rows) ** (NUM_MINHASHES // rows) <= MISS_PROBABILITY
    ]
    return max(allowed, default=1)


def jaccard(a_X: NDArray[np.uint64], b_X: NDArray[np.uint64]) -> float:
    """|intersection| / |union| of two sorted arrays of distinct values."""
    common = np.intersect1d(a_X, b_X, assume_unique=True).size
    return common / (a_X.size + b_X.size - common)


def _shingles(content: bytes, known_words: _WordHash) -> NDArray[np.uint64]:
    """[X] sorted distinct shingle hashes; never empty: a document of fewer words than a shingle is one shingle."""
    hashes: list[int] = []
    for word in _WORD.findall(content):
        value = known_words.get(word)
        if value is None:
            # Two checksums side by side: 32 bits alone collide among the words of a large corpus.
            value = known_words[word] = zlib.crc32(word) << 32 | zlib.adler32(word)
        hashes.append(value)
    if len(hashes) < SHINGLE_WORDS:
        whole = zlib.crc32(content if not hashes else b" ".join(_WORD.findall(content)))
        return _mix(np.array([whole], dtype=_U64))
    words_W = np.array(hashes, dtype=_U64)
    count = words_W.size - SHINGLE_WORDS + 1
    value_W = np.zeros(count, dtype=_U64)
    for offset in range(SHINGLE_WORDS):
        # Mixing between words makes the hash depend on their order.
        value_W = _mix(value_W ^ words_W[offset : offset + count])
    return np.unique(value_W)


def _signature(
    shingles_X: NDArray[np.uint64], factors_M: NDArray[np.uint64], shifts_M: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """[M] MinHash signature: the least value of each multiply-shift function over the shingles."""
    signature_M = np.empty(NUM_MINHASHES, dtype=_U64)
    for index in range(NUM_MINHASHES):
        signature_M[index] = ((shingles_X * factors_M[index] + shifts_M[index]) >> _U64(20)).min()
    return signature_M


def _minhash_functions() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Fixed odd factors and shifts, [M] each."""
    values = _mix(np.arange(1, 2 * NUM_MINHASHES + 1, dtype=_U64))
    return values[:NUM_MINHASHES] | _U64(1), values[NUM_MINHASHES:]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 step: a bijection of 64-bit integers in which every input bit moves every output bit.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    value = value + _U64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _U64(27))) * _U64(0x94D049BB133111EB)
    return value ^ (value >> _U64(31))
