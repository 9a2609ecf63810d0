"""What attention and recurrences need of other processes when the tokens of each sample are divided between them.

Process r of P holds tokens r * T to (r + 1) * T of all P * T, so documents may begin on one process and end on another.
What is done per token (projections, norms, RoPE by true positions, experts) happens where the token lies. For attention
the tokens meet in one of three ways:

  heads    every process receives all tokens of 1/P of the heads, attends as one process would, and sends the result
           back. Packings stay those of self-attention, so all kernels serve; work is divided evenly.
  gather   every process receives the keys and values of all processes and attends with its own queries. Causal
           attention to a prefix costs more the later the queries are: full attention takes queries from both ends (a
           zigzag), so that all processes have the same.
  ring     full attention alone: as gather, but the keys and values of one process are here at a time, and the next
           ones are on their way meanwhile (`pithwood/parallel/ring.py`).

Where no document lies on two processes nothing is exchanged. All of it is differentiable, and all processes make the
same calls in the same order, forward and backward.

Legend: T tokens of this process, P processes, H query heads, G KV heads, K query/key head dim, V value head dim,
N documents, U units (key blocks) of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pithwood.ops.packing import Packing, Selection
from pithwood.ops.summarise import summarise
from pithwood.ops.units import unit_table
from pithwood.parallel.config import ContextExchange
from pithwood.parallel.heads import HeadExchange
from pithwood.parallel.mesh import Group
from pithwood.parallel.ring import Spans, document_spans, ring_attention
from pithwood.parallel.rows import exchange_rows, from_zigzag, to_zigzag, zigzag

Attend = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""(q [T_q, H, K], k [T_k, G, K], v [T_k, G, V], packing) -> o [T_q, H, V]"""
State = tuple[Tensor, ...]
"""What a recurrence hands on from one run of tokens to the next."""
CHUNKS = 2
"""Groups of heads that a large exchange is cut into."""
CHUNK_BYTES = 2**26
"""Least bytes of a group's queries: below, an exchange takes no longer than the launches of another group's kernels."""


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share the tokens of a batch, and how the batch lies on them."""

    group: Group
    """In the order of the tokens."""
    whole: Packing
    """Of all P * T tokens."""
    how: ContextExchange
    """How attention sees other processes' tokens; auto: heads where the KV heads can be divided, else full attention
    by ring and any other by gather."""
    crosses: bool
    """Whether some document lies on more than one process; the same on all of them."""
    local: Packing
    """Of this process's tokens, as `local_packing` cuts it; without documents that have none where all are alike."""
    spans: Spans = ()
    """The documents at the ends of a ring's chunks; () where attention cannot go by ring."""
    chunks: int | None = None
    """Into how many groups an exchange of heads is cut, if KV heads allow it: one travels while another is worked on.
    None: by the size of what travels."""

    @staticmethod
    def of(group: Group, whole: Packing, how: ContextExchange = "auto") -> ContextGroup | None:
        """The context of a batch whose packing is `whole`, or None where one process has all tokens.

        Offsets on the CPU are read to see whether documents cross processes, and where; on a device they are taken to
        cross, and read only if a ring is asked for.
        raises  ValueError if the tokens cannot be divided evenly, or not into the halves that a ring needs
        """
        if group.size == 1:
            return None
        tokens = tokens_per_process(whole, group.size)
        if how == "ring" and tokens % 2:
            raise ValueError(
                f"mesh.context=ring needs an even number of tokens on each process, not {whole.num_queries} / mesh.cp="
                f"{group.size} = {tokens}: each takes one half early and one late; set mesh.context=gather"
            )
        crosses, on_host = True, whole.cu_q.device.type == "cpu"
        if on_host:
            cu = whole.cu_q.long()
            inner = torch.arange(1, group.size) * tokens
            crosses = not bool(torch.isin(inner, cu).all())
        rings = crosses and whole.causal and (how == "ring" or (how == "auto" and on_host))
        spans = document_spans(whole, group.size) if rings else ()
        return ContextGroup(group, whole, how, crosses, _without_absent(whole, group, crosses), spans)

    def to(self, device: torch.device | str) -> ContextGroup:
        return replace(self, whole=self.whole.to(device), local=self.local.to(device))

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.whole.num_queries // self.group.size

    @property
    def first(self) -> int:
        """Number of this process's first token among all."""
        return self.group.rank * self.num_tokens

    def exchange(self, num_kv_heads: int) -> Literal["none", "heads", "gather"]:
        """How attention with so many KV heads meets the tokens of others; ValueError if `how` cannot be. What full
        attention gets by ring is gathered for any other.
        """
        if not self.crosses:
            return "none"
        divides = num_kv_heads % self.group.size == 0
        if self.how == "heads" and not divides:
            raise ValueError(
                f"mesh.context=heads needs mesh.cp={self.group.size} to divide num_kv_heads={num_kv_heads}; "
                "set mesh.context=auto"
            )
        return "heads" if divides and self.how in ("auto", "heads") else "gather"

    def selections(self, num_kv_heads: int) -> Packing:
        """The packing that block selections refer to in attention with so many KV heads: of all tokens (and this
        process's heads), or of this process's tokens as queries.
        """
        exchange = self.exchange(num_kv_heads)
        if exchange == "gather":
            return self.part(self.first, self.first + self.num_tokens)
        return self.whole if exchange == "heads" else self.local

    def exchange_heads(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, *, chooses: bool = False) -> HeadExchange:
        """All tokens of this process's heads, in `chunks` groups if KV heads allow it; `chooses`: queries and keys are
        needed before values.
        """
        chunks = self.groups_of_heads(k_TGK.shape[1], q_THK.numel() * q_THK.element_size())
        return HeadExchange(self.group, chunks, q_THK, k_TGK, v_TGV, chooses)

    def groups_of_heads(self, num_kv_heads: int, query_bytes: int) -> int:
        """Groups that an exchange of all KV heads, with so many bytes of queries on each process, is cut into."""
        wanted = min(CHUNKS, query_bytes // CHUNK_BYTES) if self.chunks is None else self.chunks
        heads = num_kv_heads // self.group.size
        return next(count for count in range(max(min(wanted, heads), 1), 0, -1) if heads % count == 0)

    def part(self, start: int, stop: int, low: int = 0) -> Packing:
        """The packing of queries start:stop of all tokens against keys low:stop: bottom-right aligned, as the last
        queries of each document stand at its last keys.
        """

        def make() -> Packing:
            cu = self.whole.cu_q
            return Packing(
                cu.clamp(start, stop) - start,
                cu.clamp(low, stop) - low,
                min(self.whole.max_q, stop - start),
                min(self.whole.max_k, stop - low),
                self.whole.position_T[start:stop],
                self.whole.causal,
            )

        return self.whole.remember(("part", start, stop, low), make)


def tokens_per_process(whole: Packing, size: int) -> int:
    """T of a packing divided over so many processes; ValueError if they do not divide it."""
    if not whole.self_attention:
        raise ValueError("only packings whose queries are their keys can be divided over context ranks")
    if whole.num_queries % size:
        raise ValueError(
            f"{whole.num_queries} tokens cannot be divided evenly over mesh.cp={size}; choose a mesh.cp that divides "
            "seq_len x the samples of a micro-batch on each process"
        )
    return whole.num_queries // size


def local_packing(whole: Packing, rank: int, size: int) -> Packing:
    """The rank-th of `size` equal runs of tokens: the same N documents, empty where they lie elsewhere, and the true
    positions.
    """
    tokens = tokens_per_process(whole, size)
    start = rank * tokens
    cu = whole.cu_q.clamp(start, start + tokens) - start
    return Packing(
        cu,
        cu,
        min(whole.max_q, tokens),
        min(whole.max_k, tokens),
        whole.position_T[start : start + tokens],
        whole.causal,
    )


def attend_in_context(
    cp: ContextGroup,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    attend: Attend,
    window: int | None = None,
    plain_scale: float | None = None,
) -> Tensor:
    """o [T, H, V] of this process's queries over the keys of all, each document by itself.

    attend   attention of one process; it is given all tokens of some heads, or some queries and all keys before them,
             with the packing of that; called for each group of heads, and twice where queries are balanced
    window   keys that a query sees, its own included, if there is a bound: where it is within T, only the keys that
             stand so near are fetched, unless heads are asked for
    plain_scale  factor of the scores if `attend` is nothing but a softmax over all keys: it can go by ring, where
             `attend` is not called; None: it cannot
    """
    exchange = cp.exchange(k_TGK.shape[1])
    if exchange == "none":
        return attend(q_THK, k_TGK, v_TGV, cp.local)
    start, stop = cp.first, cp.first + cp.num_tokens
    if window is not None and window <= cp.num_tokens and cp.how != "heads":
        low = max(start - window + 1, 0)
        if window > 1:
            unused = window - 1 - (start - low)
            k_TGK, v_TGV = (torch.cat([halo(cp, x, window - 1)[unused:], x]) for x in (k_TGK, v_TGV))
        return attend(q_THK, k_TGK, v_TGV, cp.part(start, stop, low))
    if exchange == "heads":
        return cp.exchange_heads(q_THK, k_TGK, v_TGV).attend(lambda _, q, k, v: attend(q, k, v, cp.whole))
    if not cp.whole.causal:
        raise ValueError(
            "keys after the queries are not fetched: attention in both directions needs mesh.context=heads"
        )
    if plain_scale is not None and window is None and cp.spans:
        return ring_attention(cp.group, cp.whole, cp.spans, q_THK, k_TGK, v_TGV, plain_scale)
    k_TGK, v_TGV = gather_tokens(cp.group, k_TGK, v_TGV)
    if window is not None or cp.num_tokens % 2:
        return attend(q_THK, k_TGK[:stop], v_TGV[:stop], cp.part(start, stop))
    half, parts = cp.num_tokens // 2, []
    for chunk, q in zip(zigzag(cp.group.rank, cp.group.size), to_zigzag(cp.group, q_THK).split(half), strict=True):
        stop = (chunk + 1) * half
        parts.append(attend(q, k_TGK[:stop], v_TGV[:stop], cp.part(stop - half, stop)))
    return from_zigzag(cp.group, torch.cat(parts))


def gather_tokens(group: Group, *rows: Tensor) -> tuple[Tensor, ...]:
    """Of each [T, ...]: [P * T, ...] with the rows of all processes; gradients are added up and sent home."""
    return tuple(_GatherTokens.apply(group, *rows))


def halo(cp: ContextGroup, x: Tensor, rows: int) -> Tensor:
    """[rows, ...]: the rows of x [T, ...] that stand before this process's on the processes before it, the nearest
    last; zeros where there are none. Rows of other documents are among them: the caller leaves them out.
    """
    tokens, me = cp.num_tokens, cp.group.rank

    def given(giver: int, taker: int) -> range:
        """The giver's rows, by its own numbers, of those that stand before the taker's."""
        start = max(taker * tokens - rows, giver * tokens)
        stop = min(taker, giver + 1) * tokens
        return range(start - giver * tokens, max(start, stop) - giver * tokens)

    ranks = range(cp.group.size)
    got = exchange_rows(cp.group, x, [given(me, taker) for taker in ranks], [len(given(rank, me)) for rank in ranks])
    return torch.cat([x.new_zeros(rows - len(got), *x.shape[1:]), got])


def prefix_scan(cp: ContextGroup, state: State, combine: Callable[[State, State], State], start: State) -> State:
    """What the processes before this one hand on: their states combined in order, `start` on the first.

    state    of this process's tokens, tensors of equal shapes on all; a document that begins among them must make it
             independent of what comes before
    combine  (earlier, later) -> both in a row; associative

    Each process receives all P states and combines those before it: for states far smaller than T tokens.
    """
    gathered = gather_tokens(cp.group, *(part[None] for part in state))
    result = start
    for rank in range(cp.group.rank):
        before = tuple(part[rank] for part in gathered)
        result = before if rank == 0 else combine(result, before)
    # on the first process nothing depends on what was gathered, but all must take part in its backward pass
    return tuple(_Join.apply(value, whole) for value, whole in zip(result, gathered, strict=True))


@torch.no_grad()
def gather_block_means(cp: ContextGroup, k_TGK: Tensor, block_size: int) -> Tensor:
    """[U, G, K] fp32: what `summarise` makes of all processes' keys. A block's mean is taken where the block lies; of
    one that lies on several processes each takes the mean of its keys, and they are added up by their shares.
    """
    table = cp.whole.remember(("shares", cp.first, block_size), lambda: _shares(cp, block_size))
    pieces, unit, share = table
    mean_UGK = summarise(k_TGK, pieces, block_size)
    units = cp.whole.num_units_bound(cp.whole.num_queries, block_size)
    total_UGK = mean_UGK.new_zeros(units, *mean_UGK.shape[1:])
    # a share of exactly 1, and zeros from all others: means of blocks that do not straddle keep every bit
    total_UGK.index_add_(0, unit, mean_UGK * share[:, None, None])
    cp.group.all_reduce(total_UGK)
    return total_UGK


def decisions_of_rows(decisions: Mapping[str, Any], first: int, count: int, total: int) -> dict[str, Any]:
    """Recorded decisions about `total` tokens, cut to `count` of them from `first`; documents must not be cut.

    Selections and tensors of one row per token are cut; anything else is kept.
    """
    rows = slice(first, first + count)

    def cut(value: Any) -> Any:
        if isinstance(value, Selection):
            if value.row_size != 1:
                raise ValueError(f"a selection per {value.row_size} queries cannot be cut between them")
            return replace(value, ids=value.ids[rows], count=value.count[rows])
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == total else value

    return {name: cut(value) for name, value in decisions.items()}


def decisions_in_context(decisions: Mapping[str, Any], cp: ContextGroup, num_kv_heads: int) -> dict[str, Any]:
    """Decisions that one process recorded of all P * T tokens, as this process of the group replays them: selections of
    all tokens and its own heads where attention exchanges heads, and this process's rows of everything else.
    """
    mine = decisions_of_rows(decisions, cp.first, cp.num_tokens, cp.whole.num_queries)
    if cp.exchange(num_kv_heads) != "heads":
        return mine
    own = {
        name: sets_of(value, cp.group.rank, cp.group.size)
        for name, value in decisions.items()
        if isinstance(value, Selection)
    }
    return mine | own


def all_sets(parts: Sequence[Selection]) -> Selection:
    """The selection of all heads, from those of equal parts of them in order."""
    if len(parts) == 1:
        return parts[0]
    ids, count = torch.cat([part.ids for part in parts], 1), torch.cat([part.count for part in parts], 1)
    return replace(parts[0], ids=ids, count=count)


def sets_of(selection: Selection, index: int, parts: int) -> Selection:
    """The selection of the index-th of equal parts of the heads; one set of ids serves all heads."""
    sets = selection.ids.shape[1]
    if sets == 1 or parts == 1:
        return selection
    own = slice(index * sets // parts, (index + 1) * sets // parts)
    return replace(selection, ids=selection.ids[:, own], count=selection.count[:, own])


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *rows: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.group = group
        # what is sent must stay until it has arrived
        sent = [x.contiguous() for x in rows]
        wholes = [x.new_empty(group.size * x.shape[0], *x.shape[1:]) for x in rows]
        _wait([group.all_gather(whole.view(-1), x.view(-1), wait=False) for whole, x in zip(wholes, sent, strict=True)])
        return tuple(wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        group: Group = ctx.group
        sent = [grad.contiguous() for grad in grads]
        parts = [grad.new_empty(grad.shape[0] // group.size, *grad.shape[1:]) for grad in grads]
        _wait(
            [
                group.reduce_scatter(part.view(-1), grad.view(-1), wait=False)
                for part, grad in zip(parts, sent, strict=True)
            ]
        )
        return None, *parts


class _Join(torch.autograd.Function):
    """`value`, in whose graph `other` stands too, without a part in it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        ctx.like = other.shape, other.dtype, other.device
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _without_absent(whole: Packing, group: Group, crosses: bool) -> Packing:
    """The local packing; where documents of one length fill the whole one, this process's share of them only, as some
    kernels know equal lengths by the number of documents.
    """
    local = local_packing(whole, group.rank, group.size)
    docs = whole.num_docs // group.size
    if crosses or whole.num_docs * whole.max_q != whole.num_queries or whole.num_docs % group.size:
        return local
    cu = whole.cu_q[: docs + 1]
    return replace(local, cu_q=cu, cu_k=cu)


def _shares(cp: ContextGroup, block_size: int) -> tuple[Packing, Tensor, Tensor]:
    """How this process's keys make up block means: (packing whose units are its parts of blocks; the block of each
    unit among those of all documents; the unit's share of the block's keys, 0 for units past the last).
    """
    whole, tokens, first = cp.whole, cp.num_tokens, cp.first
    local = local_packing(whole, cp.group.rank, cp.group.size)
    # blocks count from their document's start: what is left of a block begun elsewhere becomes a document of its own
    rest = (-whole.position_T[first : first + 1]) % block_size
    ends = local.cu_q.long()
    after = ends[torch.searchsorted(ends, torch.zeros_like(rest), right=True)]
    cu = torch.cat([ends, torch.minimum(rest, after)]).sort().values.to(torch.int32)
    pieces = Packing(cu, cu, tokens, tokens, local.position_T)
    table = unit_table(pieces, block_size, tokens)
    key_U = first + table.start_U.clamp(max=tokens - 1)
    doc_U = whole.query_doc()[key_U]
    block_U = whole.position_T[key_U] // block_size
    lengths_N = whole.cu_q.diff().long()
    size_U = (lengths_N[doc_U] - block_U * block_size).clamp(max=block_size)
    return pieces, whole.unit_offsets(block_size)[doc_U] + block_U, table.length_U / size_U
