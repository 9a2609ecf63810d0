"""Which process orthogonalises which matrix where shards cut matrices, or replicas hold them twice.

Every process computes the same answer from sizes alone. A matrix that one fold holds whole is updated there; any other
goes to one owner among those who hold a part of it, the costliest first, each to the least loaded. Between replicas a
matrix is shared too where that is quicker than doing it twice. Owners work through their matrices in rounds: in each,
stretches travel to the owners, and stretches of the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from pithwood.optim.layout import Division, Place

REPLICA_SIDE = 1024
"""Smaller side from which on replicas on GPUs share whole matrices out between them: an element costs 17 x side FLOPs
(five rounds, half of the symmetric products left out) and 2 bytes of exchange, which at 500 TFLOP/s and 50 GB/s
(InfiniBand at 400 Gbit/s) balance at 1176, and the exchange runs under other matrices' work."""
ROUND_SHARE = 4
"""A round takes this fraction of the matrices that are orthogonalised at once elsewhere: several are under way."""


@dataclass(frozen=True)
class Holding:
    """A stretch of one matrix: elements start:stop of its parameter, in the hands of a fold."""

    fold: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SharedMatrix:
    """A matrix that one process orthogonalises for others."""

    name: str
    """Of its parameter."""
    start: int
    """The parameter's element that is its first."""
    rows: int
    cols: int
    held: tuple[Holding, ...]
    """By fold, the same in all replicas."""
    replica: int = 0
    """Of the owner."""
    fold: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def needed(self) -> list[Holding]:
        """What the owner needs to have the whole matrix, in the order of its elements."""
        own = [holding for holding in self.held if holding.fold == self.fold]
        return own if own[0].size == self.size else list(self.held)


@dataclass(frozen=True)
class Stack:
    """A parameter's logical matrices and how their memory is divided."""

    name: str
    num: int
    rows: int
    cols: int
    division: Division


@dataclass
class Round:
    """What one process does in a round. Sizes are elements per fold; stretches stand in the order of the folds that
    they come from or go to, those of one fold in the order of the matrices."""

    parts: list[list[tuple[SharedMatrix, Holding]]]
    """What it holds of the matrices of each replica's owners."""
    sends: list[bool]
    """Which parts of its own replica's owners travel to them; the others are whole at the owner."""
    sent_sizes: list[int]
    owned: list[SharedMatrix]
    """Of one shape."""
    arriving: list[tuple[int, Holding]]
    """Number among the owned, and stretch."""
    arriving_sizes: list[int]
    leaving: list[tuple[int, Holding]]
    leaving_sizes: list[int]
    returned_sizes: list[int]
    width: int
    """Elements of the replica of whose owners it holds most."""
    everything: list[tuple[SharedMatrix, Holding]] = field(init=False)
    """Its parts of all replicas' matrices."""

    def __post_init__(self) -> None:
        self.everything = [part for parts in self.parts for part in parts]


def cost(rows: int, cols: int) -> int:
    """FLOPs of a round of Newton-Schulz on a matrix, without what symmetry saves."""
    small, large = min(rows, cols), max(rows, cols)
    return 2 * small * small * (2 * large + small)


def replicas_share(rows: int, cols: int, device: torch.device) -> bool:
    """Whether replicas share out a matrix that each of them holds whole."""
    return device.type != "cuda" or min(rows, cols) >= REPLICA_SIDE


def share_out(
    stacks: Sequence[Stack], place: Place, replicated: Callable[[int, int], bool]
) -> tuple[dict[str, range], list[SharedMatrix]]:
    """Return the matrices of each stack that this process updates alone, and all that have an owner, in order.

    replicated  (rows, columns) -> whether replicas share out what each holds whole
    """
    loads = [[0] * place.folds for _ in range(place.replicas)]
    alone: dict[str, range] = {}
    shared: list[SharedMatrix] = []
    for stack in stacks:
        size, price = stack.rows * stack.cols, cost(stack.rows, stack.cols)
        sharers = place.folds // place.ep if stack.division.experts else place.folds
        # a matrix that lies whole in a piece is nobody else's, unless all who could divide the parameter hold it
        keeps = (stack.division.cut or sharers == 1) and not (place.replicas > 1 and replicated(stack.rows, stack.cols))
        held: dict[int, list[Holding]] = {}
        for fold in range(place.folds):
            piece = stack.division.piece(place, fold)
            own = range(-(-piece.start // size), piece.stop // size) if keeps else range(0)
            if fold == place.fold:
                alone[stack.name] = own
            for replica in range(place.replicas):
                loads[replica][fold] += len(own) * price
            for number in range(piece.start // size, -(-piece.stop // size)):
                if number not in own:
                    start, stop = max(piece.start, number * size), min(piece.stop, (number + 1) * size)
                    held.setdefault(number, []).append(Holding(fold, start, stop))
        for number in sorted(held):
            shared.append(SharedMatrix(stack.name, number * size, stack.rows, stack.cols, tuple(held[number])))
    return alone, _choose_owners(shared, loads)


def _choose_owners(shared: list[SharedMatrix], loads: list[list[int]]) -> list[SharedMatrix]:
    """The least loaded, then who holds most of it, then the first."""
    prices = [cost(matrix.rows, matrix.cols) for matrix in shared]
    owned = list(shared)
    for index in sorted(range(len(shared)), key=lambda index: -prices[index]):
        matrix = shared[index]
        _, _, replica, fold = min(
            (row[holding.fold], -holding.size, replica, holding.fold)
            for replica, row in enumerate(loads)
            for holding in matrix.held
        )
        loads[replica][fold] += prices[index]
        owned[index] = replace(matrix, replica=replica, fold=fold)
    return owned


def plan_rounds(shared: Sequence[SharedMatrix], place: Place, most: Callable[[int, int], int]) -> list[Round]:
    """Return this process's part in each round.

    most  (rows, columns) -> matrices of a round, at least 1
    """
    queues: dict[tuple[int, int], list[list[SharedMatrix]]] = {}
    for matrix in sorted(shared, key=lambda matrix: (-matrix.size, matrix.rows)):
        chunks = queues.setdefault((matrix.replica, matrix.fold), [])
        shape = (matrix.rows, matrix.cols)
        if not chunks or (chunks[-1][0].rows, chunks[-1][0].cols) != shape or len(chunks[-1]) >= most(*shape):
            chunks.append([])
        chunks[-1].append(matrix)
    count = max((len(chunks) for chunks in queues.values()), default=0)
    return [
        _round([matrix for owner in sorted(queues) for matrix in queues[owner][number : number + 1]], place)
        for number in range(count)
    ]


def _round(chunks: list[list[SharedMatrix]], place: Place) -> Round:
    parts: list[list[tuple[SharedMatrix, Holding]]] = [[] for _ in range(place.replicas)]
    owned: list[SharedMatrix] = []
    for matrix in (matrix for chunk in chunks for matrix in chunk):
        for holding in matrix.held:
            if holding.fold == place.fold:
                parts[matrix.replica].append((matrix, holding))
        if (matrix.replica, matrix.fold) == (place.replica, place.fold):
            owned.append(matrix)
    own = parts[place.replica]
    sends = [holding in matrix.needed for matrix, holding in own]
    arriving = [(number, holding) for number, matrix in enumerate(owned) for holding in matrix.needed]
    leaving = [(number, holding) for number, matrix in enumerate(owned) for holding in matrix.held]
    arriving.sort(key=lambda stretch: stretch[1].fold)
    leaving.sort(key=lambda stretch: stretch[1].fold)
    return Round(
        parts,
        sends,
        _sizes(place, [(m.fold, h.size) for (m, h), goes in zip(own, sends, strict=True) if goes]),
        owned,
        arriving,
        _sizes(place, [(holding.fold, holding.size) for _, holding in arriving]),
        leaving,
        _sizes(place, [(holding.fold, holding.size) for _, holding in leaving]),
        _sizes(place, [(matrix.fold, holding.size) for matrix, holding in own]),
        max(sum(holding.size for _, holding in replica) for replica in parts),
    )


def _sizes(place: Place, stretches: list[tuple[int, int]]) -> list[int]:
    sizes = [0] * place.folds
    for fold, size in stretches:
        sizes[fold] += size
    return sizes
