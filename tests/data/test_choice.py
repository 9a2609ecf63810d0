from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest

from pithwood.data.choice import choose, slices, split
from pithwood.data.spool import RECORD, ascending, rank

pytestmark = pytest.mark.quick


def index_of(contents: list[bytes], sizes: list[int] | None = None) -> np.ndarray:
    """An index whose documents are named by their place."""
    index = np.zeros(len(contents), dtype=RECORD)
    for row, content in enumerate(contents):
        name = str(row).encode()
        index[row]["size"] = len(content) if sizes is None else sizes[row]
        index[row]["content"] = blake2b(content, digest_size=16).digest()
        index[row]["choose"], index[row]["order"] = rank("choose/0", name), rank("order/0", name)
    return index


def ranks(contents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(rank("split/0", content) for content in contents), dtype="V16")


def test_ranks_sort_as_bytes_do():
    values = [rank("key", str(number).encode()) for number in range(500)] + [
        b"\0" * 16,
        b"\xff" * 16,
        b"a" + b"\0" * 15,
    ]
    order = ascending(np.frombuffer(b"".join(values), dtype="V16"))
    assert [values[place] for place in order] == sorted(values)


def test_documents_are_chosen_up_to_the_bytes_allowed_and_keep_their_order():
    contents = [str(number).encode() * (number % 7 + 1) for number in range(200)]
    index = index_of(contents)
    chosen = choose(index, 300)
    assert 280 < int(chosen["size"].sum()) <= 300
    places = [int(np.flatnonzero(index["content"] == content)[0]) for content in chosen["content"]]
    assert places == sorted(places)
    assert len(choose(index, None)) == 200
    assert len(choose(index, 1)) == 1
    assert len(choose(index[100:], 1)) == 0


def test_a_split_holds_out_whole_documents_up_to_the_fraction():
    contents = [f"document {number}".encode() * 5 for number in range(300)]
    train, validation = split(index_of(contents), ranks(contents), 0.1)
    assert sorted([*train, *validation]) == list(range(300))
    share = sum(len(contents[row]) for row in validation) / sum(map(len, contents))
    assert 0.09 < share <= 0.1
    assert train.tolist() != sorted(train.tolist())


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_of_a_split_gets_a_document(fraction):
    contents = [b"short", b"rather longer"]
    train, validation = split(index_of(contents), ranks(contents), fraction)
    assert (train.tolist(), validation.tolist()) == ([1], [0])


def test_copies_alone_cannot_be_split():
    contents = [b"same"] * 5
    with pytest.raises(ValueError, match="corpus has 1 distinct document; at least 2 are needed"):
        split(index_of(contents), ranks(contents), 0.5)


def test_slices_cover_all_documents_in_order():
    sizes = np.array([3, 3, 3, 100, 1, 1, 1, 1, 1, 1, 9, 9])
    found = slices(sizes, 9)
    assert found == [(0, 3), (3, 4), (4, 11), (11, 12)]
    assert slices(np.zeros(0, dtype=np.int64), 9) == []
