"""The layer on a GPU, in bf16, by kernels: against the plain torch formulation, without host syncs, in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pithwood.attention.base import LayerContext
from pithwood.models.recompute import recomputed
from pithwood.moe import MoEConfig, MoELayer
from pithwood.ops.grouped_mm import grouped_grad_weight
from pithwood.ops.master import keep_copies
from pithwood.ops.permute import plan_rows
from tests.moe.helpers import context, filled
from tests.numerics import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

DIM, WIDTH, EXPERTS, SLOTS = 256, 128, 16, 4
BALANCE: dict[str, Any] = {"balance": "global_batch", "balance_coef": 0.05, "z_loss_coef": 1e-3}


def make(**fields: Any) -> MoELayer:
    layer = filled(MoELayer(MoEConfig(EXPERTS, SLOTS, WIDTH, **fields), DIM), std=0.06).cuda()
    assert isinstance(layer, MoELayer)
    keep_copies(layer.experts.parameters(), torch.bfloat16)
    return layer


def routed(case: str, tokens: int = 700) -> Tensor:
    ids_Tk = torch.rand(tokens, EXPERTS).topk(SLOTS).indices
    if case == "some_none":
        ids_Tk[torch.rand(ids_Tk.shape) < 0.3] = -1
    if case == "none_at_all":
        ids_Tk.fill_(-1)
    if case == "few_experts":
        ids_Tk = torch.rand(tokens, SLOTS).topk(SLOTS).indices
    return ids_Tk.cuda()


class AsBlock(nn.Module):
    """A layer in the form of a block."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layer(x_TD, ctx), ctx.carry


def run(
    layer: MoELayer,
    x_TD: Tensor,
    ids_Tk: Tensor,
    pull_TD: Tensor,
    device: str,
    dtype: torch.dtype,
    again: bool = False,
) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters, with ids replayed; again: as a recomputed block."""
    layer = layer.to(device)
    x_TD = x_TD.detach().to(device, dtype).requires_grad_()
    ctx = context([300, len(x_TD) - 300], tokens=len(x_TD), replay={"layers.0.experts": ids_Tk.to(device)})
    ctx.packing = ctx.packing.to(device)
    layer.zero_grad()
    layer.reset_step()
    out_TD = recomputed(AsBlock(layer), x_TD, ctx)[0] if again else layer(x_TD, ctx)
    out_TD.backward(pull_TD.to(device, dtype))
    grads = [x_TD.grad, *(p.grad for p in layer.parameters())]
    assert all(grad is not None for grad in grads)
    return [out_TD.detach(), *(grad.clone() for grad in grads if grad is not None)]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", ["plain", "some_none", "few_experts", "none_at_all"])
@pytest.mark.parametrize("fields", [{}, {"save_rows": False}, {"chunk_tokens": 256}, {"score": "sigmoid", **BALANCE}])
def test_values_and_gradients_are_those_of_fp64_on_the_cpu(fields: dict[str, Any], case: str, again: bool) -> None:
    ids_Tk = routed(case)
    x_TD, pull_TD = torch.randn(700, DIM).bfloat16(), torch.randn(700, DIM).bfloat16()
    found = run(make(**fields), x_TD, ids_Tk, pull_TD, "cuda", torch.bfloat16, again)
    exact = make(**{**fields, "chunk_tokens": 0}).cpu().double()
    wants = run(exact, x_TD, ids_Tk, pull_TD, "cpu", torch.float64)
    for value, want in zip(found, wants, strict=True):
        assert value.dtype == (torch.bfloat16 if value.shape == x_TD.shape else torch.float32)
        if want.norm() == 0:
            assert value.norm() == 0
        else:
            assert_close(value, want, 2e-2)


def test_the_router_chooses_as_fp64_but_for_near_ties() -> None:
    layer = make()
    x_TD = torch.randn(4000, DIM, device="cuda").bfloat16()
    ids_Tk = layer.gate.select(layer.gate.logits(x_TD))
    score_TE = (x_TD.double() @ layer.gate.weight.double().t()).softmax(-1)
    worst = score_TE.gather(1, ids_Tk).amin(-1)
    best_left = score_TE.scatter(1, ids_Tk, -1.0).amax(-1)
    assert (best_left - worst).max() < 1e-6


@pytest.mark.parametrize("chunk_tokens", [0, 256])
def test_a_pass_that_nobody_reads_changes_no_bit_of_the_gradients(chunk_tokens: int) -> None:
    x_TD, pull_TD, ids_Tk = torch.randn(700, DIM).bfloat16(), torch.randn(700, DIM).bfloat16(), routed("some_none")
    passes = [
        run(make(chunk_tokens=chunk_tokens), x_TD, ids_Tk, pull_TD, "cuda", torch.bfloat16, again)
        for again in (False, True)
    ]
    assert all(torch.equal(plain, other) for plain, other in zip(*passes, strict=True))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("fields", [{}, BALANCE, {"balance": "sequence", "balance_coef": 0.05}, {"chunk_tokens": 256}])
def test_nothing_waits_for_the_host(fields: dict[str, Any], again: bool) -> None:
    layer = make(**fields)
    x_TD = torch.randn(700, DIM, device="cuda").bfloat16().requires_grad_()
    ctx = context([300, 400], tokens=700)
    ctx.packing = ctx.packing.to("cuda")

    def step() -> None:
        out_TD = recomputed(AsBlock(layer), x_TD, ctx)[0] if again else layer(x_TD, ctx)
        out_TD.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_layer_follows_its_ids() -> None:
    layer = make()
    x_TD = torch.randn(700, DIM, device="cuda").bfloat16()
    weight_Tk = torch.rand(700, SLOTS, device="cuda")
    ids_Tk, others_Tk = routed("plain"), routed("some_none")
    wants = [layer.mix(x_TD, ids, weight_Tk, x_TD) for ids in (ids_Tk, others_Tk)]
    held_Tk = ids_Tk.clone()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.mix(x_TD, held_Tk, weight_Tk, x_TD)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TD = layer.mix(x_TD, held_Tk, weight_Tk, x_TD)
    for ids, want in zip((ids_Tk, others_Tk), wants, strict=True):
        held_Tk.copy_(ids)
        graph.replay()
        assert torch.equal(out_TD, want)


def test_the_same_input_gives_the_same_bits() -> None:
    layer = make(**BALANCE)
    x_TD, pull_TD = torch.randn(700, DIM).bfloat16(), torch.randn(700, DIM).bfloat16()
    ids_Tk = routed("plain")
    first, again = (run(layer, x_TD, ids_Tk, pull_TD, "cuda", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [131_072])
def test_a_workloads_plan_and_weight_gradient(rows: int) -> None:
    ids_Tk = torch.rand(rows // 8, 128, device="cuda").topk(8).indices
    plan = plan_rows(ids_Tk, 128, impl="triton")
    want = plan_rows(ids_Tk, 128, impl="ref")
    for name in ("offsets", "row_Tk", "pair_R", "token_R"):
        assert torch.equal(getattr(plan, name), getattr(want, name))
    grad_RX = torch.randn(rows, 128, device="cuda").bfloat16()
    rows_RD = torch.randn(rows, 256, device="cuda").bfloat16()
    out = torch.zeros(128, 128, 256, device="cuda")
    for times in (1.0, 2.0):
        grouped_grad_weight(grad_RX, rows_RD, plan.offsets, out, add=True)
        for e in (0, 77, 127):
            mine = slice(int(plan.offsets[e]), int(plan.offsets[e + 1]))
            assert_close(out[e], times * grad_RX[mine].double().t() @ rows_RD[mine].double(), 1e-5)
