"""What one process holds of a tensor: a contiguous range of its elements in row-major order.

Experts are divided along their first dimension, and shards of weights cut the flat memory into equal parts, so that
every piece on every mesh is such a range: initial values, optimizer state and checkpoints know no other form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Elements start:stop of a tensor of this shape."""

    shape: tuple[int, ...]
    """Of the whole tensor, as one process would hold it."""
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            raise ValueError(f"elements {self.start}:{self.stop} do not lie in a tensor of shape {self.shape}")

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Piece:
        return Piece(tuple(shape), 0, math.prod(shape))

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.numel == math.prod(self.shape)

    def part(self, index: int, parts: int) -> Piece:
        """The index-th of equal parts; ValueError if they cannot be equal."""
        if self.numel % parts:
            raise ValueError(f"{self.numel} elements cannot be cut into {parts} equal parts")
        size = self.numel // parts
        return Piece(self.shape, self.start + index * size, self.start + (index + 1) * size)

    def overlap(self, other: Piece) -> tuple[int, int] | None:
        """(start, stop) of the elements that both hold, None if there are none."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return (start, stop) if start < stop else None
