"""The mixer's gates pass on every mixer of the tree and name the gate that each broken one runs into."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import Cost, LayerContext, Mixer, MixerConfig, MixerOut, MixerShape
from pithwood.attention.full import FullAttention, FullAttentionConfig
from pithwood.attention.moba import MoBA, MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.check.gates import passed, report, run_gates
from pithwood.check.mixer import load_mixer, mixer_gates
from pithwood.ops.packing import Packing
from tests.toy_mixer import ToyRecurrenceConfig


def check(config: MixerConfig, folder: Any, until: str = "") -> str:
    """The report, of the gates up to `until` only if one is named."""
    gates = mixer_gates(config, folder)
    names = [gate.name for gate in gates]
    return report(run_gates(gates[: names.index(until) + 1] if until else gates))


@pytest.mark.parametrize(
    "config",
    [
        FullAttentionConfig(),
        SlidingWindowConfig(window=5, key_conv=3),
        MoBAConfig(block_size=8, top_k=2),
        pytest.param(MoBAConfig(block_size=4, top_k=3, key_conv=5, route_per="kv_group"), marks=pytest.mark.slow),
        ToyRecurrenceConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_mixers_of_the_tree_pass_every_gate(config, tmp_path):
    results = run_gates(mixer_gates(config, tmp_path))
    assert passed(results), report(results)
    assert len(results) == 11


class Broken(FullAttention):
    """Full attention with one thing wrong, the one that `fault` names."""

    def __init__(self, config: BrokenConfig, shape: MixerShape) -> None:
        super().__init__(config, shape)
        self.fault, self.calls = config.fault, 0
        if self.fault == "uninitialised":
            self.scale = torch.nn.Parameter(torch.empty(3))

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        fault, out = self.fault, super().forward(x_TD, ctx)
        y_TD, carry = out.y_TD, dict(out.carry)
        if fault == "shape":
            y_TD = y_TD[:-1]
        elif fault == "dtype":
            y_TD = y_TD.double()
        elif fault == "carry":
            carry["hidden"] = y_TD
        elif fault == "scaled gradient":
            y_TD = 2 * y_TD - y_TD.detach()
        elif fault == "detached":
            y_TD = y_TD.detach() + 0 * x_TD
        elif fault == "nan gradient":
            y_TD = y_TD + (y_TD - y_TD.detach()).abs().sqrt()
        elif fault == "looks ahead":
            y_TD = y_TD + 1e-3 * x_TD.roll(-1, 0) * (ctx.packing.position_T.roll(-1) > 0)[:, None]
        elif fault == "leaks":
            y_TD = y_TD + 1e-6 * x_TD.roll(1, 0) * (torch.arange(len(x_TD)) > 0)[:, None]
        elif fault == "dice":
            y_TD = y_TD + 1e-6 * torch.rand(1).item()
        elif fault == "counts calls":
            self.calls += self.training and ctx.ledger is not None
            y_TD = y_TD * (1 + 1e-3 * self.calls)
        return MixerOut(y_TD, carry)

    def extend(self, k_TGK: Tensor, v_TGK: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        k, v = super().extend(k_TGK, v_TGK, ctx)
        return (k, v * 1.01) if self.fault == "decodes otherwise" and ctx.cache is not None else (k, v)

    def cost(self, packing: Packing) -> Cost:
        if self.fault == "free":
            return Cost()
        cost = super().cost(packing)
        return dataclasses.replace(cost, executed_flops=0.5 * cost.model_flops) if self.fault == "less" else cost

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        return {"nowhere.weight": None} if self.fault == "unknown optimizer shape" else super().optimizer_shapes()


@dataclass(frozen=True)
class BrokenConfig(FullAttentionConfig):
    """Full attention with one thing wrong."""

    fault: str = ""
    """What is wrong; empty: nothing."""

    def build(self, shape: MixerShape) -> Mixer:
        return Broken(self, shape)

    def init_std(self, name: str, default: float) -> float | None:
        return None if name == "scale" else super().init_std(name, default)


@pytest.mark.parametrize(
    ("fault", "last_line"),
    [
        ("uninitialised", "FAIL build: scale is not initialised"),
        ("unknown optimizer shape", "FAIL build: optimizer_shapes() names parameters that do not exist: nowhere"),
        ("shape", "FAIL shape: y has shape [77, 24] for x [78, 24]"),
        ("dtype", "FAIL shape: y is torch.float64 for x of torch.float32"),
        ("carry", "FAIL carry: the carry hidden is not declared in carry_fields"),
        ("scaled gradient", "FAIL gradients: the gradient of "),
        ("detached", "FAIL gradients: "),
        ("nan gradient", "FAIL gradients: the gradient of x holds NaN"),
        ("looks ahead", "FAIL causality: changing token 1 moves token 0 before it"),
        ("leaks", "FAIL documents: "),
        ("dice", "FAIL "),
        ("free", "FAIL cost: cost().model_flops is 0"),
        ("less", "FAIL cost: cost() executes "),
        ("decodes otherwise", "FAIL decode: sequence 0 decoded from the cache differs"),
        ("counts calls", "FAIL train: resumed after step 6, step 7 has the loss "),
    ],
)
def test_a_broken_mixer_fails_at_the_gate_it_breaks(fault, last_line, tmp_path):
    assert check(BrokenConfig(fault=fault), tmp_path).splitlines()[-1].startswith(last_line)


def test_the_broken_mixer_without_a_fault_passes(tmp_path):
    """Guards the test above: the faults alone make it fail."""
    assert check(BrokenConfig(), tmp_path).endswith("PASS")


class Forgetful(MoBA):
    """Chooses its blocks outside `ctx.decide`'s record when it replays."""

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        out = super().forward(x_TD, ctx)
        return MixerOut(out.y_TD * (1 if ctx.replay is None else 1.001))


@dataclass(frozen=True)
class ForgetfulConfig(MoBAConfig):
    """MoBA that replays another function."""

    def build(self, shape: MixerShape) -> Mixer:
        return Forgetful(self, shape)


def test_another_output_under_replay_fails(tmp_path):
    assert "FAIL replay: recorded decisions, replayed, give another output" in check(
        ForgetfulConfig(block_size=8, top_k=2), tmp_path, "replay"
    )


@dataclass(frozen=True)
class SilentConfig(FullAttentionConfig):
    """A field that nobody explains."""

    strength: float = 1.0


@pytest.mark.quick
def test_a_configuration_must_explain_its_fields(tmp_path):
    assert "FAIL config: no docstring under the fields strength" in check(SilentConfig(), tmp_path, "config")


class Leaky(MoBA):
    """A selection that looks ahead: it declares so, and is not held to strict causality when it selects."""

    causality = "leaky_selection"


@dataclass(frozen=True)
class LeakyConfig(MoBAConfig):
    """MoBA that says its selection leaks."""

    def build(self, shape: MixerShape) -> Mixer:
        return Leaky(self, shape)


def test_a_leaky_selection_is_checked_with_its_selection_replayed(tmp_path):
    text = check(LeakyConfig(block_size=8, top_k=2), tmp_path)
    assert "with its selection replayed" in text
    assert "a run with it alone has no perplexity" in text
    assert text.endswith("PASS")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("MoBAConfi", [], "unknown mixer 'MoBAConfi'; known are .*MoBAConfig"),
        ("MoBAConfig", ["top_kk=2"], "did you mean top_k"),
        ("tests/toy_mixer.py:Nothing", [], "has no class 'Nothing' that derives from MixerConfig"),
        ("tests/no_such.py:Mixer", [], r"no_such\.py does not exist"),
    ],
)
def test_a_mixer_that_cannot_be_loaded_is_named(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_mixer(name, overrides)
