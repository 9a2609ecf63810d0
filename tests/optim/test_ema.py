"""The running average of the weights."""

from __future__ import annotations

import pytest
import torch

from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.optim.ema import WeightAverage
from pithwood.optim.optimizer import Optimizer
from tests.numerics import assert_close
from tests.optim.helpers import NORM, Q_PROJ, ROLES, assert_same_bits, copies, make_params, set_grads

pytestmark = pytest.mark.quick


def averages_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()
    return {name: state["ema." + name].clone() for name in optimizer.params}


@pytest.mark.parametrize("warmup", [True, False])
def test_average_follows_its_formula(warmup):
    params = make_params()
    optimizer = Optimizer(AdamWConfig(lr=0.1, ema_decay=0.5, ema_warmup=warmup), params, ROLES, 6)
    expected = {name: value.double() for name, value in copies(params).items()}
    for step in range(6):
        set_grads(params, step)
        optimizer.step(step)
        decay = min(0.5, (1 + step) / (10 + step)) if warmup else 0.5
        expected = {name: decay * value + (1 - decay) * params[name].detach() for name, value in expected.items()}
    for name, value in expected.items():
        assert_close(averages_of(optimizer)[name], value, tol=1e-6, what=name)
    assert optimizer.state_dict()["ema_updates"].item() == 6.0


def test_swap_shows_the_averages_and_gives_the_weights_back_bit_for_bit():
    params = make_params()
    optimizer = Optimizer(MuonConfig(lr=0.1, ema_decay=0.9), params, ROLES, 2)
    set_grads(params, 0)
    optimizer.step(0)
    weights, averages = copies(params), averages_of(optimizer)
    with optimizer.averaged_weights():
        assert_same_bits(params, averages)
        assert not torch.equal(params[Q_PROJ], weights[Q_PROJ])
    assert_same_bits(params, weights)
    with pytest.raises(RuntimeError, match="evaluation failed"), optimizer.averaged_weights():
        raise RuntimeError("evaluation failed")
    assert_same_bits(params, weights)
    assert_same_bits(averages_of(optimizer), averages)


def test_frozen_parameters_end_at_their_value():
    params = make_params()
    optimizer = Optimizer(AdamWConfig(lr=0.1, ema_decay=0.5), params, ROLES, 60)
    set_grads(params, 0)
    optimizer.step(0)
    optimizer.set_phase(params, ROLES, trainable=("!*norm*",))
    for step in range(1, 50):
        set_grads(params, step)
        optimizer.step(step)
    assert_close(averages_of(optimizer)[NORM], params[NORM], tol=1e-6)


def test_no_average_is_kept_or_shown_unless_asked():
    params = make_params()
    optimizer = Optimizer(AdamWConfig(), params, ROLES, 1)
    assert not [key for key in optimizer.state_dict() if key.startswith("ema")]
    with pytest.raises(ValueError, match=r"ema_decay=0\.0; set it above 0"), optimizer.averaged_weights():
        pass
    with pytest.raises(ValueError, match=r"ema_decay=1\.5"):
        WeightAverage(1.5, True, params, torch.device("cpu"))
