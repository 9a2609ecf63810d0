"""Full and sliding-window attention in chunks of queries over the keys they can see, with log-sum and its gradient.

For each document and chunk of queries the visible keys are one contiguous range, so a chunk is two matrix products per
KV head; the chunk's probabilities are recomputed in backward. Chunk sizes depend on the document alone.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, n queries of a chunk,
m keys that some query of the chunk sees, r = H / G heads per KV head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import compute_dtype, work_budget
from pithwood.ops.packing import Packing
from pithwood.ops.softmax import LN_2, LOG2_E, weights_

LIVE_SCORES = 1 << 20
"""Scores of one chunk that the chunk size aims at (4 MiB in fp32)."""
LEAST_ROWS, MOST_ROWS = 32, 256


@dataclass(frozen=True)
class Chunk:
    """Packed ranges of one chunk: its queries and every key that one of them sees."""

    q0: int
    q1: int
    k0: int
    k1: int
    shift: int
    """Key index (packed) of query q0's own position, relative to k0."""


def chunks(packing: Packing, num_heads: int, window: int | None, docs: Sequence[int] | None = None) -> Iterator[Chunk]:
    """The chunks of these documents (default: all), in order."""
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    for doc in range(packing.num_docs) if docs is None else docs:
        q_begin, k_begin = cu_q[doc], cu_k[doc]
        length, keys = cu_q[doc + 1] - q_begin, cu_k[doc + 1] - k_begin
        offset = keys - length
        if keys == 0:
            continue
        span = keys if window is None else min(keys, window)
        rows = min(max(work_budget(LIVE_SCORES, packing.cu_q.device) // (num_heads * span), LEAST_ROWS), MOST_ROWS)
        # Queries before the first key see nothing.
        first = max(0, -offset) if packing.causal else 0
        for begin in range(first, length, rows):
            end = min(begin + rows, length)
            last_key = end + offset if packing.causal else keys
            first_key = 0 if window is None else max(0, begin + offset - window + 1)
            yield Chunk(
                q_begin + begin, q_begin + end, k_begin + first_key, k_begin + last_key, begin + offset - first_key
            )


class BandedAttention(torch.autograd.Function):
    """(o like q, lse fp32); saves q, k, v, o and lse."""

    @staticmethod
    def forward(ctx, q, k, v, packing: Packing, scale: float, window: int | None):  # type: ignore[override]
        dtype = compute_dtype(q.dtype)
        k_GTK, v_GTV = (_by_head(x, dtype) for x in (k, v))
        o = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=dtype, device=q.device)
        for chunk in chunks(packing, q.shape[1], window):
            attend_chunk(chunk, (q, k_GTK, v_GTV), (o, lse), packing.causal, window, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.args = (packing, scale, window)
        return o, lse

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):  # type: ignore[override]
        q, k, v, o, lse = ctx.saved_tensors
        packing, scale, window = ctx.args
        return *banded_grads(grad_o, q, k, v, o, lse, packing, scale, window, grad_lse), None, None, None


def banded_grads(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k, v; o and lse may be those over more keys than k."""
    dtype = compute_dtype(q.dtype)
    k_GTK, v_GTV = (_by_head(x, dtype) for x in (k, v))
    delta = (grad_o.to(dtype) * o.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dk_GTK, dv_GTV = torch.zeros_like(k_GTK), torch.zeros_like(v_GTV)
    for chunk in chunks(packing, q.shape[1], window):
        sources, grads = (q, k_GTK, v_GTV, grad_o, lse, delta), (dq, dk_GTK, dv_GTV)
        add_chunk_grads(chunk, sources, grads, packing.causal, window, scale)
    dk, dv = dk_GTK.transpose(0, 1), dv_GTV.transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def attend_chunk(
    chunk: Chunk,
    sources: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Write one chunk's rows of (o [T, H, V], lse [T, H]) from q [T, H, K], k [G, T, K], v [G, T, V]."""
    (q, k_GTK, v_GTV), (o, lse) = sources, results
    queries, keys = slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
    q_chunk = _chunk_rows(q[queries].to(k_GTK.dtype), k_GTK.shape[0])
    s = _scores(q_chunk, k_GTK[:, keys], chunk, causal, window, scale)
    peak = s.amax(-1, keepdim=True)
    total = weights_(s, peak).sum(-1, keepdim=True)
    o_chunk = torch.bmm(s, v_GTV[:, keys]).div_(total)
    o[queries] = _unchunk_rows(o_chunk, chunk.q1 - chunk.q0).to(o.dtype)
    lse[queries] = _unchunk_rows(total.log2_().add_(peak), chunk.q1 - chunk.q0)[..., 0] * LN_2


def add_chunk_grads(
    chunk: Chunk,
    sources: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Write one chunk's rows of dq [T, H, K] and add to dk [G, T, K] and dv [G, T, V].

    sources: q, k, v as in attend_chunk, do [T, H, V], lse [T, H], delta [T, H] = rowsum(do * o) less lse's gradient.
    """
    (q, k_GTK, v_GTV, grad_o, lse, delta), (dq, dk_GTK, dv_GTV) = sources, grads
    queries, keys = slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
    groups, dtype = k_GTK.shape[0], k_GTK.dtype
    q_chunk, do = (_chunk_rows(x[queries].to(dtype), groups) for x in (q, grad_o))
    s = _scores(q_chunk, k_GTK[:, keys], chunk, causal, window, scale)
    lse_row, delta_row = (_chunk_rows(x[queries][..., None], groups) for x in (lse, delta))
    p = weights_(s, lse_row * LOG2_E)
    dv_GTV[:, keys] += torch.bmm(p.transpose(1, 2), do)
    ds = torch.bmm(do, v_GTV[:, keys].transpose(1, 2)).sub_(delta_row).mul_(p).mul_(scale)
    dq[queries] = _unchunk_rows(torch.bmm(ds, k_GTK[:, keys]), chunk.q1 - chunk.q0)
    dk_GTK[:, keys] += torch.bmm(ds.transpose(1, 2), q_chunk)


def _by_head(x_TGK: Tensor, dtype: torch.dtype) -> Tensor:
    return x_TGK.to(dtype).transpose(0, 1).contiguous()


def _chunk_rows(x_nHK: Tensor, groups: int) -> Tensor:
    """[n, H, K] -> [G, r * n, K]"""
    n, heads, dim = x_nHK.shape
    return x_nHK.view(n, groups, heads // groups, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _unchunk_rows(x_GrnK: Tensor, n: int) -> Tensor:
    """[G, r * n, K] -> [n, H, K]"""
    return x_GrnK.reshape(-1, n, x_GrnK.shape[2]).transpose(0, 1)


def _scores(q_GrnK: Tensor, k_GmK: Tensor, chunk: Chunk, causal: bool, window: int | None, scale: float) -> Tensor:
    """[G, r * n, m] scores times log2(e); keys that a query does not see are -inf."""
    s = torch.bmm(q_GrnK, k_GmK.transpose(1, 2)).mul_(scale * LOG2_E)
    if not causal:
        return s
    n, m = chunk.q1 - chunk.q0, chunk.k1 - chunk.k0
    # Query i stands at key i + shift. Without a window only keys after the first query's own are ever hidden.
    first = chunk.shift if window is None else 0
    never = torch.full((n, m - first), float("-inf"), dtype=s.dtype, device=s.device)
    bias = never.triu(chunk.shift - first + 1)
    if window is not None:
        bias += never.tril(chunk.shift - window)
    s.view(-1, n, m)[..., first:].add_(bias)
    return s
