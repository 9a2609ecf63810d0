"""What a model's routers and block selections do on real text: expert load, block choices, layer by layer.

Legend: T packed tokens, S selections per token, k ids per selection, E experts, U units (blocks) of all documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.balance import count_experts, load_stats
from pithwood.observe.metrics import selection_stats, tile_union
from pithwood.ops.packing import Packing, Selection, doc_of_rows

POPULAR_SHARE = 0.01
"""The most popular blocks whose share of all hits is told."""


@torch.no_grad()
def measure_routing(model: Qwen3MoE, batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Expert load and block choices of every layer, over all tokens of the batches.

    returns  tokens: how many were routed
             experts: a row per MoE layer {layer, counts [E], max_over_mean, entropy (1: even), dead (experts without a
             token)}
             blocks: a row per layer that selects blocks {layer, block_size, top_k, own_share, entropy, union_64,
             union_128, popular_share, distances}; the first five as `selection_stats` defines them, means over the
             batches; NaN where nothing could be measured
             popular_share: of all entries that name a past block, the share that names the hundredth of past blocks
             named most often (at least one; all documents, heads and batches together)
             distances: rows {from, to, share, uniform}: share of entries by how many blocks they lie before the query's
             own (0: the own block), and what a selection without preference among the past blocks would give
    """
    experts: dict[int, Tensor] = {}
    blocks: dict[int, _BlockChoices] = {}
    tokens = 0
    device = model.device
    for batch in batches:
        probe: dict[str, Any] = {}
        packing = batch.packing.to(device)
        model.hidden(batch.columns["tokens"].to(device), packing, dtype=dtype, probe=probe)
        tokens += batch.num_tokens
        for key, value in probe.items():
            layer, name = int(key.split(".")[1]), key.split(".", 2)[2]
            if isinstance(value, Selection):
                ids = value.ids if value.row_size == 1 else value.ids[packing.row_of_query(value.row_size)]
                blocks.setdefault(layer, _BlockChoices(value.unit)).add(ids, packing)
            elif name == "experts":
                counts = count_experts(value, model.cfg.moe.num_experts)
                experts[layer] = experts[layer] + counts if layer in experts else counts
    return {
        "tokens": tokens,
        "experts": [_expert_row(layer, counts) for layer, counts in sorted(experts.items())],
        "blocks": [{"layer": layer, **choices.row()} for layer, choices in sorted(blocks.items())],
    }


def _expert_row(layer: int, counts_E: Tensor) -> dict[str, Any]:
    load = load_stats(counts_E)
    return {
        "layer": layer,
        "counts": counts_E.tolist(),
        "max_over_mean": float(load.max_over_mean),
        "entropy": float(load.entropy),
        "dead": int((counts_E == 0).sum()),
    }


@dataclass
class _BlockChoices:
    """One layer's choices, gathered over batches."""

    block_size: int
    top_k: int = 0
    means: dict[str, list[float]] = field(default_factory=dict)
    hits: list[Tensor] = field(default_factory=list)
    """Per batch, how often each past block was named."""
    distances: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, ids_TSk: Tensor, packing: Packing) -> None:
        size, sets = self.block_size, ids_TSk.shape[1]
        self.top_k = max(self.top_k, ids_TSk.shape[2])
        own_T = packing.query_key_position() // size
        past_TSk = (ids_TSk >= 0) & (ids_TSk != own_T[:, None, None])
        stats = selection_stats(ids_TSk, packing, size)
        stats["union_64"] = tile_union(ids_TSk, past_TSk, packing, size, rows=64)
        for name, value in stats.items():
            self.means.setdefault(name, []).append(float(value))

        offsets_N = packing.unit_offsets(size)
        unit_TSk = offsets_N[packing.query_doc()][:, None, None] + ids_TSk
        hits_U = torch.bincount(unit_TSk[past_TSk], minlength=int(offsets_N[-1]))
        # a document's last block is nobody's past
        doc_U = doc_of_rows(offsets_N, len(hits_U))
        is_past_U = torch.arange(len(hits_U), device=hits_U.device) < offsets_N[doc_U + 1] - 1
        self.hits.append(hits_U[is_past_U].cpu())

        distance = (own_T[:, None, None] - ids_TSk)[ids_TSk >= 0]
        self.distances = _add(self.distances, torch.bincount(distance).cpu().double())
        self.uniform = _add(self.uniform, _uniform_distances(own_T, ids_TSk.shape[2]).cpu() * sets)

    def row(self) -> dict[str, Any]:
        hits = torch.cat(self.hits).sort(descending=True).values.double()
        popular = math.ceil(POPULAR_SHARE * len(hits))
        share = float(hits[:popular].sum() / hits.sum()) if hits.sum() > 0 else math.nan
        names = ("own_share", "entropy", "union_64", "union_128")
        means = {name: [value for value in self.means[name] if math.isfinite(value)] for name in names}
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            **{name: sum(values) / len(values) if values else math.nan for name, values in means.items()},
            "popular_share": share,
            "distances": _distance_rows(self.distances, self.uniform),
        }


def _uniform_distances(own_T: Tensor, top_k: int) -> Tensor:
    """[blocks] fp64: expected entries by distance if queries took their own block and top_k - 1 past ones at random."""
    queries_B = torch.bincount(own_T).double()
    blocks_B = torch.arange(len(queries_B), device=own_T.device).double()
    each_B = queries_B * blocks_B.clamp(max=top_k - 1) / blocks_B.clamp(min=1)
    # a query of block b may choose distances 1 to b: sum over all b from the distance on
    expected = each_B.flip(0).cumsum(0).flip(0)
    expected[0] = queries_B.sum()
    return expected


def _distance_rows(counts: Tensor, uniform: Tensor) -> list[dict[str, Any]]:
    """Shares in bins 0, 1, 2, 3-4, 5-8, ... blocks."""
    counts = _add(counts, torch.zeros_like(uniform))
    rows, low, high = [], 0, 0
    while low < len(counts):
        last = min(high, len(counts) - 1)
        rows.append(
            {
                "from": low,
                "to": last,
                "share": float(counts[low : last + 1].sum() / counts.sum()),
                "uniform": float(uniform[low : last + 1].sum() / uniform.sum()),
            }
        )
        low, high = high + 1, max(1, 2 * high)
    return rows


def _add(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(max(len(a), len(b)), dtype=torch.float64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total
