"""Attention in fp64 under explicit masks, on any device: what implementations must agree with.

Slow, in chunks of rows, and independent of the ops: masks are spelled out key by key, gradients are written down.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, S selections per token,
k ids per selection, M keys of one document, n rows of a chunk.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

LIVE_SCORES = 1 << 22
"""Scores of one head held at a time (32 MiB in fp64)."""


def masked_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    cu_seqlens: Tensor,
    ids_TSk: Tensor | None = None,
    block_size: int = 1,
    grad_o_THV: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Causal self-attention in `dtype`, to everything (ids None) or to the blocks that ids name.

    ids_TSk     [T, S, k] int   block ids local to the document, -1 for none; S = H, G or 1
    grad_o_THV  [T, H, V]       also return the gradients for this gradient of o
    returns     o [T, H, V], lse [T, H]; with grad_o dq, dk, dv like q, k, v; rows that see nothing give 0, -inf and 0
    """
    tokens, heads, dim = q_THK.shape
    kv_heads = k_TGK.shape[1]
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (x.detach().to(dtype) for x in (q_THK, k_TGK, v_TGV))
    found = {"o": v.new_zeros(tokens, heads, v.shape[2]), "lse": v.new_full((tokens, heads), float("-inf"))}
    if grad_o_THV is not None:
        grad_o_THV = grad_o_THV.detach().to(dtype)
        found |= {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    for start, end in pairwise(cu_seqlens.tolist()):
        step = max(1, LIVE_SCORES // max(end - start, 1))
        for begin in range(start, end, step):
            rows = slice(begin, min(begin + step, end))
            keys = slice(start, rows.stop)
            for head in range(heads):
                g = head * kv_heads // heads
                ids = None if ids_TSk is None else ids_TSk[rows, head * ids_TSk.shape[1] // heads]
                mask = row_mask(torch.arange(rows.start - start, rows.stop - start, device=q.device), ids, block_size)
                s = (q[rows, head] @ k[keys, g].T * scale).masked_fill_(~mask, float("-inf"))
                lse = s.logsumexp(-1)
                p = torch.where(mask, torch.exp(s - lse[:, None]), 0.0)
                o = p @ v[keys, g]
                found["o"][rows, head], found["lse"][rows, head] = o, lse
                if grad_o_THV is None:
                    continue
                do = grad_o_THV[rows, head]
                found["dv"][keys, g] += p.T @ do
                ds = p * (do @ v[keys, g].T - (do * o).sum(-1, keepdim=True)) * scale
                found["dq"][rows, head] = ds @ k[keys, g]
                found["dk"][keys, g] += ds.T @ q[rows, head]
    return found


def row_mask(position_n: Tensor, ids_nk: Tensor | None, block_size: int) -> Tensor:
    """[n, M] bool, M = last position + 1: the keys that rows at these (ascending) positions see."""
    key_M = torch.arange(int(position_n[-1]) + 1, device=position_n.device)
    causal_nM = key_M <= position_n[:, None]
    if ids_nk is None:
        return causal_nM
    blocks = len(key_M) // block_size + 1
    chosen = torch.zeros(len(position_n), blocks + 1, dtype=torch.bool, device=key_M.device)
    # ids past the last visible key, and -1, go to one column that nobody reads
    ids_nk = ids_nk.long()
    chosen.scatter_(1, torch.where((ids_nk < 0) | (ids_nk >= blocks), blocks, ids_nk), True)
    return chosen[:, key_M // block_size] & causal_nM


def selection_errors(
    ids_THk: Tensor,
    q_THK: Tensor,
    means_UGK: Tensor,
    cu_seqlens: Tensor,
    unit_offsets: Tensor,
    block_size: int,
    top_k: int,
    tolerance: float = 1e-5,
) -> int:
    """Number of (query, head) rows whose ids are not a correct causal choice, up to near ties; fp64 scores.

    ids_THk     [T, H, k] int32     ascending, -1 at the end
    means_UGK   [U, G, K]           block means as they are scored (rounded), unit_offsets [N + 1] per document

    A row is right if it holds its own block and min(k - 1, candidates) distinct past ones, in order, and no block left
    out scores better than one chosen by more than `tolerance` |q| |mean|, the rounding of an fp32 sum.
    """
    heads, kv_heads = q_THK.shape[1], means_UGK.shape[1]
    wrong = 0
    for doc, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        first, last = (int(x) for x in unit_offsets[doc : doc + 2])
        step = max(1, LIVE_SCORES // max(last - first, 1))
        for begin in range(start, end, step):
            rows = slice(begin, min(begin + step, end))
            own_n = torch.arange(rows.start - start, rows.stop - start, device=q_THK.device) // block_size
            past_nU = torch.arange(last - first, device=q_THK.device) < own_n[:, None]
            count_n = own_n.clamp(max=top_k - 1) + 1
            for head in range(heads):
                mean = means_UGK[first:last, head * kv_heads // heads].double()
                query = q_THK[rows, head].double()
                score = query @ mean.T
                slack = tolerance * query.norm(dim=-1) * mean.norm(dim=-1).max()
                ids = ids_THk[rows, head].long()
                valid = ids >= 0
                chosen = torch.zeros(len(own_n), last - first + 1, dtype=torch.bool, device=ids.device)
                chosen.scatter_(1, torch.where(valid & (ids < last - first), ids, last - first), True)
                chosen = chosen[:, :-1]
                worst = score.masked_fill(~(chosen & past_nU), float("inf")).amin(-1)
                best = score.masked_fill(chosen | ~past_nU, float("-inf")).amax(-1)
                ascending = ((ids[:, 1:] > ids[:, :-1]) | ~valid[:, 1:]).all(-1)
                right = (
                    ascending
                    & (chosen.sum(-1) == count_n)
                    & (valid.sum(-1) == count_n)
                    & chosen.gather(1, own_n[:, None])[:, 0]
                    & ((chosen & past_nU).sum(-1) == count_n - 1)
                    & (worst >= best - slack)
                )
                wrong += int((~right).sum())
    return wrong
