"""Attention to selected units, query-major: gather each row's keys. For units of a few keys, where lists are ragged.

Legend: T packed tokens, R selection rows, S id lists per row after expansion (G or H), k keys per list, r queries per
row times heads per list, H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import compute_dtype, work_budget
from pithwood.ops.packing import Packing, Selection, guarded
from pithwood.ops.softmax import LN_2, LOG2_E, finite_or_zero, weights_

LIVE_KEYS = 1 << 15
"""Gathered key rows held at once (8 MiB of keys at head dim 64 in fp32)."""


@dataclass
class RowBatch:
    """Some selection rows: what to gather and what is visible."""

    rows: Tensor
    """[n * S * r] flat query rows `t * H + h`; padding repeats a row's last query."""
    key_rows: Tensor
    """[n * S * k] flat key rows `t * G + g`, clamped where nothing is selected."""
    hidden: Tensor
    """[n * S, r, k] bool: keys a query does not see."""
    valid: Tensor
    """Flat indices of the r-rows that are real, in the order of the query rows they stand for."""
    target: slice
    """Those query rows: a contiguous range."""
    key_range: tuple[int, int]
    """Packed keys of the documents involved."""


def row_batches(packing: Packing, selection: Selection, num_heads: int, num_kv_heads: int) -> Iterator[RowBatch]:
    """Batches of selection rows in order; each covers a contiguous range of queries."""
    device, unit, size = selection.ids.device, selection.unit, selection.row_size
    ids = selection.ids if selection.ids.shape[1] != 1 else selection.ids.expand(-1, num_kv_heads, -1)
    sets, count = ids.shape[1], ids.shape[2] * unit
    per_set = num_heads // sets
    row_offsets, cu_q, cu_k = packing.row_offsets(size), packing.cu_q.long(), packing.cu_k.long()
    num_rows = int(row_offsets[-1])
    step = max(1, work_budget(LIVE_KEYS, device) // max(sets * count, sets * size * per_set))
    head_kv_S = torch.arange(sets, device=device) // (sets // num_kv_heads)
    head_Sh = torch.arange(num_heads, device=device).view(sets, per_set)
    for i in range(0, num_rows, step):
        row_n = torch.arange(i, min(i + step, num_rows), device=device)
        doc_n = (torch.searchsorted(row_offsets, row_n, right=True) - 1).clamp_(min=0)
        first_n = cu_q[doc_n] + (row_n - row_offsets[doc_n]) * size
        query_nr = first_n[:, None] + torch.arange(size, device=device)
        real_nr = query_nr < cu_q[doc_n + 1][:, None]
        query_nr = torch.minimum(query_nr, cu_q[doc_n + 1][:, None] - 1)
        length_n = cu_k[doc_n + 1] - cu_k[doc_n]
        position_nr = query_nr - cu_q[doc_n + 1][:, None] + length_n[:, None]
        ids_nSk = ids[row_n].long()
        key_nSk = (ids_nSk[..., None] * unit + torch.arange(unit, device=device)).flatten(2)
        chosen_nSk = (ids_nSk >= 0).repeat_interleave(unit, dim=2) & (key_nSk < length_n[:, None, None])
        visible = chosen_nSk[:, :, None].expand(-1, -1, size, -1)
        if packing.causal:
            visible = visible & (key_nSk[:, :, None] <= position_nr[:, None, :, None])
        # Unselected keys are read from the document's first key, or from any key if it has none.
        packed = torch.where(chosen_nSk, key_nSk, 0) + cu_k[doc_n][:, None, None]
        key_rows = packed.clamp_(max=max(int(cu_k[-1]) - 1, 0)) * num_kv_heads + head_kv_S[:, None]
        rows = query_nr[:, None, :, None] * num_heads + head_Sh[:, None]
        order = torch.arange(rows.numel(), device=device).view(rows.shape).permute(0, 2, 1, 3)
        valid = order.reshape(-1, num_heads)[real_nr.view(-1)].view(-1)
        q0, q1 = int(first_n[0]), int(query_nr[-1, -1]) + 1
        yield RowBatch(
            rows.reshape(-1),
            key_rows.view(-1),
            ~visible[:, :, :, None].expand(-1, -1, -1, per_set, -1).reshape(-1, size * per_set, count),
            valid,
            slice(q0 * num_heads, q1 * num_heads),
            (int(cu_k[doc_n[0]]), int(cu_k[doc_n[-1] + 1])),
        )


class QueryMajorAttention(torch.autograd.Function):
    """(o like q, lse fp32) of q, k, v under a selection; saves q, k, v, o, lse and the ids, recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, packing: Packing, selection: Selection, scale: float):  # type: ignore[override]
        q_rows, k_rows, v_rows = (_flat(x) for x in (q, k, v))
        o_rows = q_rows.new_zeros(q_rows.shape[0], v_rows.shape[1])
        lse_rows = q_rows.new_full((q_rows.shape[0],), float("-inf"))
        if k.shape[0] > 0:
            for batch in row_batches(packing, selection, q.shape[1], k.shape[1]):
                s, _, _ = row_scores(batch, q_rows, k_rows, scale)
                peak = finite_or_zero(s.amax(-1, keepdim=True))
                total = weights_(s, peak).sum(-1)
                v_batch = v_rows.index_select(0, batch.key_rows).view(s.shape[0], s.shape[2], -1)
                # A row that sees no key has the total 0: its output is 0, its log-sum -inf.
                o_batch = torch.bmm(s, v_batch).div_(total.masked_fill(total == 0, 1.0)[..., None])
                o_rows[batch.target] = o_batch.view(-1, v_rows.shape[1])[batch.valid]
                lse_rows[batch.target] = total.log2_().add_(peak[..., 0]).mul_(LN_2).view(-1)[batch.valid]
        o, lse = o_rows.view(*q.shape[:2], v.shape[2]).to(q.dtype), lse_rows.view(q.shape[:2])
        ctx.save_for_backward(q, k, v, o, lse, *guarded(selection))
        ctx.args = (packing, selection, scale)
        return o, lse

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):  # type: ignore[override]
        q, k, v, o, lse, *_ = ctx.saved_tensors
        packing, selection, scale = ctx.args
        groups = k.shape[1]
        q_rows, k_rows, v_rows, do_rows, o_rows = (_flat(x) for x in (q, k, v, grad_o, o))
        log2_rows = finite_or_zero(lse.view(-1)) * LOG2_E
        delta_rows = (do_rows * o_rows).sum(-1) - grad_lse.reshape(-1)
        dq_rows, dk_rows, dv_rows = (torch.zeros_like(x) for x in (q_rows, k_rows, v_rows))
        if k.shape[0] > 0:
            for batch in row_batches(packing, selection, q.shape[1], groups):
                s, q_batch, k_batch = row_scores(batch, q_rows, k_rows, scale)
                n, r, c = s.shape
                p = weights_(s, log2_rows.index_select(0, batch.rows).view(n, r, 1))
                real = torch.zeros(n * r, dtype=p.dtype, device=p.device).index_fill_(0, batch.valid, 1.0)
                p.mul_(real.view(n, r, 1))
                do = do_rows.index_select(0, batch.rows).view(n, r, -1)
                v_batch = v_rows.index_select(0, batch.key_rows).view(n, c, -1)
                dp = torch.bmm(do, v_batch.transpose(1, 2))
                ds = dp.sub_(delta_rows.index_select(0, batch.rows).view(n, r, 1)).mul_(p).mul_(scale)
                dq_rows[batch.target] = torch.bmm(ds, k_batch).view(n * r, -1)[batch.valid]
                k0, k1 = batch.key_range
                order, begin = _keys_in_order(batch.key_rows, k0 * groups, k1 * groups)
                for rows, grad in (
                    (dk_rows, torch.bmm(ds.transpose(1, 2), q_batch)),
                    (dv_rows, torch.bmm(p.transpose(1, 2), do)),
                ):
                    rows[k0 * groups : k1 * groups] += F.embedding_bag(order, grad.view(n * c, -1), begin, mode="sum")
        dq, dk, dv = (d.view_as(x).to(x.dtype) for d, x in ((dq_rows, q), (dk_rows, k), (dv_rows, v)))
        return dq, dk, dv, None, None, None


def row_scores(batch: RowBatch, q_rows: Tensor, k_rows: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores [n * S, r, k] of a batch times log2(e), with the queries and keys it gathered."""
    n, r, c = batch.hidden.shape
    q = q_rows.index_select(0, batch.rows).view(n, r, -1)
    k = k_rows.index_select(0, batch.key_rows).view(n, c, -1)
    s = torch.bmm(q, k.transpose(1, 2)).mul_(scale * LOG2_E)
    return s.masked_fill_(batch.hidden, float("-inf")), q, k


def _flat(x_THK: Tensor) -> Tensor:
    return x_THK.to(compute_dtype(x_THK.dtype)).reshape(-1, x_THK.shape[2])


def _keys_in_order(key_rows: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Gathered rows sorted by key (stable, so sums have one order), and where each key of first..last begins."""
    sorted_rows, order = key_rows.sort(stable=True)
    every_key = torch.arange(first, last, device=key_rows.device)
    return order, torch.searchsorted(sorted_rows, every_key)
