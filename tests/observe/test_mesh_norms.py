"""Norms by part of the model on a mesh: those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pithwood.observe.norms import UPDATE_SAMPLE
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.run import Phase, Run
from pithwood.trainer import Trainer
from tests.parallel.spread import Documents, tiny_run
from tests.processes import run_on

STEPS = 2
KINDS = {"gradient_norms", "weight_norms", "update_norms", "activation_rms"}


def norms_on(mesh: Mesh, run: Run) -> dict[int, dict[str, Any]]:
    """What the log would be told of each step."""
    torch.manual_seed(0)
    trainer = Trainer(run, mesh.device, None, None if mesh.world.size == 1 else mesh)
    source = Documents(run)
    for step in range(STEPS):
        trainer.enter_phase(step)
        trainer.train_step(step, source.step(step, trainer.share))
    return trainer.spikes._norms.rows(range(1, STEPS + 1))


def assert_those_of_one(spread: list[dict[int, dict[str, Any]]], alone: dict[int, dict[str, Any]]) -> None:
    assert sorted(alone) == [1, 2]
    for rows in spread:
        assert sorted(rows) == sorted(alone)
        for step, row in alone.items():
            assert set(row) == KINDS
            for kind in KINDS:
                assert rows[step][kind] == pytest.approx(row[kind], rel=2e-5, abs=1e-9, nan_ok=True), (step, kind)


@pytest.mark.parametrize(
    "cfg",
    [
        MeshConfig(dp_replicate=2, dp_shard=2, ep=2),
        MeshConfig(cp=2, gather="forward", reduce="micro_batch"),
        MeshConfig(pp=2, layers_per_stage=(1, 3)),
        MeshConfig(pp=2, dp_shard=2, ep=2, schedule="dualpipe_v"),
    ],
    ids=["hybrid-ep", "cp-anew", "pp-uneven", "dualpipe-ep"],
)
def test_norms_are_those_of_one_process(cfg):
    samples = 2 if cfg.schedule == "dualpipe_v" else 4
    recompute = "block" if cfg.reduce == "micro_batch" else "none"
    run = tiny_run(samples_per_micro_batch=samples, recompute=recompute)
    assert run.model.vocab_size * run.model.model_dim > UPDATE_SAMPLE, "some update is estimated"
    alone = norms_on(Mesh.single(), run)
    assert {"embed_tokens", "layers.0.self_attn", "layers.3.mlp", "norm", "lm_head"} <= set(alone[1]["update_norms"])
    assert_those_of_one(run_on(cfg, norms_on, replace(run, mesh=cfg)), alone)


@pytest.mark.parametrize("frozen_in", [1, 2])
def test_what_a_phase_freezes_has_no_gradient_then_in_any_process(frozen_in):
    trainable = [("*", "!*.1.mlp.*") if step == frozen_in else ("*",) for step in (1, 2)]
    run = tiny_run(phases=(Phase(until_step=1, trainable=trainable[0]), Phase(until_step=100, trainable=trainable[1])))
    cfg = MeshConfig(dp_shard=2)
    alone = norms_on(Mesh.single(), run)
    frozen, free = (alone[step]["gradient_norms"]["layers.1.mlp"] for step in (frozen_in, 3 - frozen_in))
    assert 0 < frozen < free, "the norm before the feed-forward counts in its part and trains on"
    assert_those_of_one(run_on(cfg, norms_on, replace(run, mesh=cfg)), alone)
