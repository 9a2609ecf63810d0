"""Which documents a corpus takes, which of them are held out, and in what order: functions of hashes alone.

Legend: N documents of an index (RECORD of `pithwood/data/spool.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pithwood.data.spool import ascending


def choose(index_N: NDArray[Any], max_bytes: int | None) -> NDArray[Any]:
    """The part of the index that fits into max_bytes, filled in the order of a hash of the names, in its old order."""
    if max_bytes is None:
        return index_N
    return index_N[np.sort(_fill(ascending(index_N["choose"]), index_N["size"], max_bytes))]


def check_distinct(documents: int) -> None:
    """Raise ValueError unless there are documents both to train and to validate on."""
    if documents < 2:
        raise ValueError(
            f"corpus has {documents} distinct document; at least 2 are needed, one of them to validate on: "
            "add files, raise data.max_bytes, or raise data.dedup_threshold"
        )


def split(index_N: NDArray[Any], rank_N: NDArray[Any], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of (training, validation) documents, each in the order of a hash of their names.

    rank_N      [N] V16: keyed hash of each document's content
    fraction    share of the bytes to hold out
    raises      ValueError if there are fewer than two distinct documents

    Whole documents are held out by the hash of their content until the fraction is reached. Equal contents always fall
    on the same side. At least one document is held out and one is left to train on.
    """
    _, first_G, group_N = np.unique(index_N["content"], return_index=True, return_inverse=True)
    check_distinct(first_G.size)
    size_G = index_N["size"][first_G]
    budget = int(int(index_N["size"].sum()) * fraction)
    held_out_G = np.zeros(first_G.size, dtype=bool)
    held_out_G[_fill(ascending(rank_N[first_G]), size_G, budget)] = True
    if not held_out_G.any():
        held_out_G[np.argmin(size_G)] = True
    if held_out_G.all():
        held_out_G[np.argmax(size_G)] = False
    order_N = ascending(index_N["order"])
    held_out_N = held_out_G[group_N][order_N]
    return order_N[~held_out_N], order_N[held_out_N]


def _fill(order: NDArray[np.int64], size_N: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Places taken in this order, passing over those that exceed what is left of the budget."""
    taken = []
    for place, size in zip(order.tolist(), size_N[order].tolist(), strict=True):
        if size <= budget:
            taken.append(place)
            budget -= size
    return np.array(taken, dtype=np.int64)


def slices(size_N: NDArray[np.int64], most_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive documents that reach most_bytes together."""
    ends = np.cumsum(size_N, dtype=np.int64)
    found, start = [], 0
    while start < size_N.size:
        done = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, done + most_bytes, side="left")) + 1
        stop = min(stop, size_N.size)
        found.append((start, stop))
        start = stop
    return found
