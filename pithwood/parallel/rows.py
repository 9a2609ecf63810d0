"""Rows of tensors that go from process to process, and the zigzag: early and late tokens on every process.

All of it is differentiable, and all processes of a group make the same calls in the same order, forward and backward.

Legend: T tokens of this process, P processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pithwood.parallel.mesh import Group


def exchange_rows(group: Group, x: Tensor, sends: list[range], takes: list[int]) -> Tensor:
    """Rows sends[i] of x go to the i-th process; returns the takes[i] rows that come from each, in order. Gradients
    travel back and are added up.
    """
    return _ExchangeRows.apply(group, x, sends, takes)


def to_zigzag(group: Group, x: Tensor) -> Tensor:
    """Of x [T, ...] in 2 P chunks over all processes: chunks r and 2 P - 1 - r, so that early and late tokens meet."""
    mine = [_zigzag_owner(2 * group.rank + side, group.size) for side in (0, 1)]
    return exchange_rows(group, x, _chunks_for(group, mine, x.shape[0]), _sizes_from(group, _homes(group), x.shape[0]))


def from_zigzag(group: Group, x: Tensor) -> Tensor:
    """The way back of `to_zigzag`."""
    mine = [_zigzag_owner(2 * group.rank + side, group.size) for side in (0, 1)]
    x = exchange_rows(group, x, _chunks_for(group, _homes(group), x.shape[0]), _sizes_from(group, mine, x.shape[0]))
    # rows arrive in the order of the processes; late chunks lie on them in descending order
    return torch.cat(x.chunk(2)[::-1]) if mine[0] > mine[1] else x


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sends: list[range], takes: list[int]) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.sends, ctx.takes, ctx.rows = group, sends, takes, x.shape[0]
        sent = torch.cat([x[rows.start : rows.stop] for rows in sends])
        got = x.new_empty(sum(takes), *x.shape[1:])
        group.all_to_all(got, sent, takes, [len(rows) for rows in sends])
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        sizes = [len(rows) for rows in ctx.sends]
        back = grad.new_empty(sum(sizes), *grad.shape[1:])
        ctx.group.all_to_all(back, grad.contiguous(), sizes, ctx.takes)
        grad_x = grad.new_zeros(ctx.rows, *grad.shape[1:])
        for rows, part in zip(ctx.sends, back.split(sizes), strict=True):
            grad_x[rows.start : rows.stop] += part
        return None, grad_x, None, None


def zigzag(rank: int, size: int) -> tuple[int, int]:
    """The chunks of a process in the zigzag."""
    return rank, 2 * size - 1 - rank


def _zigzag_owner(chunk: int, size: int) -> int:
    return chunk if chunk < size else 2 * size - 1 - chunk


def _homes(group: Group) -> list[int]:
    """Where this process's chunks of the zigzag lie otherwise."""
    return [chunk // 2 for chunk in zigzag(group.rank, group.size)]


def _chunks_for(group: Group, takers: list[int], tokens: int) -> list[range]:
    """The rows for every process if its takers get the first and the second half of so many rows."""
    bounds = [0, tokens // 2, tokens]
    if takers[0] == takers[1]:
        halves = {takers[0]: range(tokens)}
    else:
        halves = {taker: range(*bounds[side : side + 2]) for side, taker in enumerate(takers)}
    return [halves.get(rank, range(0)) for rank in range(group.size)]


def _sizes_from(group: Group, givers: list[int], tokens: int) -> list[int]:
    """Rows that come from every process if each of two givers sends half of so many."""
    return [givers.count(rank) * (tokens // 2) for rank in range(group.size)]
