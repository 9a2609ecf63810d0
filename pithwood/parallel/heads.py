"""The exchange of heads: from this process's tokens and all heads to all tokens and this process's heads, and back.

Heads can travel in groups (chunks). Each exchange is two autograd functions, one that starts it and one that waits for
it, so that a chunk is on its way while another is worked on; in the backward pass the same two change roles. What lies
between the two has not arrived and must not be read: `_Depart` gives it only to `_Arrive`, `_SendBack` to `_Collect`.
Heads are divided in order, first over processes, then over chunks, so that query heads keep their KV head.

Legend: T tokens of this process, P processes, H query heads, G KV heads, h heads of a chunk (its process's H or G over
the chunks), K query/key head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pithwood.parallel.mesh import Group


class Travel:
    """What is under way in one exchange: for each chunk the works, and what is sent, which must stay until then."""

    def __init__(self, group: Group, chunks: int) -> None:
        self.group, self.chunks = group, chunks
        self._there: list[list[tuple[Any, Tensor]]] = [[] for _ in range(chunks)]
        self._back: list[list[tuple[Any, Tensor]]] = [[] for _ in range(chunks)]

    def start(self, chunk: int, sent: Tensor, *, back: bool = False) -> Tensor:
        """[P * T, ...] to come: the i-th of P equal parts of sent [P * T, ...] goes to the i-th process."""
        got = torch.empty_like(sent)
        work = self.group.all_to_all(got, sent, None, None, wait=False)
        (self._back if back else self._there)[chunk].append((work, sent))
        return got

    def wait(self, chunk: int, count: int | None = None, *, back: bool = False) -> None:
        """Until the chunk, or the first `count` tensors of it, have arrived; a GPU's stream waits, not the host."""
        under_way = (self._back if back else self._there)[chunk]
        for work, _ in under_way[:count]:
            if work is not None:
                work.wait()
        del under_way[:count]


class HeadExchange:
    """Queries, keys and values on their way to all tokens of this process's heads, in groups of whole KV heads."""

    def __init__(
        self, group: Group, chunks: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, chooses: bool = False
    ) -> None:
        """chunks: groups, which divide each process's KV heads. chooses: values travel after all queries and keys."""
        self.chunks = chunks
        self._there, self._back = Travel(group, chunks), Travel(group, chunks)
        turns = [(chunk, which) for chunk in range(chunks) for which in range(3)]
        if chooses:
            turns.sort(key=lambda turn: turn[1] == 2)
        self._parts = _Depart.apply(self._there, turns, q_THK, k_TGK, v_TGV)

    def queries_and_keys(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each group, as they arrive: q [P * T, h, K] and k, without gradient. To be read once."""
        for chunk in range(self.chunks):
            self._there.wait(chunk, 2)
            yield self._parts[3 * chunk].detach(), self._parts[3 * chunk + 1].detach()

    def attend(self, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """[T, H, V] of this process's tokens, of what `attend` makes of one group after another: (number of the group,
        q, k, v) -> o [P * T, h, V]. To be called once.
        """
        returned = []
        for chunk in range(self.chunks):
            # called right before the group is worked on: the backward pass keeps the order
            q, k, v = _Arrive.apply(self._there, chunk, *self._parts[3 * chunk : 3 * chunk + 3])
            returned.append(_SendBack.apply(self._back, chunk, attend(chunk, q, k, v)))
        return _Collect.apply(self._back, *returned)


def heads_to_tokens(group: Group, *heads: Tensor) -> tuple[Tensor, ...]:
    """Of each [T, H, K] of this process's tokens and all heads: [P * T, H / P, K], all tokens of this process's heads;
    P divides each H, and heads are divided in order, so that query heads keep their KV head.
    """
    travel = Travel(group, 1)
    return _Arrive.apply(travel, 0, *_Depart.apply(travel, [(0, which) for which in range(len(heads))], *heads))


def tokens_to_heads(group: Group, o_THV: Tensor) -> Tensor:
    """The way back of `heads_to_tokens`: [P * T, H / P, V] to [T, H, V]."""
    travel = Travel(group, 1)
    return _Collect.apply(travel, _SendBack.apply(travel, 0, o_THV))


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, turns: list[tuple[int, int]], *heads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.travel = travel
        got = {(c, i): travel.start(c, _laid_out(travel, c, heads[i])) for c, i in turns}
        return tuple(got[turn] for turn in sorted(got))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        travel: Travel = ctx.travel
        return None, None, *_arrived(travel, grads, reversed(range(travel.chunks)), back=True)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, chunk: int, *parts: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.travel, ctx.chunk = travel, chunk
        travel.wait(chunk)
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        return None, None, *(ctx.travel.start(ctx.chunk, grad.contiguous(), back=True) for grad in grads)


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, chunk: int, o: Tensor) -> Tensor:  # type: ignore[override]
        ctx.travel, ctx.chunk = travel, chunk
        return travel.start(chunk, o.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        ctx.travel.wait(ctx.chunk, back=True)
        return None, None, grad


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.travel = travel
        return _arrived(travel, parts, range(travel.chunks), back=False)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        travel: Travel = ctx.travel
        # the last chunk's attention is the first to go back
        chunks = range(travel.chunks)
        got = {c: travel.start(c, _laid_out(travel, c, grad), back=True) for c in reversed(chunks)}
        return None, *(got[c] for c in chunks)


def _laid_out(travel: Travel, chunk: int, x_THK: Tensor) -> Tensor:
    """[P * T, h, K]: a chunk's heads of [T, H, K] by the process that they go to. Tokens arrive in their order, so
    nothing is copied where they arrive.
    """
    return x_THK.unflatten(1, (travel.group.size, travel.chunks, -1))[:, :, chunk].transpose(0, 1).flatten(0, 1)


def _arrived(travel: Travel, parts: Sequence[Tensor], chunks: Iterable[int], *, back: bool) -> list[Tensor]:
    """[T, H, K] of every tensor of which all chunks' [P * T, h, K] are given, chunk by chunk as they arrive."""
    count, size = len(parts) // travel.chunks, travel.group.size
    made = [part.new_empty(part.shape[0] // size, size, travel.chunks, *part.shape[1:]) for part in parts[:count]]
    for chunk in chunks:
        travel.wait(chunk, back=back)
        for whole, part in zip(made, parts[chunk * count : (chunk + 1) * count], strict=True):
            whole[:, :, chunk].copy_(part.unflatten(0, (size, -1)).transpose(0, 1))
    return [whole.flatten(1, 3) for whole in made]
