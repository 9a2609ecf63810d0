"""Near-duplicate documents: which ones repeat, by Jaccard similarity, an earlier one that was kept.

MinHash signatures in bands find candidates, a byte of each MinHash sorts out most of them, and the rest is verified on
the full shingle sets, read again, so a document is never dropped on an estimate. All hashes are fixed functions of the
bytes: the result is the same in every process and on every machine. Memory: about 220 bytes per document and the sets
of a few documents at a time.

Legend: W words of a document, X its distinct shingles, M MinHash functions, B bands, N documents.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
"""Consecutive words (or single punctuation marks) that make one shingle."""
NUM_MINHASHES = 64
MISS_PROBABILITY = 1e-3
"""Largest accepted chance that a pair exactly at the threshold shares no band; above it the chance falls."""

_U64 = np.uint64
_STRETCH = 1 << 18
"""Bytes of a document whose words are found at once; bounds the memory of a large document."""
_CACHE_BYTES = 64 << 20


def _byte_classes() -> NDArray[np.uint8]:
    """[256]: 0 white space, 1 part of a word, 2 a mark of its own; as `\\s` and `\\w` of ASCII regular expressions."""
    classes = np.full(256, 2, dtype=np.uint8)
    classes[list(b" \t\n\r\f\v")] = 0
    classes[list(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")] = 1
    return classes


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """[count] 1, base, base^2, ... modulo 2^64."""
    factors = np.full(count, base, dtype=_U64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 step: a bijection of 64-bit integers in which every input bit moves every output bit.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    value = value + _U64(0x9E3779B97F4A7C15)
    value ^= value >> _U64(30)
    value *= _U64(0xBF58476D1CE4E5B9)
    value ^= value >> _U64(27)
    value *= _U64(0x94D049BB133111EB)
    value ^= value >> _U64(31)
    return value


_CLASS = _byte_classes()
_POWER = _powers(0x9E3779B97F4A7C15, 1 << 16)
_HASHES = _mix(np.arange(1, 2 * NUM_MINHASHES + 1, dtype=_U64))
_FACTORS_M = _HASHES[:NUM_MINHASHES] | _U64(1)
_SHIFTS_M = _HASHES[NUM_MINHASHES:]


def check_threshold(threshold: float | None) -> None:
    """Raise ValueError, in the words of the config, unless the threshold is None or in (0, 1]."""
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise ValueError(f"data.dedup_threshold={threshold} must lie in (0, 1], or be null to keep all")


def rows_per_band(threshold: float) -> int:
    """Most MinHashes per band that miss a pair at the threshold with at most MISS_PROBABILITY; 1 if none do."""
    allowed = [
        rows
        for rows in range(1, NUM_MINHASHES + 1)
        if (1.0 - threshold**rows) ** (NUM_MINHASHES // rows) <= MISS_PROBABILITY
    ]
    return max(allowed, default=1)


def shingles(content: bytes) -> NDArray[np.uint64]:
    """[X] uint64, sorted: the distinct hashes of a document's 5-word shingles.

    Words are those of the ASCII regular expression `\\w+`, any other byte but white space stands alone. Never empty: a
    document of fewer words than a shingle is one shingle, a blank one is compared byte for byte.
    """
    words_W = np.concatenate([_word_hashes(part) for part in _stretches(np.frombuffer(content, dtype=np.uint8))])
    if words_W.size < SHINGLE_WORDS:
        whole = words_W.tobytes() if words_W.size else content
        return np.frombuffer(blake2b(whole, digest_size=8, person=b"short").digest(), dtype="<u8").astype(_U64)
    count = words_W.size - SHINGLE_WORDS + 1
    value_W = np.zeros(count, dtype=_U64)
    for offset in range(SHINGLE_WORDS):
        # Mixing between words makes the hash depend on their order.
        value_W = _mix(value_W ^ words_W[offset : offset + count])
    return np.unique(value_W)


def _stretches(bytes_: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The document in parts of bounded size that end where a word does, if there is any such place near."""
    parts, start = [], 0
    while bytes_.size - start > _STRETCH:
        end = start + _STRETCH
        blank = np.flatnonzero(_CLASS[bytes_[end - 4096 : end]] == 0)
        end = end - 4096 + int(blank[-1]) + 1 if blank.size else end
        parts.append(bytes_[start:end])
        start = end
    return [*parts, bytes_[start:]]


def _word_hashes(bytes_: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """[words] uint64: a polynomial of the bytes of each word, modulo 2^64, mixed."""
    kind = _CLASS[bytes_]
    begins = kind != 0
    begins[1:] &= (kind[1:] == 2) | (kind[:-1] != 1)
    starts = np.flatnonzero(begins)
    if starts.size == 0:
        return np.empty(0, dtype=_U64)
    body = slice(int(starts[0]), None)
    lengths = np.diff(starts, append=bytes_.size)
    place = np.arange(starts[0], bytes_.size) - np.repeat(starts, lengths)
    place &= _POWER.size - 1
    value = (bytes_[body].astype(_U64) + _U64(1)) * _POWER[place]
    value[kind[body] == 0] = 0
    return _mix(np.add.reduceat(value, starts - starts[0]))


def minhashes(shingles_X: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[M] uint64: the least value of each of M multiply-shift functions over the shingles; two sets agree in each with
    the probability of their Jaccard similarity. O(M X).

    Broder 1997, "On the resemblance and containment of documents".
    """
    least_M = np.full(NUM_MINHASHES, np.iinfo(np.uint64).max, dtype=_U64)
    for start in range(0, shingles_X.size, 512):
        values = shingles_X[start : start + 512, None] * _FACTORS_M
        values += _SHIFTS_M
        values >>= _U64(20)
        np.minimum(least_M, values.min(axis=0), out=least_M)
    return least_M


def band_keys(least_M: NDArray[np.uint64], rows: int) -> NDArray[np.uint64]:
    """[B] uint64: one hash per band of `rows` MinHashes; documents that share one are candidates."""
    bands = least_M[: NUM_MINHASHES // rows * rows].reshape(-1, rows)
    key_B = np.zeros(bands.shape[0], dtype=_U64)
    for row in range(rows):
        key_B = _mix(key_B ^ bands[:, row])
    return key_B


def sketch(least_M: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """[M] uint8: a byte of each MinHash, enough to tell pairs apart that are not alike at all.

    Li, Koenig 2010, "b-bit minwise hashing".
    """
    return (_mix(least_M) & _U64(255)).astype(np.uint8)


def least_agreement(threshold: float) -> int:
    """Bytes in which the sketches of a pair at the threshold agree, but for a chance of MISS_PROBABILITY."""
    below, count = 0.0, 0
    while count < NUM_MINHASHES:
        below += math.comb(NUM_MINHASHES, count) * threshold**count * (1.0 - threshold) ** (NUM_MINHASHES - count)
        if below > MISS_PROBABILITY:
            break
        count += 1
    return count


def near_duplicates(
    bands: Sequence[Callable[[], NDArray[np.uint64]]],
    sizes_N: NDArray[np.int64],
    sketch_NM: NDArray[np.uint8],
    contents_N: NDArray[np.void],
    read: Callable[[int], bytes],
    threshold: float,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.bool_]:
    """[N] bool: the documents whose Jaccard similarity with an earlier kept one is >= threshold.

    bands        B functions, each returning [N] uint64: every document's key of that band; called one at a time
    sizes_N      [N] int64   number of distinct shingles, as `shingles` gives them
    sketch_NM    [N, M] uint8   `sketch` of each document; pairs whose sketches differ too much are not compared
    contents_N   [N]         content hashes; equal ones are copies
    read         content of a document, called for candidates only
    threshold    in (0, 1]; 1.0 drops only documents with the same set of shingles
    progress     called with the number of documents that are decided

    Documents are taken in their order, so the result is that of comparing each with all kept before it, up to pairs
    that share no band or whose sketches mislead (MISS_PROBABILITY each, for pairs exactly at the threshold).
    """
    num = sizes_N.size
    dropped_N = np.ones(num, dtype=bool)
    # A copy falls with its original: to the same earlier document, or to the original itself.
    dropped_N[np.unique(contents_N, return_index=True)[1]] = False
    group_BN, num_groups = _shared_groups(bands, dropped_N)
    # Per group a linked list of its kept documents: head, and the next one of every (band, document).
    head = np.full(num_groups, -1, dtype=np.int32)
    next_BN = np.full(group_BN.shape, -1, dtype=np.int32)
    known, agreement = _ShingleCache(read), least_agreement(threshold)
    for index in np.flatnonzero((group_BN >= 0).any(axis=0)).tolist():
        groups = [(band, group) for band, group in enumerate(group_BN[:, index].tolist()) if group >= 0]
        shared: dict[int, int] = {}
        for band, group in groups:
            other = int(head[group])
            while other >= 0:
                shared[other] = shared.get(other, 0) + 1
                other = int(next_BN[band, other])
        size = int(sizes_N[index])
        for other in sorted(shared, key=lambda other: (-shared[other], other)):
            smaller, larger = sorted((size, int(sizes_N[other])))
            # No two sets of these sizes can be more alike than smaller / larger.
            alike = smaller >= threshold * larger and (sketch_NM[index] == sketch_NM[other]).sum() >= agreement
            if alike and jaccard(known[index], known[other]) >= threshold:
                dropped_N[index] = True
                break
        else:
            for band, group in groups:
                next_BN[band, index] = head[group]
                head[group] = index
        progress(index + 1)
    return dropped_N


def _shared_groups(
    bands: Sequence[Callable[[], NDArray[np.uint64]]], ignored_N: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], int]:
    """[B, N] int32: a number for each (band, key) that several documents share, -1 where one stands alone; their
    count."""
    group_BN = np.full((len(bands), ignored_N.size), -1, dtype=np.int32)
    rows = np.flatnonzero(~ignored_N)
    first = 0
    for band, load in enumerate(bands):
        _, inverse, counts = np.unique(load()[rows], return_inverse=True, return_counts=True)
        numbers = np.where(counts > 1, np.cumsum(counts > 1) - 1 + first, -1)
        group_BN[band, rows] = numbers[inverse]
        first += int((counts > 1).sum())
    return group_BN, first


class _ShingleCache:
    """Shingle sets of the documents that were asked for last."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._sets: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, index: int) -> NDArray[np.uint64]:
        found = self._sets.get(index)
        if found is None:
            found = self._sets[index] = shingles(self._read(index))
            self._bytes += found.nbytes
            while self._bytes > _CACHE_BYTES and len(self._sets) > 2:
                self._bytes -= self._sets.popitem(last=False)[1].nbytes
        self._sets.move_to_end(index)
        return found


def jaccard(a_X: NDArray[np.uint64], b_X: NDArray[np.uint64]) -> float:
    """|intersection| / |union| of two sorted arrays of distinct values."""
    common = np.intersect1d(a_X, b_X, assume_unique=True).size
    return common / (a_X.size + b_X.size - common)
