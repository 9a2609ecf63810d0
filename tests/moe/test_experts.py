"""The experts' own backward pass: where gradients go, what is kept, chunks, and all stages by kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.losses import LossLedger, attach_loss
from pithwood.moe import MoELayer
from pithwood.moe.balance import balance_loss
from pithwood.moe.dispatch import combine_tokens
from pithwood.ops.grouped_mm import grouped_mm
from pithwood.ops.master import Deferred, deferred_gradients, keep_copies, run_deferred
from pithwood.ops.permute import gather_rows, plan_rows, row_weights, sum_rows
from pithwood.ops.route import expert_weights, select_experts
from pithwood.ops.swiglu import swiglu
from tests.moe.helpers import context, dispatched, make_layer
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_MARKS


def layer_and_input(**fields: Any) -> tuple[MoELayer, Tensor]:
    layer = make_layer(12, num_experts=6, top_k=3, expert_dim=5, balance="micro_batch", balance_coef=0.1, **fields)
    return layer, torch.randn(23, 12, dtype=torch.float64)


def gradients(layer: MoELayer, x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of the input and all parameters, as `backward` leaves them."""
    x_TD = x_TD.clone().requires_grad_()
    layer.zero_grad()
    layer.reset_step()
    out = layer(x_TD, context([23], tokens=23))
    out.square().sum().backward()
    grads = [x_TD.grad, *(p.grad for p in layer.parameters())]
    assert all(grad is not None for grad in grads)
    return out.detach(), [grad.clone() for grad in grads if grad is not None]


def test_backward_adds_to_gradients_what_grad_returns() -> None:
    layer, x_TD = layer_and_input()
    parameters = list(layer.parameters())
    layer.reset_step()
    returned = torch.autograd.grad(layer(x_TD, context([23], tokens=23)).square().sum(), parameters)
    assert all(p.grad is None for p in parameters)
    for times in (1, 2):
        layer.reset_step()
        layer(x_TD, context([23], tokens=23)).square().sum().backward()
        for parameter, grad in zip(parameters, returned, strict=True):
            assert parameter.grad is not None
            assert_close(parameter.grad, times * grad)


@pytest.mark.parametrize("save_rows", [False, True])
def test_gradients_of_the_stacked_weights_can_wait_until_after_the_backward_pass(save_rows: bool) -> None:
    layer, x_TD = layer_and_input(save_rows=save_rows)
    _, want = gradients(layer, x_TD)
    x_TD = x_TD.clone().requires_grad_()
    layer.zero_grad()
    layer.reset_step()
    queue: Deferred = []
    with deferred_gradients(queue):
        layer(x_TD, context([23], tokens=23)).square().sum().backward()
    assert x_TD.grad is not None
    assert_close(x_TD.grad, want[0])
    assert all(p.grad is None for p in layer.experts.parameters())
    run_deferred(queue)
    for grad, expected in zip((p.grad for p in layer.parameters()), want[1:], strict=True):
        assert grad is not None
        assert_close(grad, expected)


def test_a_gradient_is_added_to_the_memory_that_is_there() -> None:
    layer, x_TD = layer_and_input()
    layer(x_TD, context([23])).sum().backward()
    before = {name: (p.grad, p.grad.data_ptr()) for name, p in layer.experts.named_parameters() if p.grad is not None}
    layer(x_TD, context([23])).sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is before[name][0]
        assert parameter.grad.data_ptr() == before[name][1]


def test_frozen_weights_get_no_gradient_and_others_the_same() -> None:
    layer, x_TD = layer_and_input()
    _, want = gradients(layer, x_TD)
    layer.experts.gate_up_proj.requires_grad_(False)
    layer.zero_grad()
    layer.reset_step()
    layer(x_TD, context([23], tokens=23)).square().sum().backward()
    assert layer.experts.gate_up_proj.grad is None
    assert layer.experts.down_proj.grad is not None
    assert_close(layer.experts.down_proj.grad, want[-1])


@pytest.mark.parametrize(
    "fields",
    [
        {"save_rows": False},
        {"chunk_tokens": 7},
        {"chunk_tokens": 7, "chunk_recompute": False},
        {"chunk_tokens": 7, "chunk_recompute": False, "save_rows": False},
        {"chunk_tokens": 1, "save_rows": False},
        {"chunk_tokens": 23},
    ],
)
def test_ways_to_save_memory_change_nothing(fields: dict[str, Any]) -> None:
    plain, x_TD = layer_and_input()
    thrifty, _ = layer_and_input(**fields)
    (want, wants), (out, grads) = gradients(plain, x_TD), gradients(thrifty, x_TD)
    assert_close(out, want)
    for grad, expected in zip(grads, wants, strict=True):
        assert_close(grad, expected)


@contextmanager
def saved_sizes() -> Iterator[list[int]]:
    """Elements of every tensor that the graph keeps inside."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


@pytest.mark.parametrize("save_rows", [True, False])
def test_what_the_experts_keep(save_rows: bool) -> None:
    layer = make_layer(12, num_experts=6, top_k=3, expert_dim=5)
    x_TD = torch.randn(23, 12, dtype=torch.float64, requires_grad=True)
    ids_Tk = torch.randint(6, (23, 3))
    rows_RD, weight_R, plan = dispatched(x_TD, ids_Tk, torch.rand(23, 3).double(), 6)
    with saved_sizes() as sizes:
        source = None if save_rows else (x_TD, plan)
        combine_tokens(layer.experts(rows_RD, plan.offsets, weight_R, source), plan)
    rows = 23 * 3
    assert sorted(sizes) == sorted([7, rows, rows * 10, rows * 12 if save_rows else 23 * 12])


def test_kept_copies_are_used_and_gradients_reach_the_masters() -> None:
    layer = make_layer(32, num_experts=6, top_k=2, expert_dim=16, dtype=torch.float32)
    x_TD = torch.randn(40, 32).bfloat16()
    results = []
    for keep in (False, True):
        if keep:
            keep_copies(layer.experts.parameters(), torch.bfloat16)
        layer.zero_grad()
        out = layer(x_TD, context([40]))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
    for kept, cast in zip(*results, strict=True):
        assert kept is not None
        assert kept.dtype == cast.dtype
        assert torch.equal(kept, cast)
    copy, _ = layer.experts.down_proj.kept_copy
    copy.zero_()
    assert layer(x_TD, context([40])).eq(0).all()


def test_chunks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"moe.chunk_tokens=-1 must be 0 \(all tokens at once\) or more"):
        layer_and_input(chunk_tokens=-1)


def by_kernels(layer: MoELayer, x_TD: Tensor, ids_Tk: Tensor | None = None) -> Tensor:
    """The layer with every step that has a kernel forced to take it."""
    gate, experts = layer.gate, layer.experts
    logits_TE = gate.logits(x_TD)
    if ids_Tk is None:
        ids_Tk = select_experts(logits_TE, gate.rule, impl="triton")
    weight_Tk, prob_TE = expert_weights(logits_TE, ids_Tk, gate.rule, with_prob=True, impl="triton")
    assert prob_TE is not None
    term = balance_loss(prob_TE, ids_Tk, "micro_batch", 0.1)
    x_TD = attach_loss(x_TD, term, LossLedger({"tokens": float(len(x_TD))}))
    plan = plan_rows(ids_Tk, layer.cfg.num_experts, impl="triton")
    rows_RD = gather_rows(x_TD, plan, impl="triton")
    gate_up_RF = grouped_mm(rows_RD, experts.gate_up_proj, plan.offsets)
    hidden_RF = swiglu(gate_up_RF, row_weights(weight_Tk, plan), plan.offsets, impl="triton")
    return sum_rows(grouped_mm(hidden_RF, experts.down_proj, plan.offsets), plan, x_TD, impl="triton")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_all_kernels_together_give_the_layers_values_and_gradients(score: str, none: bool, impl: str) -> None:
    fields: dict[str, Any] = {"score": score, "balance": "micro_batch", "balance_coef": 0.1}
    layer = make_layer(24, num_experts=6, top_k=3, expert_dim=16, dtype=torch.float32, **fields).to(DEVICE)
    x_TD = torch.randn(150, 24, device=DEVICE, requires_grad=True)
    ids_Tk = torch.rand(150, 6).topk(3).indices.to(DEVICE)
    ids_Tk = ids_Tk.masked_fill(torch.rand(150, 3, device=DEVICE) < 0.3, -1) if none else None
    ctx = context([150], tokens=150, replay=None if ids_Tk is None else {"layers.0.experts": ids_Tk})
    ctx.packing = ctx.packing.to(DEVICE)
    pull_TD = torch.randn(150, 24, device=DEVICE)
    inputs = (x_TD, *layer.parameters())
    want = layer(x_TD, ctx) + x_TD
    out = by_kernels(layer, x_TD, ids_Tk)
    assert_close(out, want)
    wants = torch.autograd.grad(want, inputs, pull_TD)
    for grad, expected in zip(torch.autograd.grad(out, inputs, pull_TD), wants, strict=True):
        assert_close(grad, expected)
    assert impl == "triton"
