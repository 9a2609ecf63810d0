"""The ring of norms: what it measures, what it forgets, and that it neither changes nor delays a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pithwood.attention.base import LayerContext
from pithwood.losses import LossLedger
from pithwood.observe.norms import UPDATE_SAMPLE, NormRecorder, part_of
from pithwood.ops.packing import Packing
from pithwood.optim.clip import global_norm

pytestmark = pytest.mark.quick

TRAINING = LayerContext(Packing.from_lengths([6]), None, ledger=LossLedger({"tokens": 6.0}))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x, ctx):
        return x @ self.weight, ctx.carry


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def recorder(width: int = 8, steps: int = 4) -> tuple[dict[str, nn.Parameter], list[Block], NormRecorder]:
    blocks = [Block(width), Block(width)]
    parameters = {f"model.layers.{i}.mlp.weight": block.weight for i, block in enumerate(blocks)}
    parameters["model.norm.weight"] = nn.Parameter(torch.ones(width))
    return parameters, blocks, NormRecorder(parameters, blocks, steps)


def one_step(parameters, blocks, norms, step, lr=0.1, micro_batches=1):
    for param in parameters.values():
        param.grad = None
    width = parameters["model.norm.weight"].numel()
    inputs = []
    for _ in range(micro_batches):
        x = torch.randn(6, width)
        for block in blocks:
            x, _ = block(x, TRAINING)
            inputs.append(x.detach())
        (x * parameters["model.norm.weight"]).square().sum().backward()
    total = norms.before_update()
    with torch.no_grad():
        for param in parameters.values():
            param -= lr * param.grad
    norms.after_update(step)
    return total, inputs


def test_norms_are_those_of_gradients_weights_updates_and_activations():
    parameters, blocks, norms = recorder()
    total, outputs = one_step(parameters, blocks, norms, 1, lr=0.1, micro_batches=2)
    row = norms.rows([1])[1]
    for part, param in (("layers.0.mlp", blocks[0].weight), ("layers.1.mlp", blocks[1].weight)):
        assert row["gradient_norms"][part] == pytest.approx(float(param.grad.norm()))
        assert row["weight_norms"][part] == pytest.approx(float(param.detach().norm()))
        assert row["update_norms"][part] == pytest.approx(0.1 * float(param.grad.norm()), rel=1e-5)
    assert float(total) == float(global_norm([param.grad for param in parameters.values()]))
    for layer in (0, 1):
        largest = max(float(out.square().mean().sqrt()) for out in outputs[layer::2])
        assert row["activation_rms"][f"layers.{layer}"] == pytest.approx(largest)


def test_the_update_of_a_large_weight_is_estimated_within_a_few_percent():
    weight = nn.Parameter(torch.randn(300, 512))
    norms = NormRecorder({"w": weight}, [], 1)
    assert weight.numel() > 30 * UPDATE_SAMPLE
    weight.grad = torch.randn_like(weight)
    norms.before_update()
    with torch.no_grad():
        weight.add_(weight.grad)
    norms.after_update(1)
    assert norms.rows([1])[1]["update_norms"]["w"] == pytest.approx(float(weight.grad.norm()), rel=0.05)


def test_the_ring_holds_the_latest_steps_only():
    parameters, blocks, norms = recorder(steps=3)
    for step in range(1, 6):
        one_step(parameters, blocks, norms, step)
    assert sorted(norms.rows(range(1, 7))) == [3, 4, 5]


def test_a_gradient_that_is_not_finite_shows_where_it_is():
    parameters, _, norms = recorder()
    for param in parameters.values():
        param.grad = torch.ones_like(param)
    parameters["model.layers.1.mlp.weight"].grad[0, 0] = math.nan
    total = norms.before_update()
    norms.after_update(1)
    gradients = norms.rows([1])[1]["gradient_norms"]
    assert math.isnan(float(total))
    assert math.isnan(gradients["layers.1.mlp"])
    assert gradients["layers.0.mlp"] == pytest.approx(8.0)


def test_parameters_without_a_gradient_count_as_zero():
    parameters, _, norms = recorder()
    assert norms.before_update() is None
    parameters["model.norm.weight"].grad = torch.full((8,), 2.0)
    assert float(norms.before_update()) == pytest.approx(math.sqrt(32.0))
    norms.after_update(1)
    gradients = norms.rows([1])[1]["gradient_norms"]
    assert gradients["layers.0.mlp"] == 0.0
    assert gradients["norm"] == pytest.approx(math.sqrt(32.0))


def test_passes_of_validation_second_passes_and_those_after_closing_are_not_measured():
    parameters, blocks, norms = recorder()
    large = torch.full((2, 8), 1e6)
    blocks[0](large, dataclasses.replace(TRAINING, ledger=None))
    blocks[0](large, dataclasses.replace(TRAINING, recomputing=True))
    norms.close()
    blocks[0](large, TRAINING)
    for param in parameters.values():
        param.grad = torch.zeros_like(param)
    norms.before_update()
    norms.after_update(1)
    assert norms.rows([1])[1]["activation_rms"] == {"layers.0": 0.0, "layers.1": 0.0}


def test_a_step_asks_nothing_of_the_device():
    parameters, blocks, norms = recorder()
    with OpNames() as seen:
        one_step(parameters, blocks, norms, 1)
    waits = ("_local_scalar_dense", "nonzero", "aten::item", "_to_copy", "lift_fresh")
    assert not [name for name in seen.names if any(wait in name for wait in waits)]


def test_parts_gather_what_belongs_to_a_layer():
    assert part_of("model.layers.3.self_attn.q_proj.weight") == "layers.3.self_attn"
    assert part_of("model.layers.3.input_layernorm.weight") == "layers.3.self_attn"
    assert part_of("model.layers.3.mlp.experts.down_proj") == "layers.3.mlp"
    assert part_of("model.embed_tokens.weight") == "embed_tokens"
    assert part_of("lm_head.weight") == "lm_head"
