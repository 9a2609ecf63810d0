"""Full and sliding-window attention in chunks of queries over the keys they can see, with log-sum and its gradient.

For each document and chunk of queries the visible keys are one contiguous range, so a chunk is two matrix products per
KV head; the chunk's probabilities are recomputed in backward. Chunk sizes depend on the document alone.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, n queries of a chunk,
m keys that some query of the chunk sees, r = H / G heads per KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.checks import compute_dtype, work_budget
from pithwood.ops.packing import Packing

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


def chunks(packing: Packing, num_heads: int, window: int | None) -> Iterator[Chunk]:
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    for q_begin, q_end, k_begin, k_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        length, keys = q_end - q_begin, k_end - k_begin
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
            n = chunk.q1 - chunk.q0
            q_chunk = _chunk_rows(q[chunk.q0 : chunk.q1].to(dtype), k.shape[1])
            s = _scores(q_chunk, k_GTK[:, chunk.k0 : chunk.k1], chunk, packing.causal, window, scale)
            peak = s.amax(-1, keepdim=True)
            total = s.sub_(peak).exp_().sum(-1, keepdim=True)
            o_chunk = torch.bmm(s, v_GTV[:, chunk.k0 : chunk.k1]).div_(total)
            o[chunk.q0 : chunk.q1] = _unchunk_rows(o_chunk, n)
            lse[chunk.q0 : chunk.q1] = _unchunk_rows(total.log_().add_(peak), n)[..., 0]
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.args = (packing, scale, window)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):  # type: ignore[override]
        q, k, v, o, lse = ctx.saved_tensors
        packing, scale, window = ctx.args
        dtype, groups = compute_dtype(q.dtype), k.shape[1]
        k_GTK, v_GTV = (_by_head(x, dtype) for x in (k, v))
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        dk_GTK, dv_GTV = torch.zeros_like(k_GTK), torch.zeros_like(v_GTV)
        for chunk in chunks(packing, q.shape[1], window):
            queries, keys = slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
            q_chunk, do = (_chunk_rows(x[queries].to(dtype), groups) for x in (q, grad_o))
            s = _scores(q_chunk, k_GTK[:, keys], chunk, packing.causal, window, scale)
            delta = (grad_o[queries].to(dtype) * o[queries].to(dtype)).sum(-1) - grad_lse[queries]
            lse_row, delta_row = (_chunk_rows(x[..., None], groups) for x in (lse[queries], delta))
            p = s.sub_(lse_row).exp_()
            dv_GTV[:, keys] += torch.bmm(p.transpose(1, 2), do)
            ds = torch.bmm(do, v_GTV[:, keys].transpose(1, 2)).sub_(delta_row).mul_(p).mul_(scale)
            dq[queries] = _unchunk_rows(torch.bmm(ds, k_GTK[:, keys]), chunk.q1 - chunk.q0)
            dk_GTK[:, keys] += torch.bmm(ds.transpose(1, 2), q_chunk)
        dk, dv = dk_GTK.transpose(0, 1), dv_GTV.transpose(0, 1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _by_head(x_TGK: Tensor, dtype: torch.dtype) -> Tensor:
    return x_TGK.to(dtype).transpose(0, 1).contiguous()


def _chunk_rows(x_nHK: Tensor, groups: int) -> Tensor:
    """[n, H, K] -> [G, n * r, K]"""
    n, heads, dim = x_nHK.shape
    return x_nHK.view(n, groups, heads // groups, dim).transpose(0, 1).reshape(groups, -1, dim)


def _unchunk_rows(x_GnrK: Tensor, n: int) -> Tensor:
    """[G, n * r, K] -> [n, H, K]"""
    groups, _, dim = x_GnrK.shape
    return x_GnrK.view(groups, n, -1, dim).transpose(0, 1).reshape(n, -1, dim)


def _scores(q_GrK: Tensor, k_GmK: Tensor, chunk: Chunk, causal: bool, window: int | None, scale: float) -> Tensor:
    """[G, n * r, m] scores; keys that a query does not see are -inf."""
    s = torch.bmm(q_GrK, k_GmK.transpose(1, 2)).mul_(scale)
    if not causal:
        return s
    n, m = chunk.q1 - chunk.q0, chunk.k1 - chunk.k0
    own_n1 = torch.arange(n, device=s.device)[:, None] + chunk.shift
    # Without a window only the last n - 1 keys are hidden from some query.
    first = chunk.shift if window is None else 0
    key_m = torch.arange(first, m, device=s.device)
    hidden = key_m > own_n1
    if window is not None:
        hidden |= key_m <= own_n1 - window
    s.view(s.shape[0], n, -1, m)[..., first:].masked_fill_(hidden[None, :, None], float("-inf"))
    return s
