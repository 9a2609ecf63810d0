"""Passes in pairs without a pipeline on two GPUs, in bf16 over NCCL: the gradients of passes one by one, and no wait of
the host."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.losses import LossLedger
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.passes import context_fields, loss_of
from pithwood.run import Run
from pithwood.trainer import Trainer
from tests.numerics import rel_error
from tests.parallel.spread import Documents, _pieces, tiny_run
from tests.processes import run_on

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

TWO = MeshConfig(dp_shard=2, ep=2, overlap="pairs")


def run_of(cfg: MeshConfig) -> Run:
    """Four micro-batches of two samples of 512 tokens."""
    run = tiny_run(
        {"attention": (FullAttentionConfig(), MoBAConfig(block_size=64, top_k=2)) * 2},
        {"expert_dim": 128, "num_shared_experts": 1, "balance": "micro_batch", "balance_coef": 0.1},
        seq_len=512, samples_per_micro_batch=2, mesh=cfg, precision="bf16",
    )  # fmt: skip
    sizes = {"model_dim": 256, "head_dim": 64, "dense_dim": 128, "init_std": 0.02}
    return replace(run, model=replace(run.model, **sizes))


def gradients_on_gpus(mesh: Mesh, run: Run) -> dict[str, Any]:
    """This process's pieces of the gradients; in a second, equal step the passes may not wait for the device."""
    trainer = Trainer(run, mesh.device, None, mesh)
    assert trainer.part is not None
    here = trainer.local(Documents(run).step(0, trainer.share))
    # kernels are compiled and the processes meet in a step of their own, whose buffers become large enough
    trainer.gradients(0, here)
    found = _pieces(trainer, gradients=True)
    trainer.optimizer.zero_grad()
    if trainer.pipeline is None:
        return found
    objective = run.phase(0).objective
    ledger = LossLedger({"tokens": 4096.0, "loss": 4096.0})
    fields = context_fields(ledger, [None] * 4, [None] * 4)
    given = [
        trainer._micro_batch(local, partial(loss_of, trainer.model, objective, local.batch, ledger), field)
        for local, field in zip(here, fields, strict=True)
    ]
    trainer.part.begin_step(len(here))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.pipeline.run(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.part.shards.finish_step()
    return found


@pytest.mark.parametrize("cfg", [TWO, replace(TWO, gather="forward", reduce="micro_batch")], ids=["step", "anew"])
def test_gradients_are_those_of_passes_one_by_one(cfg: MeshConfig):
    plain = replace(cfg, overlap="none")
    paired, one = (run_on(each, gradients_on_gpus, run_of(each), device="cuda", seconds=300) for each in (cfg, plain))
    for found, wanted in zip(paired, one, strict=True):
        assert found.keys() == wanted.keys()
        for name, (start, values) in found.items():
            assert start == wanted[name][0]
            assert rel_error(values, wanted[name][1]) < 1e-2, name
