"""Pipelines over NCCL on two GPUs in bf16, against one GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import Batch
from pithwood.losses import LossLedger
from pithwood.models.pipelined import MicroBatch, ModelPipeline
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.objectives import NextToken
from pithwood.ops.master import keep_copies
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig, Schedule
from pithwood.parallel.mesh import Mesh
from pithwood.passes import forward_backward
from tests.numerics import rel_error
from tests.parallel.test_pipeline import divide_experts, scaled_loss
from tests.processes import run_on

pytestmark = pytest.mark.multi_gpu

TOKENS, VOCAB = 512, 512
CFG = Qwen3MoEConfig(
    vocab_size=VOCAB, model_dim=256, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
    attention=(FullAttentionConfig(), MoBAConfig(block_size=64, top_k=2)) * 3,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=128, balance="micro_batch", balance_coef=0.1),
)  # fmt: skip


def batches(count: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for micro in range(count):
        tokens = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        columns = {"tokens": tokens, "targets": tokens.roll(-1), "loss_weight": torch.ones(TOKENS)}
        made.append(Batch(columns, Packing.from_lengths([100 + micro, 0, TOKENS - 100 - micro])).to(device))
    return made


def fresh(device: torch.device) -> Qwen3MoE:
    with device:
        model = Qwen3MoE(CFG)
    model.init_weights(0)
    keep_copies(model.product_weights().values(), torch.bfloat16)
    return model


def errors_on_gpus(mesh: Mesh, count: int, pauses: bool) -> dict[str, float]:
    """Relative errors by parameter, of one GPU's decisions; the second of two equal steps may not make the host wait
    for the device."""
    ledger = LossLedger({"tokens": float(TOKENS * count), "loss": float(TOKENS * count)})
    whole = fresh(mesh.device)
    decisions: list[dict[str, Any]] = []
    for batch in batches(count, mesh.device):
        probe: dict[str, Any] = {}
        forward_backward(whole, NextToken(), batch, ledger, torch.bfloat16, probe=probe)
        decisions.append({name: ids for name, ids in probe.items() if name.endswith((".experts", ".blocks"))})
    model = fresh(mesh.device)
    if pauses:
        divide_experts(model, mesh)
    pipeline = ModelPipeline(model, model, mesh, torch.bfloat16)
    for stage in pipeline.stages.values():
        stage.pauses = pauses
    given = [
        MicroBatch(
            batch.columns["tokens"],
            model.context(batch.packing, replay=replay),
            partial(scaled_loss, model, batch, ledger),
        )
        for batch, replay in zip(batches(count, mesh.device), decisions, strict=True)
    ]
    for watched in (False, not pauses):
        for param in model.parameters():
            param.grad = None
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        for micro in given:
            micro.ctx.ledger = LossLedger(ledger.totals)
        pipeline.run(given)
        torch.cuda.set_sync_debug_mode("default")
    pairs = zip(model.named_parameters(), whole.parameters(), strict=True)
    return {
        name: rel_error(param.grad, wanted.grad)
        for (name, param), wanted in pairs
        if param.grad is not None and wanted.grad is not None
    }


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble_v", "dualpipe_v"])
@pytest.mark.parametrize("pauses", [False, True])
def test_gradients_are_those_of_one_gpu(schedule: Schedule, pauses: bool):
    results = run_on(MeshConfig(pp=2, schedule=schedule), errors_on_gpus, 5, pauses, device="cuda", seconds=300)
    assert {name for result in results for name in result} == {name for name, _ in Qwen3MoE(CFG).named_parameters()}
    assert max(error for result in results for error in result.values()) < (3e-2 if pauses else 1e-2)
