"""Which parameter gets what."""

from __future__ import annotations

from typing import Any

import pytest

from pithwood.optim.groups import ParamPlan, ParamRole, WeightDecayRule, plan_parameters
from tests.optim.helpers import GATE_UP, NORM, Q_PROJ, ROLES, SHAPES, make_params

WRONG: Any = "scale"

pytestmark = pytest.mark.quick


def plan(**changes: Any) -> dict[str, ParamPlan]:
    options: dict[str, Any] = {
        "muon": True,
        "weight_decay": 0.1,
        "decay_embeddings": False,
        "weight_decay_rules": (),
        "lr_scales": {},
        "trainable": ("*",),
    }
    roles = changes.pop("roles", ROLES)
    return plan_parameters(make_params(), roles, **(options | changes))


def test_kinds_choose_optimizer_decay_and_shape():
    plans = plan()
    assert {name for name, p in plans.items() if p.muon} == {
        Q_PROJ,
        GATE_UP,
        "layers.0.mlp.experts.down_proj",
    }
    assert {name for name, p in plans.items() if p.weight_decay == 0.1} == {name for name, p in plans.items() if p.muon}
    assert plans[Q_PROJ].matrix_shape == (1, 12, 8)
    assert plans[GATE_UP].matrix_shape == (6, 8, 8)
    assert plans["layers.0.mlp.experts.down_proj"].matrix_shape == (3, 8, 8)
    assert not any(p.muon for p in plan(muon=False).values())


def test_embeddings_and_head_decay_on_request_and_rules_win_last():
    plans = plan(
        decay_embeddings=True,
        weight_decay_rules=(WeightDecayRule("*.weight", 0.3), WeightDecayRule("embed*", 0.0)),
    )
    assert plans["head.weight"].weight_decay == 0.3
    assert plans["embed.weight"].weight_decay == 0.0
    assert plans[NORM].weight_decay == 0.3
    assert plans[GATE_UP].weight_decay == 0.1
    assert plan(decay_embeddings=True)["embed.weight"].weight_decay == 0.1


def test_the_last_matching_lr_scale_decides():
    plans = plan(lr_scales={"*": 0.5, "layers.0.*": 0.25, "*.gate.weight": 3.0})
    assert plans["embed.weight"].lr_scale == 0.5
    assert plans[Q_PROJ].lr_scale == 0.25
    assert plans["layers.0.mlp.gate.weight"].lr_scale == 3.0


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("*",), set(SHAPES)),
        ((), set(SHAPES)),
        (("!embed*", "!head*"), set(SHAPES) - {"embed.weight", "head.weight"}),
        (("layers.*", "!*experts*", "!*bias"), {Q_PROJ, "layers.0.mlp.gate.weight", NORM}),
        (("*norm*", "head.weight"), {NORM, "head.weight"}),
    ],
)
def test_trainable_globs_and_exceptions(patterns, expected):
    assert {name for name, p in plan(trainable=patterns).items() if p.trainable} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ("layers.0.atention.*",)}, r"trainable: 'layers\.0\.atention\.\*' matches.*q_proj"),
        ({"trainable": ("!*expert.*",)}, r"'\*expert\.\*' matches no parameter; close names: .*experts"),
        ({"trainable": ("*", "!*")}, "leaves no parameter to train"),
        ({"lr_scales": {"heads.*": 2.0}}, r"lr_scales: 'heads\.\*'.*head\.weight"),
        ({"lr_scales": {"*": -1.0}}, "must be 0 or more"),
        ({"weight_decay_rules": (WeightDecayRule("zzz", 0.0),)}, "weight_decay_rules: 'zzz' matches no parameter"),
        ({"roles": {k: v for k, v in ROLES.items() if k != NORM}}, r"no role for layers\.0\.norm\.weight \(1"),
        ({"roles": ROLES | {NORM: ParamRole("matrix")}}, r"needs 2 or 3 dimensions"),
        ({"roles": ROLES | {NORM: ParamRole(WRONG)}}, "kind='scale' must be one of matrix"),
        ({"roles": ROLES | {Q_PROJ: ParamRole("matrix", (2, 5, 8))}}, r"matrix_shape=\(2, 5, 8\) does not hold"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_name(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
