"""Gradients and norms of replicas and shards on two GPUs, through NCCL."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pithwood.optim.config import AdamWConfig
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from tests.observe.test_mesh_norms import norms_on
from tests.parallel.spread import assert_same, steps_on, tiny_run
from tests.processes import run_on

pytestmark = pytest.mark.multi_gpu

MESHES = {
    "replicate": MeshConfig(dp_replicate=2),
    "replicate-anew": MeshConfig(dp_replicate=2, gather="forward", reduce="micro_batch"),
    "shard": MeshConfig(dp_shard=2),
    "ep": MeshConfig(dp_shard=2, ep=2),
}
# in fp32 products differ by their order alone
RUN = replace(tiny_run(precision="fp32", optim=AdamWConfig(eps=1e-5)), device="cuda")


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_are_those_of_one_gpu(name, recompute):
    run = replace(RUN, recompute=recompute)
    alone = steps_on(Mesh.single("cuda"), run, 0, None)
    spread = run_on(MESHES[name], steps_on, replace(run, mesh=MESHES[name]), 0, None, device="cuda")
    assert_same(spread, alone, "gradients", bound=1e-3)


@pytest.mark.parametrize("name", MESHES)
def test_norms_by_part_are_those_of_one_gpu(name):
    alone = norms_on(Mesh.single("cuda"), RUN)
    for rows in run_on(MESHES[name], norms_on, replace(RUN, mesh=MESHES[name]), device="cuda"):
        for step, row in alone.items():
            for kind, norms in row.items():
                assert rows[step][kind] == pytest.approx(norms, rel=1e-3), (step, kind)
