"""A configuration that cannot work is refused, in words that name the field and the way out."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from typing import Any

import pytest

from pithwood.config import apply_overrides, config_hash
from pithwood.moe import MoEConfig
from pithwood.recipes import load_recipe
from pithwood.run import LENGTH_AND_LOGGING

GOOD: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_dim": 16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"expert_dim": 0}, "expert_dim=0"),
        ({"top_k": 0}, "between 1 and num_experts=8"),
        ({"top_k": 9}, "between 1 and num_experts=8"),
        ({"score": "tanh"}, "choose one of softmax, sigmoid"),
        ({"routing": "random"}, "choose one of learned, balanced"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"num_groups": 3}, "must divide num_experts=8"),
        ({"num_groups": 4, "groups_per_token": 5}, "between 1 and num_groups=4"),
        ({"num_groups": 4, "groups_per_token": 1, "top_k": 3}, "raise groups_per_token or lower top_k"),
        ({"num_groups": 8, "groups_per_token": 4, "group_score": "top2_sum"}, "groups of two experts or more"),
        ({"shared_dim": 4}, "needs num_shared_experts"),
        ({"num_shared_experts": -1}, "must be >= 0"),
        ({"balance": "expert"}, "choose one of none, micro_batch, sequence, global_batch"),
        ({"balance": "sequence"}, "needs balance_coef > 0"),
        ({"balance_coef": 0.1}, "does nothing with balance='none'"),
        ({"bias_update_rate": -1.0}, "bias_update_rate=-1.0"),
        ({"z_loss_coef": -1.0}, "z_loss_coef=-1.0"),
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig(**{**GOOD, **change})


def test_every_field_is_documented() -> None:
    body = ast.parse(inspect.getsource(MoEConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    nodes = body.body
    for node, after in pairwise(nodes):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr), f"{ast.unparse(node.target)} has no docstring"


def test_shared_width_defaults_to_the_experts_own() -> None:
    assert MoEConfig(**GOOD).shared_width == 0
    assert MoEConfig(**GOOD, num_shared_experts=3).shared_width == 48
    assert MoEConfig(**GOOD, num_shared_experts=3, shared_dim=5).shared_width == 15


def test_settings_of_memory_keep_a_runs_folder() -> None:
    run = load_recipe("debug")
    plain = config_hash(run, exclude=LENGTH_AND_LOGGING)
    of_experts = [f"model.moe.{change}" for change in ("save_rows=false", "chunk_tokens=64", "chunk_recompute=false")]
    for change in (*of_experts, "optim.offload_state=true", "recompute=block"):
        assert config_hash(apply_overrides(run, [change]), exclude=LENGTH_AND_LOGGING) == plain
    assert config_hash(apply_overrides(run, ["model.moe.scale=2.0"]), exclude=LENGTH_AND_LOGGING) != plain
