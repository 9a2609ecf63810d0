"""Parameters and costs by part add up to what the model itself says, and count what they name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.facts.anatomy import cost_per_token, parameters_by_part
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.ops.packing import Packing
from tests.toy_mixer import ToyRecurrenceConfig

pytestmark = pytest.mark.quick

CONFIG = Qwen3MoEConfig(
    vocab_size=300, model_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    attention=(MoBAConfig(block_size=8, top_k=2, key_conv=3), FullAttentionConfig(), ToyRecurrenceConfig()),
    moe=MoEConfig(num_experts=6, top_k=2, expert_dim=20, num_shared_experts=1, shared_dim=12),
    dense_layers=(1,), dense_dim=40,
)  # fmt: skip


def model_of(config: Qwen3MoEConfig) -> Qwen3MoE:
    with torch.device("meta"):
        return Qwen3MoE(config)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_by_part_add_up_to_the_models_own_counts(tied):
    model = model_of(dataclasses.replace(CONFIG, tie_embeddings=tied))
    rows, counts = parameters_by_part(model), model.num_params()
    assert sum(row["total"] for row in rows) == counts["total"]
    assert sum(row["active"] for row in rows) == counts["active"]
    by_part = {row["part"]: row for row in rows}
    assert ("head" in by_part) != tied
    assert by_part["routed experts"] == {"part": "routed experts", "total": 2 * 6 * 60 * 32, "active": 2 * 2 * 60 * 32}
    assert by_part["shared experts"]["total"] == 2 * 3 * 12 * 32
    assert by_part["dense feed-forward"]["total"] == 3 * 40 * 32
    assert by_part["router"]["total"] == 2 * 6 * 32
    assert by_part["embedding"]["total"] == 300 * 32


def test_costs_by_part_add_up_to_the_models_own_cost():
    model = model_of(CONFIG)
    cost, whole = cost_per_token(model, 50), model.cost(Packing.from_lengths([50]))
    assert cost["forward_flops"] == pytest.approx(whole.model_flops / 50)
    assert cost["cache_bytes"] == pytest.approx(whole.cache_bytes / 50)
    for name in ("forward_flops", "executed_flops"):
        assert sum(part[name] for part in cost["parts"]) == pytest.approx(cost[name])
    assert sum(part["share"] for part in cost["parts"]) == pytest.approx(1)
    by_part = {part["part"]: part["forward_flops"] for part in cost["parts"]}
    assert by_part["head"] == pytest.approx(2 * 32 * 300)
    assert by_part["dense feed-forward"] == pytest.approx(6 * 32 * 40)
    assert by_part["router and experts"] == pytest.approx(2 * (2 * 32 * 6 + 6 * 32 * (2 * 20 + 12)))


def test_the_cache_counts_in_the_asked_size_of_numbers():
    dense = model_of(dataclasses.replace(CONFIG, attention=FullAttentionConfig()))
    assert cost_per_token(dense, 64, 4)["cache_bytes"] == 3 * 2 * 2 * 8 * 4
    assert cost_per_token(dense, 64, 2)["cache_bytes"] == 3 * 2 * 2 * 8 * 2
