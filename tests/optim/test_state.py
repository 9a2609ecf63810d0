"""State in bf16 and state on the host: what is kept, that a resumed run repeats it, that curves stay close."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pithwood.checkpoint.load import latest_checkpoint, load_checkpoint
from pithwood.memory import memory_by_kind
from pithwood.ops.master import in_dtype, keep_copies
from pithwood.optim.adamw import AdamWSlice, adamw_update
from pithwood.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from pithwood.optim.muon import MuonRule, MuonSlice, muon_update
from pithwood.optim.offload import HostState
from pithwood.optim.optimizer import Optimizer
from pithwood.recipes.demo import debug
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.numerics import assert_close
from tests.optim.helpers import GATE_UP, NORM, Q_PROJ, ROLES, assert_same_bits, copies, make_params, set_grads
from tests.test_train import losses, small_run

LOW: dict[str, OptimizerConfig] = {
    "muon": MuonConfig(lr=0.02, ns_dtype="fp32", momentum_dtype="bf16", adam_state_dtype="bf16"),
    "adamw": AdamWConfig(lr=0.02, adam_state_dtype="bf16"),
}


def steps(optimizer: Optimizer, params: dict[str, Any], *numbers: int) -> None:
    for step in numbers:
        set_grads(params, step)
        optimizer.step(step)


@pytest.mark.quick
def test_each_kind_of_state_has_the_dtype_that_was_asked_for():
    params = make_params()
    mixed = Optimizer(MuonConfig(momentum_dtype="bf16", ema_decay=0.9), params, ROLES, 2).state_dict()
    assert mixed["muon.momentum." + Q_PROJ].dtype == torch.bfloat16
    assert mixed["adamw.exp_avg." + NORM].dtype == mixed["ema." + Q_PROJ].dtype == torch.float32
    other = Optimizer(AdamWConfig(adam_state_dtype="bf16"), params, ROLES, 2).state_dict()
    assert other["adamw.exp_avg_sq." + Q_PROJ].dtype == torch.bfloat16
    assert other["adamw.step." + NORM].dtype == torch.float32


@pytest.mark.quick
@pytest.mark.parametrize("kind", LOW)
def test_a_resumed_optimizer_rounds_as_the_unbroken_one(kind):
    params = make_params()
    unbroken = Optimizer(LOW[kind], params, ROLES, 6, seed=3)
    steps(unbroken, params, 0, 1, 2)
    weights, saved = copies(params), copies(unbroken.state_dict())
    steps(unbroken, params, 3, 4, 5)
    again = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    resumed = Optimizer(LOW[kind], again, ROLES, 6, seed=3)
    resumed.load_state_dict(saved)
    steps(resumed, again, 3, 4, 5)
    assert_same_bits(again, params)
    assert_same_bits(resumed.state_dict(), unbroken.state_dict())
    other = Optimizer(LOW[kind], {n: torch.nn.Parameter(v.clone()) for n, v in weights.items()}, ROLES, 6, seed=4)
    other.load_state_dict(saved)
    steps(other, other.params, 3, 4, 5)
    assert any(not torch.equal(value, resumed.state[key]) for key, value in other.state.items())


@pytest.mark.quick
@pytest.mark.parametrize("kind", LOW)
def test_a_step_that_is_not_finite_leaves_bf16_state_alone(kind):
    params = make_params()
    optimizer = Optimizer(LOW[kind], params, ROLES, 5)
    steps(optimizer, params, 0, 1)
    weights, state = copies(params), copies(optimizer.state_dict())
    set_grads(params, 2)
    params[NORM].grad[0] = float("nan")
    optimizer.step(2)
    after = dict(optimizer.state_dict())
    assert after.pop("consecutive_skips") == 1
    state.pop("consecutive_skips")
    assert_same_bits(after, state)
    assert_same_bits(params, weights)


@pytest.mark.quick
def test_small_changes_arrive_in_bf16_state_on_average():
    """Rounded to nearest, a mean that moves by a thousandth of itself per step would never move."""
    param = torch.nn.Parameter(torch.zeros(64, 64))
    cfg = MuonConfig(lr=0.0, momentum=0.999, momentum_dtype="bf16", clip_norm=None)
    optimizer = Optimizer(cfg, {Q_PROJ: param}, {Q_PROJ: ROLES[Q_PROJ]}, 100)
    optimizer.state["muon.momentum." + Q_PROJ].fill_(1.0)
    for step in range(100):
        param.grad = torch.zeros(64, 64)
        optimizer.step(step)
    assert optimizer.state["muon.momentum." + Q_PROJ].float().mean().item() == pytest.approx(0.999**100, rel=2e-3)


@pytest.mark.quick
def test_state_of_another_dtype_is_refused():
    saved = Optimizer(LOW["muon"], make_params(), ROLES, 2).state_dict()
    plain = Optimizer(MuonConfig(), make_params(), ROLES, 2)
    with pytest.raises(
        ValueError, match=r"torch\.bfloat16.*torch\.float32.*is needed; momentum_dtype, adam_state_dtype"
    ):
        plain.load_state_dict(saved)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda wrong: MuonConfig(momentum_dtype=wrong), "momentum_dtype='fp8' must be one of fp32, bf16"),
        (lambda wrong: MuonConfig(adam_state_dtype=wrong), "MuonConfig: adam_state_dtype='fp8'"),
        (lambda wrong: AdamWConfig(adam_state_dtype=wrong), "AdamWConfig: adam_state_dtype='fp8'"),
    ],
)
def test_unknown_dtypes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make("fp8")


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_offloading_changes_nothing_on_a_cpu(kind):
    results = []
    for offload in (False, True):
        params = make_params()
        cfg = MuonConfig(lr=0.02, offload_state=offload) if kind == "muon" else AdamWConfig(offload_state=offload)
        optimizer = Optimizer(cfg, params, ROLES, 3)
        steps(optimizer, params, 0, 1, 2)
        results.append({**copies(params), **copies(optimizer.state_dict())})
    assert_same_bits(*results)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_visits_in_windows_ends_as_state_that_stays(dtype, monkeypatch):
    """Momentum in chunks of two matrices and moments in stretches of 50, through windows of another memory."""
    monkeypatch.setattr("pithwood.optim.muon.matrices_per_chunk", lambda *args: 2)
    monkeypatch.setattr("pithwood.optim.adamw.WINDOW_ELEMENTS", 50)
    device = torch.device("cpu")
    one, yes = torch.tensor(1.0), torch.tensor(True)
    results = []
    for away in (False, True):
        torch.manual_seed(0)
        matrices = [
            MuonSlice(
                torch.randn(n, 6, 9), torch.randn(n, 6, 9), torch.randn(n, 6, 9).to(dtype), 0.1, 0.1, None, (n, 5)
            )
            for n in (3, 1, 4)
        ]
        vectors = [
            AdamWSlice(torch.randn(n), torch.randn(n), *torch.rand(2, n).to(dtype).unbind(), torch.zeros(()), 0.1, 0.1)
            for n in (7, 120, 30)
        ]
        options: dict[str, Any] = {"residence": HostState(device)} if away else {}
        for _ in range(2):
            muon_update(matrices, MuonRule(0.9, True, 5, torch.float32, one, yes), **options)
            adamw_update(vectors, betas=(0.9, 0.95), eps=1e-8, grad_scale=one, ok=yes, **options)
        results.append(
            {f"m{i}": item.momentum for i, item in enumerate(matrices)}
            | {f"p{i}": item.param for i, item in enumerate(itertools.chain(matrices, vectors))}
            | {f"v{i}": item.exp_avg_sq for i, item in enumerate(vectors)}
        )
    for name, value in results[0].items():
        # The fused kernel takes whole vectors and the rest of a stretch by other instructions.
        assert_close(results[1][name], value, tol=1e-6 if value.dtype == torch.float32 else 1e-3, what=name)


@pytest.mark.quick
def test_bytes_of_state_follow_the_settings():
    run, cuda = debug(), torch.device("cuda")

    def state(device: torch.device, **options: Any) -> float:
        optim = dataclasses.replace(run.optim, **options)
        return memory_by_kind(dataclasses.replace(run, optim=optim), device)["optimizer_state"]

    full = state(cuda)
    assert state(cuda, momentum_dtype="bf16", adam_state_dtype="bf16") == pytest.approx(full / 2, rel=1e-3)
    assert full / 2 < state(cuda, momentum_dtype="bf16") < 0.9 * full
    assert state(cuda, offload_state=True) == 0
    assert state(torch.device("cpu"), offload_state=True) == full


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_kept_copies_are_renewed_by_the_step(kind):
    params = make_params()
    optimizer = Optimizer(MuonConfig() if kind == "muon" else AdamWConfig(), params, ROLES, 4)
    kept = [params[name] for name in (Q_PROJ, GATE_UP, "embed.weight")]
    keep_copies(kept, torch.bfloat16)
    memory = [param.kept_copy[0] for param in kept]
    for bad in (False, True):
        set_grads(params, 0)
        if bad:
            params[NORM].grad[0] = float("inf")
        before = [param.detach().clone() for param in kept]
        optimizer.step(0)
        for param, copy, old in zip(kept, memory, before, strict=True):
            assert torch.equal(param, old) == bad
            assert in_dtype(param, torch.bfloat16) is copy
            assert torch.equal(copy, param.detach().bfloat16())
    assert not hasattr(params[NORM], "kept_copy")


def test_a_run_with_bf16_state_follows_the_run_with_fp32_state(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), steps=24, validate_every=100, checkpoint_every=100)
    curves = []
    for dtype in ("fp32", "bf16"):
        optim = dataclasses.replace(run.optim, momentum_dtype=dtype, adam_state_dtype=dtype)
        curves.append(
            [x for _, x in losses(train(dataclasses.replace(run, optim=optim), runs_dir=tmp_path, console=False))]
        )
    fp32, bf16 = (torch.tensor(curve) for curve in curves)
    assert fp32[-5:].mean() < fp32[0] - 0.5
    # a router's close choices fall differently in the end, which moves a loss more than the rounding that led there
    for part, limit in ((slice(0, 10), 2e-3), (slice(0, 24), 3e-2)):
        assert ((bf16 - fp32).abs() <= limit * fp32)[part].all()
    assert_close(bf16[-12:].mean(), fp32[-12:].mean(), tol=5e-3)
    assert not torch.equal(bf16, fp32)


def test_a_killed_run_with_bf16_state_resumes_with_the_same_digits(tmp_path, monkeypatch):
    run = small_run(tmp_path / "text")
    run = dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, momentum_dtype="bf16", adam_state_dtype="bf16", offload_state=True)
    )
    whole = train(run, runs_dir=tmp_path / "whole", console=False)
    step = Trainer.train_step

    def interrupted(self: Trainer, number: int, *args: Any, **kwargs: Any):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        stopped = train(run, runs_dir=tmp_path / "broken", console=False)
    assert stopped["steps"] == 5
    tensors, _ = load_checkpoint(latest_checkpoint(Path(stopped["run_dir"])), device=torch.device("cpu"))
    state = [tensors[name].dtype for name in tensors if name.startswith(("optim.muon.m", "optim.adamw.exp"))]
    assert set(state) == {torch.bfloat16}
    resumed = train(run, runs_dir=tmp_path / "broken", console=False)
    assert losses(resumed) == losses(whole)
