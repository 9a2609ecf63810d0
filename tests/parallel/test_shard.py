"""Weights divided between processes: the same initial values and gradients as in one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.optim.config import AdamWConfig
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.run import Phase, Run
from pithwood.trainer import Trainer
from tests.parallel.spread import Documents, assert_same, steps_on, tiny_run
from tests.processes import run_on

ANEW = {"gather": "forward", "reduce": "micro_batch"}


@pytest.mark.parametrize(
    "cfg",
    [
        MeshConfig(dp_shard=2),
        MeshConfig(dp_replicate=2),
        MeshConfig(dp_shard=2, **ANEW),
        MeshConfig(dp_replicate=2, **ANEW),
        MeshConfig(dp_replicate=2, dp_shard=2, **ANEW),
    ],
    ids=["shard", "replicate", "gathered-anew", "replicate-anew", "hybrid-anew"],
)
def test_gradients_are_those_of_one_process(cfg):
    run = (
        tiny_run(moe={"balance": "none", "balance_coef": 0.0}, recompute="block", optim=AdamWConfig())
        if cfg.gather == "forward"
        else tiny_run(moe={"balance": "none", "balance_coef": 0.0}, optim=AdamWConfig())
    )
    spread = run_on(cfg, steps_on, replace(run, mesh=cfg), 0, None)
    alone = steps_on(Mesh.single(), run, 0, None)
    for kind in ("initial", "gradients"):
        assert_same(spread, alone, kind)
    for result in spread:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)


REPLICATE, HYBRID = MeshConfig(dp_replicate=2), MeshConfig(dp_replicate=2, dp_shard=2, reduce="micro_batch")
FROZEN = ("*", "!*embed*", "!model.layers.0.*", "!*.2.self_attn.*")


@pytest.mark.parametrize(
    ("routing", "trainable", "cfg"),
    [
        pytest.param("balanced", ("*",), REPLICATE, id="router-without-gradient-replicate"),
        pytest.param("balanced", ("*",), HYBRID, id="router-without-gradient-hybrid", marks=pytest.mark.slow),
        pytest.param("learned", FROZEN, REPLICATE, id="frozen-from-below-replicate", marks=pytest.mark.slow),
        pytest.param("learned", FROZEN, HYBRID, id="frozen-from-below-hybrid"),
    ],
)
def test_weights_without_gradient_are_those_of_one_process(cfg, routing, trainable):
    moe = {"balance": "none", "balance_coef": 0.0, "routing": routing}
    run = tiny_run(moe=moe, phases=(Phase(until_step=100, trainable=trainable),))
    spread = run_on(cfg, steps_on, replace(run, mesh=cfg), 2, "run")
    alone = steps_on(Mesh.single(), run, 2, "run")
    for kind in ("gradients", "last"):
        assert_same(spread, alone, kind)


def exchanges_before_the_end(mesh: Mesh, run: Run) -> tuple[int, int]:
    """How many exchanges between replicas begin before the last backward pass reaches the embedding, and in all."""
    trainer = Trainer(run, mesh.device, None, mesh)
    here = trainer.local(Documents(run).step(0, trainer.share))
    # not torch.profiler, which imports the compiler in every process
    with torch.autograd.profiler.profile() as profile:
        trainer.gradients(0, here)
    found = sorted(profile.function_events, key=lambda event: event.time_range.start)
    names = [event.name for event in found if event.name in ("EmbeddingBackward0", "c10d::allreduce_coalesced_")]
    ends = [place for place, name in enumerate(names) if name == "EmbeddingBackward0"]
    assert len(ends) == len(here)
    return ends[-1] - (len(here) - 1), len(names) - len(ends)


@pytest.mark.parametrize(
    ("cfg", "before"),
    [(REPLICATE, 4), (HYBRID, 3)],
    ids=["all-four-blocks", "but-for-the-one-being-scattered"],
)
def test_replicas_add_up_their_gradients_beside_the_backward_pass(cfg, before):
    run = tiny_run(mesh=cfg)
    # the blocks' in one exchange each; then the ends' and what every process holds whole
    assert run_on(cfg, exchanges_before_the_end, run) == [(before, 5)] * cfg.size
