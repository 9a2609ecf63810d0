"""Tensors as ranges of elements: what a process holds, what a file holds, and whether files hold all of a tensor once.

A checkpoint knows no mesh: it lists which elements of which tensor lie in which file, and whoever reads it takes what
it needs from there, however many processes wrote it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pithwood.parallel.pieces import Piece


@dataclass(frozen=True)
class Held:
    """What one process holds of a tensor, to be saved from here or filled from a checkpoint."""

    tensor: Tensor
    """The piece's elements in row-major order, in any shape that has as many; loading fills it in place."""
    piece: Piece
    """Which elements of the whole tensor."""
    writes: bool = True
    """Whether this process saves them: of all that hold an element exactly one does."""

    def __post_init__(self) -> None:
        if self.tensor.numel() != self.piece.numel:
            raise ValueError(
                f"a tensor of {self.tensor.numel()} elements cannot be the {self.piece.numel} elements "
                f"{self.piece.start}:{self.piece.stop} of {list(self.piece.shape)}"
            )

    @staticmethod
    def whole(tensor: Tensor, writes: bool = True) -> Held:
        return Held(tensor, Piece.whole(tuple(tensor.shape)), writes)

    @property
    def num_bytes(self) -> int:
        """What a save writes from here."""
        return self.tensor.numel() * self.tensor.dtype.itemsize if self.writes else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements start:stop of a tensor in row-major order, and the safetensors entry that holds them."""

    start: int
    stop: int
    writer: int
    """Rank of the process that wrote it, by which its file is named."""
    key: str
    """Of the entry in that file."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a whole tensor, and where its elements lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """In the order of the elements."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def overlapping(self, piece: Piece) -> Sequence[Chunk]:
        """The chunks that hold elements of a piece of it; of one without elements, none."""
        if not piece.numel:
            return ()
        first = bisect.bisect_right(self.chunks, piece.start, key=lambda chunk: chunk.stop)
        last = bisect.bisect_left(self.chunks, piece.stop, key=lambda chunk: chunk.start)
        return self.chunks[first:last]

    def gap(self) -> str | None:
        """What is wrong if the chunks do not hold every element once; None if they do."""
        end = 0
        for chunk in self.chunks:
            if chunk.start > end:
                return f"elements {end}:{chunk.start} are missing"
            if chunk.start < end:
                return f"elements {chunk.start}:{min(end, chunk.stop)} are there twice"
            end = chunk.stop
        size = math.prod(self.shape)
        if end < size:
            return f"elements {end}:{size} are missing"
        if end > size:
            return f"elements {size}:{end} do not exist"
        if not size and len(self.chunks) != 1:
            return "it is there twice" if self.chunks else "it is missing"
        return None


@dataclass(frozen=True)
class Listing:
    """What one process has of a checkpoint: every tensor that it holds, with the chunks that it wrote."""

    tensors: dict[str, StoredTensor]
    sums: dict[str, str]
    """SHA-256 in hex by file name."""


def merge_listings(listings: Sequence[Listing]) -> Listing:
    """One listing of what all processes wrote; the place of a listing is its process's rank.

    Raises ValueError if processes differ about a tensor, or if an element was written by none of them or by several.
    """
    found: dict[str, StoredTensor] = {}
    holders: dict[str, int] = {}
    chunks: dict[str, list[Chunk]] = {}
    sums: dict[str, str] = {}
    for rank, listing in enumerate(listings):
        sums |= listing.sums
        for name, held in listing.tensors.items():
            first = found.setdefault(name, held)
            if (first.dtype, first.shape) != (held.dtype, held.shape):
                raise ValueError(
                    f"tensor {name!r} is {first.dtype} {list(first.shape)} on rank {holders[name]}, "
                    f"but {held.dtype} {list(held.shape)} on rank {rank}"
                )
            holders.setdefault(name, rank)
            chunks.setdefault(name, []).extend(held.chunks)
    try:
        tensors = {name: complete(name, stored.dtype, stored.shape, chunks[name]) for name, stored in found.items()}
    except ValueError as error:
        raise ValueError(f"{error}; of the processes that hold an element exactly one must write it") from None
    return Listing(tensors, sums)


def complete(name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> StoredTensor:
    """A tensor of these chunks in any order; ValueError if they do not hold every element exactly once."""
    stored = StoredTensor(dtype, shape, tuple(sorted(chunks, key=lambda chunk: (chunk.start, chunk.stop))))
    gap = stored.gap()
    if gap is not None:
        raise ValueError(f"tensor {name!r}: {gap}")
    return stored


def as_held(tensors: Mapping[str, Tensor | Held], writes: bool = True) -> dict[str, Held]:
    """Everything as a `Held`; plain tensors are whole, written if `writes`."""
    return {name: value if isinstance(value, Held) else Held.whole(value, writes) for name, value in tensors.items()}
