"""The whole step: equality with torch, clipping, skipping, resuming, phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pithwood.optim.clip import clip_scale, global_norm
from pithwood.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from pithwood.optim.groups import ParamRole, WeightDecayRule
from pithwood.optim.optimizer import Optimizer
from pithwood.optim.schedule import Constant, Cosine, WarmupStableDecay
from tests.numerics import assert_close
from tests.optim.helpers import (
    GATE_UP,
    NORM,
    Q_PROJ,
    ROLES,
    SHAPES,
    assert_same_bits,
    copies,
    make_params,
    set_grads,
)

pytestmark = pytest.mark.quick

WRONG: Any = "x"

CONFIGS: dict[str, OptimizerConfig] = {
    "muon": MuonConfig(lr=0.02, adamw_lr=0.01, ns_dtype="fp32", ema_decay=0.9, schedule=Cosine(2)),
    "adamw": AdamWConfig(lr=0.02, ema_decay=0.9, schedule=WarmupStableDecay(2, 3)),
}


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_equals_torch_over_five_steps(eps):
    ours, theirs = make_params(), make_params()
    cfg = AdamWConfig(lr=0.02, betas=(0.8, 0.95), eps=eps, weight_decay=0.2, clip_norm=None, schedule=Constant())
    optimizer = Optimizer(cfg, ours, ROLES, 5)
    decaying = [value for name, value in theirs.items() if ROLES[name].kind in ("matrix", "experts")]
    others = [value for name, value in theirs.items() if ROLES[name].kind not in ("matrix", "experts")]
    reference = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.8, 0.95),
        eps=eps,
        foreach=False,
        fused=False,
    )
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step(step)
        reference.step()
    for name, value in make_params().items():
        assert_close(ours[name] - value, theirs[name] - value, tol=2e-6, what=name)


def test_muon_config_gives_matrices_to_muon_and_the_rest_to_adamw_at_its_own_rate():
    params = make_params()
    before = copies(params)
    cfg = MuonConfig(lr=0.02, adamw_lr=0.001, weight_decay=0.0, ns_dtype="fp32", clip_norm=None)
    optimizer = Optimizer(cfg, params, ROLES, 1)
    set_grads(params, 0)
    optimizer.step(0)
    for name, param in params.items():
        moved = (param.detach() - before[name]).square().mean().sqrt().item()
        if ROLES[name].kind in ("matrix", "experts"):
            # An orthogonal update has the root mean square 0.2 * sqrt(max / max), up to the iteration's 0.7 to 1.2.
            assert 0.02 * 0.2 * 0.6 < moved < 0.02 * 0.2 * 1.3, name
        else:
            assert moved == pytest.approx(0.001, rel=1e-3), name
    keys = optimizer.state_dict().keys()
    assert {key for key in keys if key.startswith("muon.momentum.")} == {
        "muon.momentum." + name for name, role in ROLES.items() if role.kind in ("matrix", "experts")
    }
    assert "adamw.exp_avg.embed.weight" in keys
    assert "adamw.exp_avg." + Q_PROJ not in keys


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm_and_clipping_equal_torch(scale):
    params = make_params()
    set_grads(params, 0, scale)
    grads = [param.grad.clone() for param in params.values()]
    norm = global_norm(grads)
    theirs = torch.nn.utils.clip_grad_norm_(list(params.values()), 2.0)
    assert_close(norm, theirs, tol=1e-6)
    for grad, param in zip(grads, params.values(), strict=True):
        assert_close(grad * clip_scale(norm, 2.0), param.grad, tol=1e-6)


def test_norm_of_low_precision_gradients_is_added_in_fp32():
    grads = [torch.full((4000,), 0.1, dtype=torch.bfloat16), torch.full((300, 7), -0.3, dtype=torch.bfloat16)]
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm()
    assert global_norm(grads).dtype == torch.float32
    assert_close(global_norm(grads), expected, tol=1e-6)


def test_clip_scale_corners():
    assert clip_scale(torch.tensor(0.0), 1.0).item() == 1.0
    assert clip_scale(torch.tensor(5.0), None).item() == 1.0
    for bad in (float("nan"), float("inf")):
        assert clip_scale(torch.tensor(bad), 1.0).item() == 0.0
        assert clip_scale(torch.tensor(bad), None).item() == 0.0
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_scale(torch.tensor(1.0), 0.0)
    with pytest.raises(ValueError, match="at least one gradient"):
        global_norm([])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_clipped_step_equals_a_step_on_gradients_scaled_by_hand(kind):
    clipped, scaled = make_params(), make_params()
    by_norm = Optimizer(CONFIGS[kind], clipped, ROLES, 5)
    by_hand = Optimizer(CONFIGS[kind], scaled, ROLES, 5)
    for step in range(3):
        set_grads(clipped, step, 50.0)
        set_grads(scaled, step, 50.0)
        norm = torch.nn.utils.clip_grad_norm_(list(scaled.values()), 1.0)
        metrics = by_norm.step(step)
        assert metrics["clipped"].item() == 1.0
        assert_close(metrics["grad_norm"], norm, tol=1e-6)
        by_hand.step(step)
    # Moments are compared too: Adam's weights alone would hide a clip that was forgotten.
    for key, value in by_norm.state_dict().items():
        assert_close(value.float(), by_hand.state_dict()[key].float(), tol=2e-5, what=key)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [Q_PROJ, GATE_UP, NORM, "embed.weight"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_non_finite_step_leaves_every_bit_alone(kind, where, bad):
    params = make_params()
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 5)
    for step in range(2):
        set_grads(params, step)
        assert optimizer.step(step)["skipped"].item() == 0.0
    weights, state = copies(params), copies(optimizer.state_dict())
    for skips in (1, 2):
        set_grads(params, 2)
        params[where].grad.view(-1)[3] = bad
        metrics = optimizer.step(2)
        assert metrics["skipped"].item() == 1.0
        assert metrics["clipped"].item() == 0.0
        assert metrics["consecutive_skips"].item() == skips
    assert state.pop("consecutive_skips") == 0
    after = dict(optimizer.state_dict())
    assert after.pop("consecutive_skips") == 2
    assert_same_bits(after, state)
    assert_same_bits(params, weights)
    set_grads(params, 3)
    assert optimizer.step(3)["consecutive_skips"].item() == 0
    for name, param in params.items():
        assert not torch.equal(param, weights[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_skipped_first_step_changes_nothing_that_follows(kind):
    """The bias correction counts accepted updates only; the schedule counts steps."""
    skipping, plain = make_params(), make_params()
    with_skip = Optimizer(CONFIGS[kind], skipping, ROLES, 5)
    without = Optimizer(CONFIGS[kind], plain, ROLES, 5)
    set_grads(skipping, 0)
    skipping[NORM].grad[0] = float("nan")
    with_skip.step(0)
    for step in (1, 2):
        set_grads(skipping, step)
        set_grads(plain, step)
        with_skip.step(step)
        without.step(step)
    assert_same_bits(skipping, plain)
    assert_same_bits(with_skip.state_dict(), without.state_dict())


def test_a_norm_from_outside_decides_the_clip_and_the_skip():
    params = make_params()
    optimizer = Optimizer(AdamWConfig(lr=0.1), params, ROLES, 3)
    before = copies(params)
    set_grads(params, 0)
    assert optimizer.step(0, grad_norm=torch.tensor(float("inf")))["skipped"].item() == 1.0
    assert_same_bits(params, before)
    set_grads(params, 0)
    metrics = optimizer.step(0, grad_norm=torch.tensor(4.0))
    assert metrics["grad_norm"].item() == 4.0
    assert_close(optimizer.state["adamw.exp_avg." + NORM], 0.1 * _first_grads()[NORM] / 4.0, tol=1e-5)


def _first_grads() -> dict[str, torch.Tensor]:
    params = make_params()
    set_grads(params, 0)
    return {name: param.grad for name, param in params.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_optimizer_takes_the_same_steps_bit_for_bit(kind):
    params = make_params()
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 6)
    for step in range(3):
        set_grads(params, step)
        optimizer.step(step)
    saved, weights = copies(optimizer.state_dict()), copies(params)
    resumed_params = make_params()
    resumed = Optimizer(CONFIGS[kind], resumed_params, ROLES, 6)
    for name, param in resumed_params.items():
        param.data.copy_(weights[name])
    assert resumed.load_state_dict(saved) == ([], [])
    for step in range(3, 6):
        set_grads(params, step)
        set_grads(resumed_params, step)
        optimizer.step(step)
        resumed.step(step)
    assert_same_bits(resumed_params, params)
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


def test_state_that_does_not_fit_is_refused_and_nothing_changes():
    params = make_params()
    optimizer = Optimizer(CONFIGS["muon"], params, ROLES, 6)
    set_grads(params, 0)
    optimizer.step(0)
    saved = copies(optimizer.state_dict())
    fresh = Optimizer(CONFIGS["muon"], make_params(), ROLES, 6)
    before = copies(fresh.state_dict())
    lacking = {key: value for key, value in saved.items() if key != "muon.momentum." + Q_PROJ}
    with pytest.raises(ValueError, match=r"missing muon\.momentum\.layers\.0\.attention\.q_proj\.weight \(1\)"):
        fresh.load_state_dict(lacking)
    with pytest.raises(ValueError, match=r"unexpected muon\.momentum\.gone \(1\)"):
        fresh.load_state_dict(saved | {"muon.momentum.gone": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"is torch.float32 \(2, 2\)"):
        fresh.load_state_dict(saved | {"muon.momentum." + Q_PROJ: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"torch.bfloat16"):
        fresh.load_state_dict(saved | {"ema." + NORM: torch.zeros(8, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="does not fit"):
        Optimizer(CONFIGS["adamw"], make_params(), ROLES, 6).load_state_dict(saved)
    assert_same_bits(fresh.state_dict(), before)
    missing, unexpected = fresh.load_state_dict(lacking | {"muon.momentum.gone": torch.ones(3)}, strict=False)
    assert missing == ["muon.momentum." + Q_PROJ]
    assert unexpected == ["muon.momentum.gone"]
    assert torch.equal(fresh.state_dict()["muon.momentum.gone"], torch.ones(3))
    assert torch.equal(fresh.state_dict()["muon.momentum." + GATE_UP], saved["muon.momentum." + GATE_UP])


@pytest.mark.parametrize("kind", CONFIGS)
def test_frozen_parameters_and_their_state_stay_and_thaw(kind):
    params = make_params()
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 9)
    set_grads(params, 0)
    optimizer.step(0)
    weights, state = copies(params), copies(optimizer.state_dict())
    set_grads(params, 1)
    optimizer.set_phase(params, ROLES, trainable=("*", "!*experts*", "!*norm*"))
    assert not params[GATE_UP].requires_grad
    assert params[GATE_UP].grad is None
    assert params[Q_PROJ].requires_grad
    for step in (1, 2):
        set_grads(params, step)
        optimizer.step(step)
    for name in SHAPES:
        frozen = "experts" in name or "norm" in name
        assert torch.equal(params[name], weights[name]) == frozen, name
        for key in optimizer.state:
            if key.endswith("." + name):
                assert torch.equal(optimizer.state[key], state[key]) == frozen, key
    # A run that resumes inside the phase finds the frozen parameters' moments in the checkpoint and keeps them.
    resumed = Optimizer(CONFIGS[kind], make_params(), ROLES, 9, trainable=("*", "!*experts*", "!*norm*"))
    assert resumed.load_state_dict(copies(optimizer.state_dict())) == ([], [])
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())
    optimizer.set_phase(params, ROLES)
    set_grads(params, 3)
    optimizer.step(3)
    assert not torch.equal(params[GATE_UP], weights[GATE_UP])


def test_a_frozen_parameter_is_not_counted_in_the_norm():
    params = make_params()
    optimizer = Optimizer(AdamWConfig(), params, ROLES, 2, trainable=("*norm*",))
    set_grads(params, 0)
    assert_close(optimizer.step(0)["grad_norm"], _reference_norm_grad(), tol=1e-6)


def _reference_norm_grad() -> torch.Tensor:
    params = make_params()
    for name, param in params.items():
        param.requires_grad_("norm" in name)
    set_grads(params, 0)
    return params[NORM].grad.norm()


def test_phases_keep_state_by_name_start_new_names_fresh_and_park_or_drop_the_rest():
    params = make_params()
    optimizer = Optimizer(CONFIGS["muon"], params, ROLES, 9)
    set_grads(params, 0)
    optimizer.step(0)
    state = copies(optimizer.state_dict())
    # The second phase trades the head for an indexer and rebuilds q_proj as a new tensor.
    second = {name: param for name, param in params.items() if name != "head.weight"}
    second["indexer.weight"] = torch.nn.Parameter(torch.ones(4, 8))
    second[Q_PROJ] = torch.nn.Parameter(params[Q_PROJ].detach().clone())
    roles = ROLES | {"indexer.weight": ParamRole("matrix")}
    optimizer.set_phase(second, roles)
    kept = optimizer.state_dict()
    assert torch.equal(kept["muon.momentum." + Q_PROJ], state["muon.momentum." + Q_PROJ])
    assert torch.equal(kept["muon.momentum.indexer.weight"], torch.zeros(4, 8))
    assert torch.equal(kept["ema.indexer.weight"], torch.ones(4, 8))
    assert torch.equal(kept["adamw.exp_avg.head.weight"], state["adamw.exp_avg.head.weight"])
    set_grads(second, 1)
    optimizer.step(1)
    optimizer.set_phase(params, ROLES)
    assert torch.equal(optimizer.state["adamw.exp_avg.head.weight"], state["adamw.exp_avg.head.weight"])
    assert optimizer.state["adamw.step.head.weight"] == 1
    assert optimizer.state["adamw.step." + NORM] == 2
    optimizer.set_phase(second, roles, drop=True)
    assert not [key for key in optimizer.state_dict() if key.endswith("head.weight")]
    with pytest.raises(ValueError, match="needs a new name"):
        optimizer.set_phase(second | {Q_PROJ: torch.nn.Parameter(torch.zeros(8, 8))}, roles)


def test_lr_scales_and_decay_rules_reach_the_update():
    params = make_params()
    before = copies(params)
    cfg = AdamWConfig(
        lr=0.01, weight_decay=0.5, weight_decay_rules=(WeightDecayRule("*norm*", 2.0), WeightDecayRule("*q_proj*", 0.0))
    )
    optimizer = Optimizer(cfg, params, ROLES, 1, lr_scales={"layers.*": 0.5, "*experts*": 0.0})
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step(0)
    # With zero gradients only the decay moves a weight.
    assert_close(params[NORM], before[NORM] * (1 - 0.01 * 0.5 * 2.0), tol=1e-6)
    assert torch.equal(params[Q_PROJ], before[Q_PROJ])
    assert torch.equal(params[GATE_UP], before[GATE_UP])
    assert torch.equal(params["embed.weight"], before["embed.weight"])


def test_schedule_and_lr_scales_reach_muon_and_adamw_alike():
    """Half the rate by warm-up is half the rate by scale is half the rate."""
    halves = [
        (MuonConfig(lr=0.02, adamw_lr=0.01, schedule=Constant(2)), None),
        (MuonConfig(lr=0.02, adamw_lr=0.01), {"*": 0.5}),
        (MuonConfig(lr=0.01, adamw_lr=0.005), None),
    ]
    results = []
    for cfg, lr_scales in halves:
        params = make_params()
        set_grads(params, 0)
        Optimizer(cfg, params, ROLES, 2, lr_scales=lr_scales).step(0)
        results.append(params)
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])
    assert not torch.equal(results[2][Q_PROJ], make_params()[Q_PROJ])


def test_a_parameter_without_gradient_is_left_alone():
    params = make_params()
    optimizer = Optimizer(CONFIGS["muon"], params, ROLES, 2)
    weights, state = copies(params), copies(optimizer.state_dict())
    set_grads(params, 0)
    for name in (GATE_UP, NORM):
        params[name].grad = None
    optimizer.step(0)
    for name in (GATE_UP, NORM):
        assert torch.equal(params[name], weights[name])
        for key in optimizer.state:
            if key.endswith("." + name):
                assert torch.equal(optimizer.state[key], state[key]), key


def test_a_gradient_of_another_layout_is_understood():
    transposed, plain = make_params(), make_params()
    optimizers = [Optimizer(AdamWConfig(), params, ROLES, 1) for params in (transposed, plain)]
    for params in (transposed, plain):
        set_grads(params, 0)
    transposed["embed.weight"].grad = plain["embed.weight"].grad.t().contiguous().t()
    assert not transposed["embed.weight"].grad.is_contiguous()
    for optimizer in optimizers:
        optimizer.step(0)
    assert_same_bits(transposed, plain)


def test_metrics_follow_the_schedule_and_zero_grad_drops_gradients():
    params = make_params()
    optimizer = Optimizer(MuonConfig(lr=0.5, schedule=WarmupStableDecay(4, 2), clip_norm=None), params, ROLES, 8)
    rates = []
    for step in range(8):
        set_grads(params, step)
        metrics = optimizer.step(step)
        assert metrics["clipped"].item() == 0.0
        rates.append(metrics["lr"].item())
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.25, 0.0]
    optimizer.zero_grad()
    assert all(param.grad is None for param in params.values())
    with pytest.raises(ValueError, match="at least one gradient"):
        optimizer.step(0)
    with pytest.raises(ValueError, match="step=8"):
        optimizer.step(8)


def test_parameters_that_do_not_fit_are_refused_before_anything_changes():
    params = make_params()
    with pytest.raises(ValueError, match=r"embed\.weight is torch.bfloat16; keep parameters in fp32"):
        Optimizer(MuonConfig(), params | {"embed.weight": torch.nn.Parameter(torch.zeros(2, 2).bfloat16())}, ROLES, 1)
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one tensor"):
        Optimizer(MuonConfig(), params | {"head.weight": params["embed.weight"]}, ROLES, 1)
    with pytest.raises(ValueError, match="not contiguous"):
        Optimizer(MuonConfig(), params | {Q_PROJ: torch.nn.Parameter(torch.zeros(8, 12).t())}, ROLES, 1)
    with pytest.raises(ValueError, match="do not fit into a run of 3 steps"):
        Optimizer(MuonConfig(schedule=Cosine(5)), params, ROLES, 3)
    params[NORM].grad = torch.zeros(8).to_sparse()
    with pytest.raises(ValueError, match="dense fp32"):
        Optimizer(MuonConfig(), params, ROLES, 1).step(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MuonConfig(lr=-1.0), r"MuonConfig: lr=-1\.0"),
        (lambda: MuonConfig(lr=float("nan")), "lr=nan"),
        (lambda: MuonConfig(momentum=1.0), "momentum=1.0"),
        (lambda: MuonConfig(ns_steps=0), "ns_steps=0"),
        (lambda: MuonConfig(ns_dtype=WRONG), "auto, fp32, bf16"),
        (lambda: MuonConfig(adamw_lr=-0.1), "adamw_lr=-0.1"),
        (lambda: AdamWConfig(betas=(0.9, 1.0)), r"betas\.1=1\.0"),
        (lambda: AdamWConfig(betas=WRONG), "two numbers"),
        (lambda: AdamWConfig(clip_norm=0.0), "clip_norm=0.0"),
        (lambda: AdamWConfig(ema_decay=1.0), "ema_decay=1.0"),
        (lambda: WeightDecayRule("*", -1.0), "value=-1.0"),
    ],
)
def test_configs_refuse_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
