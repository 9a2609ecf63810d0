"""Context parallelism against one process: outputs, gradients of inputs and weights, whatever the documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.data.batches import Batch, cut_batch
from pithwood.ops.packing import Packing
from pithwood.ops.summarise import summarise
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.context import (
    ContextGroup,
    decisions_in_context,
    from_zigzag,
    gather_block_means,
    halo,
    local_packing,
    prefix_scan,
    to_zigzag,
)
from pithwood.parallel.mesh import Group, Mesh
from tests.attention.builders import SHAPE, context, hidden, make_mixer
from tests.numerics import assert_close
from tests.processes import run_on


GQA = replace(SHAPE, num_heads=8, num_kv_heads=4)
CROSSING = [21, 0, 1, 40, 13, 0, 5]
"""80 tokens: with 2 and with 4 processes documents cross boundaries, several lie on one, some are empty."""
MIXERS: dict[str, MixerConfig] = {
    "full": FullAttentionConfig(),
    "full, keys convolved": FullAttentionConfig(key_conv=3),
    "window": SlidingWindowConfig(window=7),
    "window beyond a process": SlidingWindowConfig(window=50, key_conv=5),
    "moba": MoBAConfig(block_size=6, top_k=3, key_conv=3),
    "moba per KV head": MoBAConfig(block_size=16, top_k=2, route_per="kv_group", mean_dtype="fp32"),
}


def of_one(config: MixerConfig, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Output, gradients and decisions of one process."""
    mixer, x_TD = make_mixer(config, shape=GQA), hidden(sum(lengths)).requires_grad_()
    decisions: dict[str, Any] = {}
    y_TD = mixer(x_TD, context(Packing.from_lengths(lengths), probe=decisions)).y_TD
    y_TD.backward(hidden(len(y_TD), seed=99))
    grads = {name: param.grad for name, param in mixer.named_parameters()}
    assert x_TD.grad is not None
    return y_TD.detach(), {"x": x_TD.grad, **grads}, decisions


def of_a_part(
    mesh: Mesh, config: MixerConfig, lengths: list[int], how: Any, decisions: dict[str, Any] | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """The same of this process's tokens."""
    whole = Packing.from_lengths(lengths)
    columns = {"x": hidden(sum(lengths)), "grad": hidden(sum(lengths), seed=99)}
    batch, _ = cut_batch(Batch(columns, whole), mesh.cp.rank, mesh.cp.size)
    cp = ContextGroup.of(mesh.cp, whole, how)
    assert cp is not None
    mixer, x_TD = make_mixer(config, shape=GQA), batch.columns["x"].clone().requires_grad_()
    probe: dict[str, Any] = {}
    replay = None if decisions is None else decisions_in_context(decisions, cp, GQA.num_kv_heads)
    y_TD = mixer(x_TD, context(batch.packing, cp=cp, replay=replay, probe=probe)).y_TD
    y_TD.backward(batch.columns["grad"])
    grads = {name: param.grad for name, param in mixer.named_parameters()}
    assert x_TD.grad is not None
    return y_TD.detach(), {"x": x_TD.grad, **grads}, probe


def assert_equals_one_process(size: int, config: MixerConfig, lengths: list[int], how: str, replay: bool) -> None:
    y_TD, grads, decisions = of_one(config, lengths)
    parts = run_on(MeshConfig(cp=size), of_a_part, config, lengths, how, decisions if replay else None)
    assert_close(torch.cat([y for y, _, _ in parts]), y_TD, 1e-5, "output")
    assert_close(torch.cat([found["x"] for _, found, _ in parts]), grads.pop("x"), 1e-5, "x")
    for name, grad in grads.items():
        assert_close(torch.stack([found[name] for _, found, _ in parts]).sum(0), grad, 1e-5, name)


@pytest.mark.parametrize("how", ["heads", "gather"])
@pytest.mark.parametrize("name", MIXERS)
def test_two_processes_equal_one(name, how):
    assert_equals_one_process(2, MIXERS[name], CROSSING, how, replay=True)


@pytest.mark.parametrize(
    ("name", "how"), [("full, keys convolved", "gather"), ("window", "auto"), ("moba", "heads"), ("moba", "gather")]
)
def test_four_processes_equal_one(name, how):
    assert_equals_one_process(4, MIXERS[name], CROSSING, how, replay=True)


@pytest.mark.parametrize("name", ["full, keys convolved", "window", "moba"])
@pytest.mark.parametrize("lengths", [[80], [20, 20, 20, 20], [13, 27, 0, 40]])
def test_documents_of_any_kind_equal_one_process(name, lengths):
    assert_equals_one_process(2, MIXERS[name], lengths, "auto", replay=False)
