"""Experts divided between two GPUs, in bf16 over NCCL: values, gradients, and a bounded exchange that never syncs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import LayerContext
from pithwood.losses import LossLedger
from pithwood.moe import MoEConfig, MoELayer
from pithwood.moe.layer import step_counts
from pithwood.ops.master import keep_copies
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.expert import ExpertExchange
from pithwood.parallel.mesh import Mesh
from tests.moe.helpers import filled
from tests.numerics import assert_close
from tests.processes import run_on

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

DIM, WIDTH, EXPERTS, SLOTS, TOKENS = 256, 128, 16, 4, 700
"""Tokens of each process."""
TWO = MeshConfig(dp_shard=2, ep=2)


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, pull_TD, ids_Tk) of both processes."""
    generator = torch.Generator().manual_seed(0)
    x_TD, pull_TD = torch.randn(2, 2 * TOKENS, DIM, generator=generator).bfloat16().unbind()
    ids_Tk = torch.rand(2 * TOKENS, EXPERTS, generator=generator).topk(SLOTS).indices
    if case == "some_none":
        ids_Tk[torch.rand(ids_Tk.shape, generator=generator) < 0.3] = -1
    if case == "one_process":
        ids_Tk = torch.rand(2 * TOKENS, EXPERTS // 2, generator=generator).topk(SLOTS).indices
    return x_TD, pull_TD, ids_Tk


def run(layer: MoELayer, mesh: Mesh, case: str, dtype: torch.dtype, mine: slice) -> dict[str, Tensor]:
    device = mesh.device
    x_TD, pull_TD, ids_Tk = (value[mine].to(device) for value in inputs(case))
    x_TD = x_TD.to(dtype).requires_grad_()
    packing = Packing.from_lengths([x_TD.shape[0]]).to(device)
    ledger = LossLedger({"tokens": 2.0 * TOKENS})
    layer.zero_grad()
    layer.reset_step()
    ctx = LayerContext(packing, None, ledger=ledger, replay={"layers.0.experts": ids_Tk})
    out_TD = layer(x_TD, ctx)
    out_TD.backward(pull_TD.to(dtype))
    assert x_TD.grad is not None
    found = {"out": out_TD.detach(), "x.grad": x_TD.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def job(mesh: Mesh, how: Any, case: str, cfg: MoEConfig, watched: bool) -> tuple[dict[str, Tensor], list[float]]:
    exchange = ExpertExchange(mesh.ep, EXPERTS, how, room=4.0, device=mesh.device)
    state = filled(MoELayer(cfg, DIM), std=0.06).state_dict()
    some = slice(exchange.first_expert, exchange.first_expert + exchange.experts_here)
    state |= {name: value[some] for name, value in state.items() if name.startswith("experts.")}
    layer = MoELayer(cfg, DIM, exchange)
    layer.load_state_dict(state)
    layer.to(mesh.device)
    layer.gate.tokens_group = mesh.tokens
    keep_copies(layer.experts.parameters(), torch.bfloat16)
    mine = slice(mesh.tokens.rank * TOKENS, (mesh.tokens.rank + 1) * TOKENS)
    given = [value[mine].to(mesh.device) for value in inputs(case)]
    for last in (False, True):
        # kernels are compiled and the processes meet in a pass of their own
        if watched and last:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            exchange.reset_step()
            layer.zero_grad()
            moe_pass(layer, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = run(layer, mesh, case, torch.bfloat16, mine)
    for name, value in found.items():
        if "grad" not in name and not name.startswith(("out", "experts.")):
            mesh.tokens.all_reduce(value)
    found["counts"] = step_counts([layer])[0]
    return {name: value.cpu() for name, value in found.items()}, exchange.fullness.tolist()


def moe_pass(layer: MoELayer, x_TD: Tensor, pull_TD: Tensor, ids_Tk: Tensor) -> None:
    """Forward and backward of what stands between the router and the block's output."""
    weight_Tk = torch.full(ids_Tk.shape, 0.3, device=x_TD.device, requires_grad=True)
    layer.mix(x_TD.detach().requires_grad_(), ids_Tk, weight_Tk, pull_TD).backward(pull_TD)


@pytest.mark.parametrize("how", ["exact", "bounded"])
@pytest.mark.parametrize("case", ["plain", "some_none", "one_process"])
@pytest.mark.parametrize("fields", [{}, {"chunk_tokens": 256}, {"save_rows": False, "num_shared_experts": 1}])
def test_two_gpus_give_what_fp64_gives_on_one_cpu(how: str, case: str, fields: dict[str, Any]) -> None:
    cfg = MoEConfig(EXPERTS, SLOTS, WIDTH, balance="micro_batch", balance_coef=0.05, z_loss_coef=1e-3, **fields)
    exact = filled(MoELayer(cfg, DIM), std=0.06).double()
    assert isinstance(exact, MoELayer)
    wants = run(exact, Mesh.single(), case, torch.float64, slice(None))
    wants["counts"] = exact.counts_E
    results = run_on(TWO, job, how, case, cfg, how == "bounded", device="cuda")
    assert all(max(fullness) <= 1 for _, fullness in results)
    for name, want in wants.items():
        parts = [found[name] for found, _ in results]
        together = name in ("out", "x.grad") or name.startswith("experts.")
        value = torch.cat(parts) if together else parts[0]
        if name == "counts":
            assert torch.equal(value, want)
        else:
            assert_close(value, want, 2e-2, name)


def overflowing(mesh: Mesh) -> tuple[list[float], list[float], bool]:
    """How full buffers were that are too small, and after they grew."""
    exchange = ExpertExchange(mesh.ep, EXPERTS, "bounded", device=mesh.device)
    exchange.rooms = [0.3, 0.3]
    layer = MoELayer(MoEConfig(EXPERTS, SLOTS, WIDTH), DIM, exchange)
    filled(layer, std=0.06).to(mesh.device)
    given = [value[mesh.rank * TOKENS : (mesh.rank + 1) * TOKENS].to(mesh.device) for value in inputs("plain")]
    found: list[list[float]] = []
    fine = True
    while not found or max(found[-1]) > 1:
        exchange.reset_step()
        layer.zero_grad()
        moe_pass(layer, *given)
        full = exchange.fullness
        mesh.world.all_reduce(full, "max")
        found.append(full.tolist())
        exchange.grow(found[-1])
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None
            fine &= bool(torch.isfinite(parameter.grad).all())
    return found[0], found[-1], fine


def test_an_overflow_is_seen_on_the_device_and_buffers_grow() -> None:
    results = run_on(TWO, overflowing, device="cuda")
    for first, last, fine in results:
        assert max(first) > 1 >= max(last)
        assert fine
