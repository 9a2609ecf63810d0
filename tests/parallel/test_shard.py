"""Weights divided between processes: the same initial values and gradients as in one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pithwood.optim.config import AdamWConfig
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from tests.parallel.spread import assert_same, steps_on, tiny_run
from tests.processes import run_on


@pytest.mark.parametrize(
    "cfg",
    [
        MeshConfig(dp_shard=2),
        MeshConfig(dp_replicate=2),
        MeshConfig(dp_shard=2, gather="forward", reduce="micro_batch"),
    ],
    ids=["shard", "replicate", "gathered-anew"],
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
