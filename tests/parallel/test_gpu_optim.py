"""The optimizer on two GPUs, through NCCL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pithwood.ops.master import keep_copies
from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.optim.groups import ParamRole
from pithwood.optim.layout import Place
from pithwood.optim.optimizer import Optimizer
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece
from tests.numerics import assert_close
from tests.parallel.test_optim import CONFIGS, MESHES, check_three_steps, on_mesh, take
from tests.processes import run_on

pytestmark = pytest.mark.multi_gpu

TWO = [name for name, cfg in MESHES.items() if cfg.size == 2]
BIG = {"q": (1024, 512), "k": (128, 512), "o": (512, 1024), "stack": (5, 256, 512)}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mesh", TWO)
def test_three_steps_equal_one_process(mesh, kind):
    check_three_steps(MESHES[mesh], CONFIGS[kind], "cuda")


def big_steps(mesh: Mesh, cfg: MuonConfig) -> dict[str, torch.Tensor]:
    """Three steps with copies in bf16; the process's pieces of the weights, which the copies must equal."""
    place, generator = Place.on(mesh), torch.Generator().manual_seed(0)
    params: dict[str, Any] = {}
    pieces, grads = {}, {}
    for name, shape in BIG.items():
        whole, pieces[name] = torch.randn(shape, generator=generator), Piece.whole(shape).part(place.fold, place.folds)
        grad = torch.randn(shape, generator=generator)
        mine = slice(pieces[name].start, pieces[name].stop)
        params[name] = torch.nn.Parameter(whole.reshape(-1)[mine].to(mesh.device))
        grads[name] = grad.reshape(-1)[mine].to(mesh.device)
    roles = {name: ParamRole("matrix") for name in BIG}
    optimizer = Optimizer(cfg, params, roles, 3, mesh=mesh, pieces=pieces)
    keep_copies(params.values(), torch.bfloat16)
    for step in range(3):
        for name, param in params.items():
            param.grad = grads[name] * (1 + step)
        optimizer.step(step)
    for param in params.values():
        copy, version = param.kept_copy
        assert version == param._version
        assert torch.equal(copy, param.detach().bfloat16())
    return {name: param.detach().cpu() for name, param in params.items()}


@pytest.mark.parametrize("mesh", ["dp_shard", "dp_replicate"])
@pytest.mark.parametrize("ns_dtype", ["fp32", "bf16"])
def test_kernels_on_pieces_move_weights_as_on_one_gpu(mesh, ns_dtype):
    cfg = MuonConfig(lr=0.02, ns_dtype=ns_dtype, weight_decay=0.0)
    expected = big_steps(Mesh.single("cuda"), cfg)
    results = run_on(MESHES[mesh], big_steps, cfg, device="cuda")
    start = big_steps(Mesh.single("cuda"), replace(cfg, lr=0.0))
    for name, value in expected.items():
        whole = torch.cat([result[name] for result in results])[: value.numel()]
        # in bf16 batches of other sizes go through other kernels, each as far from the exact result
        tol = 1e-5 if ns_dtype == "fp32" else 3e-2
        assert_close(whole - start[name], value - start[name], tol=tol, what=name)


def without_waiting(mesh: Mesh, cfg: Any) -> bool:
    optimizer, pieces = on_mesh(mesh, cfg)
    for step in range(2):
        take(optimizer, pieces, step)
    for param in optimizer.params.values():
        param.grad = torch.ones_like(param)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = optimizer.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return metrics["skipped"].item() == 0.0


@pytest.mark.parametrize("mesh", TWO)
@pytest.mark.parametrize("cfg", [MuonConfig(), MuonConfig(offload_state=True), AdamWConfig()])
def test_a_step_never_waits_for_the_device(mesh, cfg):
    assert all(run_on(MESHES[mesh], without_waiting, cfg, device="cuda"))
