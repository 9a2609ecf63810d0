"""A second opinion on the attention ops: fp64, written for clarity, nothing shared with the package.

Legend: T packed tokens, L queries and M keys of one document, H query heads, G KV heads, K head dim, V value head dim,
k selected per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pithwood.ops.packing import Packing, Selection
from tests.numerics import assert_close


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    packing: Packing


def make_inputs(
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
) -> Inputs:
    """Random leaf tensors that want gradients, and their packing."""
    queries, keys = sum(lengths), sum(lengths if key_lengths is None else key_lengths)
    shapes = (queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim or dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return Inputs(q, k, v, Packing.from_lengths(lengths, key_lengths, causal=causal))


def spans(packing: Packing) -> list[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1) of every document."""
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    return [(cu_q[n], cu_q[n + 1], cu_k[n], cu_k[n + 1]) for n in range(len(cu_q) - 1)]


def masks_of_ids(ids_THk: Tensor, unit: int, packing: Packing) -> list[Tensor]:
    """Per document the [H, L, M] bool mask that unit ids per query and head mean."""
    masks = []
    for q0, q1, k0, k1 in spans(packing):
        unit_of_key = torch.arange(k1 - k0) // unit
        mask = (ids_THk[q0:q1].permute(1, 0, 2)[..., None] == unit_of_key).any(2)
        if packing.causal:
            mask &= torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
        masks.append(mask)
    return masks


def dense_masks(packing: Packing, heads: int, window: int | None = None) -> list[Tensor]:
    """Per document the [H, L, M] mask of full or sliding-window attention."""
    masks = []
    for q0, q1, k0, k1 in spans(packing):
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        shift = (k1 - k0) - (q1 - q0)
        if packing.causal:
            mask = mask.tril(shift)
        if window is not None:
            mask = mask.triu(shift - window + 1)
        masks.append(mask.expand(heads, -1, -1))
    return masks


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, masks: list[Tensor], scale=None, sink_H=None):
    """(o [T, H, V], lse [T, H]) in fp64, from masks; rows that see nothing give zero and -inf. Differentiable."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    ratio = q.shape[1] // k.shape[1]
    # Tied to the inputs, so that gradients exist (and are zero) even if no query sees any key.
    o = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64) + 0.0 * (q.sum() + k.sum() + v.sum())
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    rows = []
    for (q0, q1, k0, k1), mask in zip(spans(packing), masks, strict=True):
        for h in range(q.shape[1]):
            seen = mask[h].any(-1)
            if not seen.any():
                continue
            score = q[q0:q1, h][seen] @ k[k0:k1, h // ratio].T * scale
            score = score.masked_fill(~mask[h][seen], float("-inf"))
            if sink_H is not None:
                score = torch.cat([score, sink_H[h].double().expand(score.shape[0], 1)], dim=1)
            weight = score.softmax(-1)[:, : k1 - k0]
            at = torch.arange(q0, q1)[seen]
            rows.append((at, h, weight @ v[k0:k1, h // ratio], score.logsumexp(-1)))
    for at, h, o_rows, lse_rows in rows:
        head = torch.full_like(at, h)
        o = o.index_put((at, head), o_rows)
        lse = lse.index_put((at, head), lse_rows)
    return o, lse


def block_means(k: Tensor, packing: Packing, block: int, mode: str) -> list[Tensor]:
    """Per document [n, G, K] fp64: exact means, then rounded as mean_dtype says."""
    means = []
    for _, _, k0, k1 in spans(packing):
        exact = [k[start : min(start + block, k1)].double().mean(0) for start in range(k0, k1, block)]
        mean = torch.stack(exact) if exact else torch.zeros(0, *k.shape[1:], dtype=torch.float64)
        if mode == "centered" and len(mean):
            mean = mean - mean[0]
        means.append(mean if mode == "fp32" else mean.to(k.dtype).double())
    return means


def selected(
    q: Tensor, k: Tensor, packing: Packing, block: int, top_k: int, mode: str = "input", route_per: str = "q_head"
) -> tuple[Tensor, Tensor]:
    """(ids [T, S, top_k], gap [T, S]) of causal MoBA in fp64, ties to the later block.

    gap is the score difference at the cut: between the worst chosen past block and the best that was left out.
    """
    ratio = q.shape[1] // k.shape[1]
    queries = q.double()
    if route_per == "kv_group":
        queries, ratio = queries.view(q.shape[0], k.shape[1], ratio, -1).mean(2), 1
    ids = torch.full((q.shape[0], queries.shape[1], top_k), -1, dtype=torch.int32)
    gap = torch.full(ids.shape[:2], float("inf"), dtype=torch.float64)
    for (q0, q1, k0, k1), mean in zip(spans(packing), block_means(k, packing, block, mode), strict=True):
        for t in range(q0, q1):
            position = t - q0 + (k1 - k0) - (q1 - q0)
            if position < 0:
                continue
            own = position // block
            for s in range(queries.shape[1]):
                score = (mean[:own, s // ratio] @ queries[t, s]).tolist()
                order = sorted(range(own), key=lambda j, score=score: (score[j], j), reverse=True)
                chosen = sorted([*order[: top_k - 1], own])
                ids[t, s, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                if 0 < top_k - 1 < own:
                    gap[t, s] = score[order[top_k - 2]] - score[order[top_k - 1]]
    return ids, gap


def random_selection(
    packing: Packing, unit: int, width: int, *, sets: int = 1, row_size: int = 1, own: bool = False, seed: int = 0
) -> Selection:
    """A selection of random units of each row's document: ascending, -1 padded; a row may hold none unless own."""
    generator = torch.Generator().manual_seed(seed)
    rows = packing.num_rows_bound(row_size)
    ids = torch.full((rows, sets, width), -1, dtype=torch.int32)
    row = 0
    for q0, q1, k0, k1 in spans(packing):
        units = -(-(k1 - k0) // unit)
        for start in range(q0, q1, row_size):
            position = start - q0 + (k1 - k0) - (q1 - q0)
            for s in range(sets):
                some = torch.randperm(units, generator=generator)[
                    : int(torch.randint(0, width + 1, (), generator=generator))
                ]
                chosen = set(some.tolist())
                if own and position >= 0:
                    chosen = {position // unit, *list(chosen - {position // unit})[: width - 1]}
                ids[row, s, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
            row += 1
    return Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), unit, row_size, own)


def assert_lse_close(found: Tensor, expected: Tensor, tol: float | None = None) -> None:
    """The same rows are empty (-inf), and the others agree."""
    empty = expected == float("-inf")
    assert torch.equal(found == float("-inf"), empty)
    assert_close(found[~empty], expected[~empty], tol, "lse")


def gradients(o: Tensor, lse: Tensor | None, leaves: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a fixed random functional of o and of the finite part of lse."""
    generator = torch.Generator().manual_seed(seed)
    loss = (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
    if lse is not None:
        weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
        finite = torch.isfinite(lse)
        loss = loss + (torch.where(finite, lse, 0.0).double() * weight).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
