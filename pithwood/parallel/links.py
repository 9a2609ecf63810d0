"""One-way lines between neighbours of a pipeline, each in the order of its sender.

Both directions between two processes are process groups of their own: on a GPU a group's sends and receives follow each
other on one stream, and two processes that each send first would wait for each other forever. On a line the receiver
takes everything in the order in which it was sent, so the line never waits for anything but its sender.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pithwood.parallel.mesh import Group, Mesh

BLOCKS = 4
"""Blocks of threads that a line's kernel takes on a GPU, while it waits too; a few carry more than layers ask for."""


class Links:
    """The lines of one process to and from its neighbours in `mesh.pp`."""

    def __init__(self, mesh: Mesh, ring: bool) -> None:
        """ring: whether the last process and the first are neighbours. All processes of the mesh make their links
        together.
        """
        # one hardware queue would put compute behind an exchange that waits for it
        if mesh.device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            raise ValueError(
                "CUDA_DEVICE_MAX_CONNECTIONS=1 puts compute into one queue with the exchanges that wait for it, and "
                "processes would wait for each other forever; unset it, or set it to 32"
            )
        self._group = mesh.pp
        self._lines: dict[tuple[int, int], Group] = {}
        """By (sender, receiver), places in `mesh.pp`."""
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._numbers: dict[tuple[int, int], int] = {}
        for pairs in rounds(mesh.pp.size, ring):
            # all processes of the world take part in each round, alone if need be: groups are parts of the world's
            mine = [pair for pair in pairs if mesh.pp.rank in pair]
            for turn in (1, -1):
                members = [mesh.pp.ranks[place] for place in (mine[0] if mine else (mesh.pp.rank,))]
                handle = _new_line(mesh, members)
                if mine:
                    source, to = mine[0][::turn]
                    ranks = (mesh.pp.ranks[source], mesh.pp.ranks[to])
                    self._lines[source, to] = Group(ranks, int(to == mesh.pp.rank), handle)
                    mesh.further.append(self._lines[source, to])
                    self._connect(source, to, mesh.device)

    def send(self, to: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors to a neighbour; returns at once, and they are held until they are gone (gloo does not tell when
        that is: until `flush`).
        """
        line = self._group.rank, to
        for tensor in tensors:
            work = self._lines[line].send(tensor, 1, self._number(line))
            self._sent.append((work, tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()[0].wait()

    def receive(self, source: int, tensors: Sequence[Tensor]) -> list[Any]:
        """Begin to fill tensors with what a neighbour sends next; the works are to be waited for."""
        line = source, self._group.rank
        return [self._lines[line].receive(tensor, 0, self._number(line)) for tensor in tensors]

    def flush(self) -> None:
        """Wait until all that was sent is gone: on a GPU the stream waits, on a CPU the process."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _connect(self, source: int, to: int, device: torch.device) -> None:
        """Send a first number over a line: NCCL connects the ends then, and the host waits for the other end."""
        number = [torch.zeros(1, device=device)]
        if source == self._group.rank:
            self.send(to, number)
            self.flush()
        else:
            for work in self.receive(source, number):
                work.wait()

    def _number(self, line: tuple[int, int]) -> int:
        """The next message's number on a line, the same at both of its ends."""
        number = self._numbers.get(line, 0)
        self._numbers[line] = (number + 1) % (1 << 30)
        return number


def rounds(size: int, ring: bool) -> list[list[tuple[int, int]]]:
    """All pairs of neighbours among so many processes, in rounds in which no process has more than one."""
    pairs = [(place, place + 1) for place in range(size - 1)]
    found = [pairs[::2], pairs[1::2]]
    if ring and size > 2 and size % 2 == 0:
        found[1].append((0, size - 1))
    elif ring and size > 2:
        # of an odd ring neither round has room for the pair that closes it
        found.append([(0, size - 1)])
    return [pairs for pairs in found if pairs]


def _new_line(mesh: Mesh, ranks: list[int]) -> Any:
    if mesh.device.type != "cuda":
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = BLOCKS
    return dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
