"""A whole model whose tokens are divided between processes: losses and raw gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.data.batches import Batch, cut_batch
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.models.recompute import ActivationPlan
from pithwood.moe.config import MoEConfig
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.context import ContextGroup, decisions_in_context
from pithwood.parallel.mesh import Mesh
from tests.numerics import assert_close
from tests.processes import run_on
from tests.toy_mixer import ToyRecurrenceConfig

CFG = Qwen3MoEConfig(
    vocab_size=97, model_dim=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    attention=(
        MoBAConfig(block_size=8, top_k=2, key_conv=3), ToyRecurrenceConfig(gate_coef=0.0),
        SlidingWindowConfig(window=11), FullAttentionConfig(),
    ),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=24), dense_layers=(2,), dense_dim=40, rope_theta=10_000.0,
    init_std=0.2,
)  # fmt: skip
LENGTHS = [13, 30, 0, 3, 50]
Result = tuple[Tensor, dict[str, Tensor], dict[str, Any]]


def whole_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (96,), generator=generator)
    weight = (torch.rand(96, generator=generator) > 0.4).float()
    columns = {"tokens": tokens, "targets": tokens.roll(-1), "loss_weight": weight}
    return Batch(columns, Packing.from_lengths(LENGTHS))


def run(batch: Batch, recompute: Any, cp: ContextGroup | None, replay: dict[str, Any] | None) -> Result:
    """(summed loss, gradients, decisions) of one batch, or of a part of one."""
    model = Qwen3MoE(CFG)
    model.init_weights(0)
    model.keep_activations(ActivationPlan((recompute,) * CFG.num_layers))
    columns, probe = batch.columns, {}
    hidden_TD = model.hidden(columns["tokens"], batch.packing, replay=replay, probe=probe, cp=cp)
    loss = model.nll_sum(hidden_TD, columns["targets"], columns["loss_weight"])
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters()}, probe


def run_part(mesh: Mesh, how: Any, recompute: Any, decisions: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    batch, whole = cut_batch(whole_batch(), mesh.cp.rank, mesh.cp.size)
    cp = ContextGroup.of(mesh.cp, whole, how)
    assert cp is not None
    loss, grads, _ = run(batch, recompute, cp, decisions_in_context(decisions, cp, CFG.num_kv_heads))
    return loss, grads


@pytest.mark.parametrize(
    ("size", "how", "recompute"),
    [
        (2, "heads", "none"),
        (2, "gather", "block"),
        (2, "heads", "block"),
        (2, "heads", "selective"),
        (2, "ring", "block"),
        (4, "auto", "none"),
        (4, "ring", "selective"),
    ],
)
def test_losses_and_raw_gradients_equal_one_process(size, how, recompute):
    loss, grads, decisions = run(whole_batch(), "none", None, None)
    parts = run_on(MeshConfig(cp=size), run_part, how, recompute, decisions)
    assert_close(torch.stack([part for part, _ in parts]).sum(), loss, 1e-6, "loss")
    for name, grad in grads.items():
        assert_close(torch.stack([found[name] for _, found in parts]).sum(0), grad, 1e-5, name)
