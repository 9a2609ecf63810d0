"""Full causal attention over the tokens of several processes, with the keys and values of one process here at a time.

Queries, keys and values lie in the zigzag: process r has the chunks r and 2 P - 1 - r of 2 P. It begins with its own
keys; in turn s the keys and values of the process s places before it are here. It sees the early chunk of a process
before it with both of its chunks, and both chunks of a process after it with its late chunk: two pairs of chunks in
every turn, on every process. What two chunks have in common is at most one document, which lies at the end of the one
and at the beginning of the other, so that every turn is one rectangle without a mask, whose sides are known on the
host. Only the keys of that document travel, and turns in which nobody sees anything are left out.

What arrives next is on its way while attention runs with what is here. Outputs of the turns are joined by their
log-sums in fp32 and rounded once. In the backward pass keys and values travel once more; the gradients of those that
visit go straight home, in the keys' dtype as kernels make them, under the next turn, and are added up there in fp32.

Keys come from where they lie and are not passed on from neighbour to neighbour: a process sends as many rows, but only
those that are seen, and waits for nobody else's turn.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889; the chunks:
Llama team 2024, "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2.

Legend: T tokens of this process, P processes, H query heads, G KV heads, K query/key head dim, V value head dim,
W = H * K + G * (K + V).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.checks import compute_dtype
from pithwood.ops.dense_attention import dense_attention, dense_attention_backward
from pithwood.ops.packing import Packing
from pithwood.parallel.mesh import Group
from pithwood.parallel.rows import from_zigzag, to_zigzag, zigzag

Spans = tuple[tuple[int, int], ...]
"""For each of 2 P chunks, the first token of the document at its end and the first token after that document."""


@dataclass(frozen=True)
class Turn:
    """What one process does while the keys of another are here; rows count in its own zigzag order."""

    source: int
    """Whose keys arrive."""
    taker: int
    """Who gets this process's keys."""
    queries: slice
    """The rows that see the keys that arrive: none of other documents."""
    keys: int
    """Rows that arrive; 0 where no query sees any."""
    given: slice
    """This process's rows that the taker sees."""
    rectangle: Packing | None
    """Of the queries and keys; None where there are none."""


@dataclass(frozen=True)
class Round:
    """A batch's way round the ring for one process."""

    own: Packing
    """Of the process's own tokens in the zigzag."""
    turns: tuple[Turn, ...]
    """Those in which some process sees something, the same ones on all."""

    @staticmethod
    def of(whole: Packing, spans: Spans, group: Group) -> Round:
        """The packings lie where `whole` lies; nothing is read there."""
        rank, size, chunk = group.rank, group.size, whole.num_queries // (2 * group.size)
        turns = []
        for shift in range(1, size):
            seen = [_seen(spans, chunk, size, (taker - shift) % size, taker) for taker in range(size)]
            if not any(keys.stop > keys.start for _, keys in seen):
                continue
            taker = (rank + shift) % size
            queries, keys = seen[rank]
            count = keys.stop - keys.start
            rectangle = _rectangle(queries.stop - queries.start, count, whole.cu_q.device) if count else None
            turns.append(Turn((rank - shift) % size, taker, queries, count, seen[taker][1], rectangle))
        return Round(_own_packing(whole, spans, chunk, rank, size), tuple(turns))


def document_spans(whole: Packing, size: int) -> Spans:
    """The documents at the ends of the chunks; reads the offsets. () if the tokens make no 2 P chunks."""
    chunk, rest = divmod(whole.num_queries, 2 * size)
    if rest or not chunk:
        return ()
    cu = whole.cu_q.long().cpu()
    doc = torch.searchsorted(cu, torch.arange(1, 2 * size + 1) * chunk - 1, right=True) - 1
    return tuple(zip(cu[doc].tolist(), cu[doc + 1].tolist(), strict=True))


def ring_attention(
    group: Group, whole: Packing, spans: Spans, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, scale: float
) -> Tensor:
    """o [T, H, V] of causal attention of this process's tokens to those of all, each document by itself.

    whole  of all P * T tokens;  spans  its `document_spans`;  scale  factor of the scores
    """
    shapes = [x.shape[1:] for x in (q_THK, k_TGK, v_TGV)]
    # one exchange takes all three to the zigzag
    rows_TW = to_zigzag(group, torch.cat([x.flatten(1) for x in (q_THK, k_TGK, v_TGV)], 1))
    way = whole.remember(("ring", group.ranks, group.rank), lambda: Round.of(whole, spans, group))
    return from_zigzag(group, _Ring.apply(group, way, shapes, scale, rows_TW))


class _Ring(torch.autograd.Function):
    """o [T, H, V] from the rows [T, W] of q, k and v beside each other; saves these, o and the log-sums."""

    @staticmethod
    def forward(ctx: Any, group: Group, way: Round, shapes: list[torch.Size], scale: float, rows_TW: Tensor) -> Tensor:  # type: ignore[override]
        q_THK, kv = _heads(rows_TW, shapes[0]), rows_TW[:, shapes[0].numel() :]
        dtype = compute_dtype(rows_TW.dtype)
        found: list[Tensor] = []

        def attend(turn: Turn | None, kv: Tensor) -> None:
            k, v = _keys_and_values(kv, shapes)
            if turn is None:
                o, lse = _attend(q_THK, k, v, way.own, scale)
                found.extend((o.to(dtype), lse.contiguous()))
            elif turn.rectangle is not None:
                o, lse = _attend(q_THK[turn.queries], k, v, turn.rectangle, scale)
                _join(found[0][turn.queries], found[1][turn.queries], o, lse)

        _go_round(group, way.turns, kv, attend)
        o_THV, lse_TH = found[0].to(rows_TW.dtype), found[1]
        ctx.save_for_backward(rows_TW, o_THV, lse_TH)
        ctx.args = group, way, shapes, scale
        return o_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor):  # type: ignore[override]
        rows_TW, o_THV, lse_TH = ctx.saved_tensors
        group, way, shapes, scale = ctx.args
        width = shapes[0].numel()
        q_THK, grad_THV = _heads(rows_TW, shapes[0]), grad_THV.contiguous()
        total_TW = torch.empty(rows_TW.shape, dtype=compute_dtype(rows_TW.dtype), device=rows_TW.device)
        on_the_way: list[_Home] = []

        def attend(turn: Turn | None, kv: Tensor) -> None:
            k, v = _keys_and_values(kv, shapes)
            if turn is None:
                grads = dense_attention_backward(grad_THV, q_THK, k, v, o_THV, lse_TH, way.own, scale)
                _put(total_TW, grads)
                return
            visiting = kv.new_empty(turn.keys, kv.shape[1])
            if turn.rectangle is not None:
                grad, q, o, lse = (x[turn.queries] for x in (grad_THV, q_THK, o_THV, lse_TH))
                dq, *dkv = dense_attention_backward(grad, q, k, v, o, lse, turn.rectangle, scale)
                total_TW[turn.queries, :width] += dq.flatten(1)
                _put(visiting, dkv)
            home = _Home(group, turn, visiting)
            while on_the_way:
                on_the_way.pop().add_to(total_TW[:, width:])
            on_the_way.append(home)

        _go_round(group, way.turns, rows_TW[:, width:], attend)
        while on_the_way:
            on_the_way.pop().add_to(total_TW[:, width:])
        return None, None, None, None, total_TW.to(rows_TW.dtype)


class _Visit:
    """The keys and values of a turn on their way here, and this process's to another."""

    def __init__(self, group: Group, turn: Turn, kv: Tensor) -> None:
        # what is sent must stay until it has arrived
        self._sent = kv[turn.given].contiguous()
        self._got = kv.new_empty(turn.keys, kv.shape[1])
        takes, gives = _sizes(group, turn.source, turn.keys), _sizes(group, turn.taker, len(self._sent))
        self._work = group.all_to_all(self._got, self._sent, takes, gives, wait=False)

    def arrived(self) -> Tensor:
        self._work.wait()
        return self._got


class _Home:
    """The gradients of a turn's keys and values on their way home, and those of this process's from another."""

    def __init__(self, group: Group, turn: Turn, visiting: Tensor) -> None:
        self._sent, self._rows = visiting, turn.given
        self._got = visiting.new_empty(turn.given.stop - turn.given.start, visiting.shape[1])
        takes, gives = _sizes(group, turn.taker, len(self._got)), _sizes(group, turn.source, turn.keys)
        self._work = group.all_to_all(self._got, self._sent, takes, gives, wait=False)

    def add_to(self, total: Tensor) -> None:
        self._work.wait()
        total[self._rows] += self._got


def _go_round(group: Group, turns: tuple[Turn, ...], kv: Tensor, attend: Callable[[Turn | None, Tensor], None]) -> None:
    """Call attend(turn, keys and values that are here) for None, the process's own, and each turn; what comes next is
    on its way meanwhile, and nothing else is held.
    """
    here, turn = kv, None
    for following in turns:
        visit = _Visit(group, following, kv)
        attend(turn, here)
        here, turn = visit.arrived(), following
    attend(turn, here)


def _attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = dense_attention(q, k, v, packing, scale, need_lse=True)
    assert lse is not None
    return o, lse


def _join(o: Tensor, lse: Tensor, o_more: Tensor, lse_more: Tensor) -> None:
    """Change (o, lse) in place to those over the keys of both; every row sees keys in both."""
    o.lerp_(o_more.to(o.dtype), torch.sigmoid(lse_more - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, lse_more))


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """[T, H, K] of the first columns."""
    return rows[:, : shape.numel()].unflatten(1, shape)


def _keys_and_values(kv: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, Tensor]:
    return _heads(kv, shapes[1]), _heads(kv[:, shapes[1].numel() :], shapes[2])


def _put(rows: Tensor, parts: list[Tensor] | tuple[Tensor, ...]) -> None:
    """Write [T, H, K] of several beside each other."""
    for place, part in zip(rows.split([part[0].numel() for part in parts], 1), parts, strict=True):
        place.copy_(part.flatten(1))


def _sizes(group: Group, other: int, rows: int) -> list[int]:
    return [rows if place == other else 0 for place in range(group.size)]


def _seen(spans: Spans, chunk: int, size: int, holder: int, taker: int) -> tuple[slice, slice]:
    """(rows of the taker's queries, rows of the holder's keys that they see), both in zigzag order; empty if none."""
    early, late = zigzag(taker, size)
    if holder < taker:
        # the document at the end of the holder's early chunk, if it goes on into the taker's: into both, or the first
        first, end = spans[holder]
        queries = slice(0, _within(end, early, chunk) + _within(end, late, chunk))
        keys = slice(_within(first, holder, chunk), chunk)
    else:
        # the one at the end of the holder's late chunk, from where it begins there or in the early one
        before = zigzag(holder, size)
        first, end = spans[before[1]]
        queries = slice(chunk, chunk + _within(end, late, chunk))
        keys = slice(sum(_within(first, each, chunk) for each in before), 2 * chunk)
    return (queries, keys) if queries.stop > queries.start else (slice(0, 0), slice(0, 0))


def _within(token: int, number: int, chunk: int) -> int:
    """Rows of the chunk of this number that stand before a token."""
    return min(max(token - number * chunk, 0), chunk)


def _rectangle(queries: int, keys: int, device: torch.device) -> Packing:
    """Of one document all of whose keys are seen; made on the device."""
    cu_q, cu_k = (torch.arange(0, rows + 1, rows, dtype=torch.int32, device=device) for rows in (queries, keys))
    return Packing(cu_q, cu_k, queries, keys, torch.arange(keys - queries, keys, device=device), causal=False)


def _own_packing(whole: Packing, spans: Spans, chunk: int, rank: int, size: int) -> Packing:
    """Of a process's two chunks beside each other: the documents of both, each of which sees itself causally."""
    starts = [number * chunk for number in zigzag(rank, size)]
    position_T = torch.cat([whole.position_T[start : start + chunk] for start in starts])
    first, end = spans[rank]
    if first <= starts[0] and end >= starts[1] + chunk:
        # one document, which some kernels know by the number of documents
        cu = torch.arange(0, 2 * chunk + 1, 2 * chunk, dtype=torch.int32, device=whole.cu_q.device)
    else:
        cu = torch.stack([whole.cu_q.clamp(start, start + chunk) - start for start in starts]).sum(0, dtype=torch.int32)
    longest = min(whole.max_q, 2 * chunk)
    return Packing(cu, cu, longest, longest, position_T)
