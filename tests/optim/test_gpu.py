"""The same step on a GPU: no host sync, and the CPU's result."""

from __future__ import annotations

import pytest
import torch

from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.optim.optimizer import Optimizer
from pithwood.optim.schedule import WarmupStableDecay
from tests.numerics import assert_close
from tests.optim.helpers import NORM, ROLES, assert_same_bits, copies, make_params, set_grads

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cfg", [MuonConfig(ema_decay=0.9), AdamWConfig(ema_decay=0.9)], ids=["muon", "adamw"])
def test_a_step_never_waits_for_the_device(cfg):
    params = make_params("cuda")
    optimizer = Optimizer(cfg, params, ROLES, 4)
    set_grads(params, 0)
    optimizer.step(0)
    for step, bad in ((1, False), (2, True)):
        set_grads(params, step)
        if bad:
            params[NORM].grad[0] = float("nan")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = optimizer.step(step)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert metrics["skipped"].item() == float(bad)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_gpu_takes_the_cpus_steps(kind):
    schedule = WarmupStableDecay(2, 2)
    cfg = (
        MuonConfig(lr=0.02, ns_dtype="fp32", ema_decay=0.9, schedule=schedule)
        if kind == "muon"
        else AdamWConfig(lr=0.02, ema_decay=0.9, schedule=schedule)
    )
    params = {device: make_params(device) for device in ("cpu", "cuda")}
    optimizers = {device: Optimizer(cfg, params[device], ROLES, 5) for device in params}
    for step in range(5):
        for device, optimizer in optimizers.items():
            set_grads(params[device], step)
            optimizer.step(step)
    for name, start in make_params().items():
        moved = params["cuda"][name].detach().cpu() - start
        assert_close(moved, params["cpu"][name].detach() - start, tol=1e-4, what=name)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_non_finite_step_leaves_every_bit_alone(kind):
    params = make_params("cuda")
    optimizer = Optimizer(MuonConfig(ema_decay=0.9) if kind == "muon" else AdamWConfig(ema_decay=0.9), params, ROLES, 5)
    for bad_first in (True, False):
        if not bad_first:
            set_grads(params, 0)
            optimizer.step(0)
        weights, state = copies(params), copies(optimizer.state_dict())
        for name in params:
            set_grads(params, 1)
            params[name].grad.view(-1)[1] = float("nan")
            optimizer.step(1)
        assert_same_bits(params, weights)
        after = dict(optimizer.state_dict())
        assert after.pop("consecutive_skips").item() == len(params)
        state.pop("consecutive_skips")
        assert_same_bits(after, state)
