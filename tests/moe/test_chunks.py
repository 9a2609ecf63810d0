"""Experts over some tokens at a time, with what only a value needs left out where nobody reads it: the same gradients,
as many products as promised, nothing of all tokens for each chunk."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pithwood.attention.base import LayerContext
from pithwood.models.recompute import recomputed
from pithwood.moe import MoELayer
from pithwood.ops.master import Deferred, deferred_gradients, run_deferred
from tests.moe.helpers import context, make_layer
from tests.numerics import assert_close

TOKENS, DIM, EXPERTS, WIDTH = 23, 12, 6, 5
CHUNKS: list[dict[str, Any]] = [
    {"chunk_tokens": 7},
    {"chunk_tokens": 7, "save_rows": False},
    {"chunk_tokens": 7, "chunk_recompute": False},
    {"chunk_tokens": 7, "chunk_recompute": False, "save_rows": False},
    {"chunk_tokens": 1},
]
WAYS: list[dict[str, Any]] = [{}, {"save_rows": False}, *CHUNKS]
"""Settings of a layer that change no value."""


class AsBlock(nn.Module):
    """A layer in the form of a block, with the residual in its sum."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer
        self.calls: list[tuple[bool, int, bool]] = []
        """Of the experts: whether in the backward pass, rows, whether nobody reads the value."""
        self.going_back = False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        ids_Tk, weight_Tk, in_TD = self.layer.route(x_TD, ctx)
        unread = ctx.recomputing
        return self.layer.mix(in_TD, ids_Tk, weight_Tk, x_TD, self.experts, unread=unread), ctx.carry

    def experts(
        self, rows_RD: Tensor, offsets: Tensor, weight_R: Tensor, source: Any = None, unread: bool = False
    ) -> Tensor:
        self.calls.append((self.going_back, len(rows_RD), unread))
        return self.layer.experts(rows_RD, offsets, weight_R, source, unread)


def make_block(**fields: Any) -> AsBlock:
    fields = {"balance": "micro_batch", "balance_coef": 0.1, **fields}
    return AsBlock(make_layer(DIM, num_experts=EXPERTS, top_k=3, expert_dim=WIDTH, **fields))


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(block: AsBlock, x_TD: Tensor, again: bool) -> dict[str, Tensor]:
    """Output and gradients of a pass and its backward pass; again: the block is recomputed."""
    x_TD = x_TD.clone().requires_grad_()
    ctx = context([len(x_TD)], tokens=len(x_TD))
    out_TD, _ = recomputed(block, x_TD, ctx) if again else block(x_TD, ctx)
    block.going_back = True
    out_TD.square().sum().backward()
    block.going_back = False
    found = {"out": out_TD.detach(), "x": x_TD.grad}
    found |= {name: param.grad for name, param in block.named_parameters()}
    assert all(value is not None for value in found.values())
    return {name: value.clone() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("fields", WAYS)
@pytest.mark.parametrize("count", [TOKENS, 7, 1])
def test_gradients_are_those_of_all_tokens_at_once(fields: dict[str, Any], again: bool, count: int) -> None:
    want, found = train(make_block(), tokens(count), False), train(make_block(**fields), tokens(count), again)
    for name, value in want.items():
        assert_close(found[name], value, what=name)


class Products(TorchDispatchMode):
    """Counts the products of the experts, each by its weight's two last sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped_mm_ref" in func.name():
            shape = tuple(args[1].shape[1:])
            names = {(2 * WIDTH, DIM): "gate_up", (DIM, WIDTH): "down"}
            self.counts[names.get(shape, "gradient of rows")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "again", "gate_up", "down"),
    [
        ({}, False, 1, 1),
        ({}, True, 2, 1),
        ({"chunk_tokens": 6}, False, 2 * 4, 4),
        ({"chunk_tokens": 6}, True, 2 * 4, 4),
        ({"chunk_tokens": 6, "chunk_recompute": False}, False, 4, 4),
        ({"chunk_tokens": 6, "chunk_recompute": False}, True, 2 * 4, 4),
    ],
)
def test_gate_and_up_are_computed_again_once_and_down_never(
    fields: dict[str, Any], again: bool, gate_up: int, down: int
) -> None:
    block = make_block(**fields)
    with Products() as products:
        train(block, tokens(), again)
    passes = 4 if fields else 1
    assert products.counts == {"gate_up": gate_up, "down": down, "gradient of rows": 2 * passes}


@pytest.mark.quick
@pytest.mark.parametrize("again", [False, True])
def test_a_chunks_experts_go_forward_once_with_their_value_and_once_in_the_backward_pass(again: bool) -> None:
    block = make_block(chunk_tokens=9)
    train(block, tokens(), again)
    rows = [27, 27, 15]
    assert block.calls == [(False, many, False) for many in rows] + [(True, many, True) for many in rows]


@pytest.mark.parametrize("fields", WAYS[:4])
def test_a_value_that_nobody_reads_takes_no_memory(fields: dict[str, Any]) -> None:
    layer = make_block(**fields).layer
    x_TD = tokens().requires_grad_()
    ids_Tk = torch.rand(TOKENS, EXPERTS).topk(3).indices
    out_TD = layer.mix(x_TD, ids_Tk, torch.rand(TOKENS, 3).double(), x_TD, unread=True)
    assert out_TD.shape == x_TD.shape
    assert out_TD.eq(0).all()
    assert out_TD.untyped_storage().nbytes() == x_TD.itemsize


class Sizes(TorchDispatchMode):
    """Counts the ops that make, or write to, a tensor of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.whole += isinstance(out, Tensor) and out.shape[:1] == (240,)
        return out


@pytest.mark.quick
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("chunk_recompute", [False, True])
def test_gradients_of_all_tokens_are_made_once_however_many_chunks(chunk_recompute: bool, again: bool) -> None:
    def whole(chunk_tokens: int) -> int:
        block = make_block(chunk_tokens=chunk_tokens, chunk_recompute=chunk_recompute)
        with Sizes() as sizes:
            train(block, tokens(240), again)
        return sizes.whole

    # five chunks and eight; neither has 240 rows, of three slots
    assert whole(48) == whole(30)


@pytest.mark.quick
@pytest.mark.parametrize("fields", CHUNKS)
def test_gradients_are_handed_out_where_they_are_asked_for(fields: dict[str, Any]) -> None:
    layer, x_TD = make_block(**fields).layer, tokens().requires_grad_()
    want, parameters = train(AsBlock(layer), tokens(), False), list(layer.parameters())
    layer.zero_grad()
    layer.reset_step()
    ctx = context([TOKENS], tokens=TOKENS)
    out_TD, _ = AsBlock(layer)(x_TD, ctx)
    found = torch.autograd.grad(out_TD.square().sum(), [x_TD, *parameters])
    assert all(param.grad is None for param in parameters)
    for grad, name in zip(found, ("x", *(f"layer.{name}" for name, _ in layer.named_parameters())), strict=True):
        assert_close(grad, want[name], what=name)


@pytest.mark.parametrize("fields", CHUNKS)
@pytest.mark.parametrize("kept", ["x", "experts.down_proj"])
def test_a_pass_for_some_inputs_adds_to_those_alone(fields: dict[str, Any], kept: str) -> None:
    layer, x_TD = make_block(**fields).layer, tokens().requires_grad_()
    want = train(AsBlock(layer), tokens(), False)
    layer.zero_grad()
    layer.reset_step()
    out_TD, _ = AsBlock(layer)(x_TD, context([TOKENS], tokens=TOKENS))
    inputs = {"x": x_TD, **dict(layer.named_parameters())}
    out_TD.square().sum().backward(inputs=[inputs[kept]])
    assert [name for name, value in inputs.items() if value.grad is not None] == [kept]
    assert_close(inputs[kept].grad, want["x" if kept == "x" else f"layer.{kept}"])  # type: ignore[arg-type]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "proj"])
def test_frozen_experts_get_no_gradient_and_all_else_the_same(again: bool, frozen: str) -> None:
    want, block = train(make_block(), tokens(), False), make_block(chunk_tokens=7)
    for name, param in block.named_parameters():
        param.requires_grad_(frozen not in name)
    x_TD = tokens().requires_grad_()
    ctx = context([TOKENS], tokens=TOKENS)
    out_TD, _ = recomputed(block, x_TD, ctx) if again else block(x_TD, ctx)
    out_TD.square().sum().backward()
    assert_close(x_TD.grad, want["x"])  # type: ignore[arg-type]
    for name, param in block.named_parameters():
        assert (param.grad is None) == (frozen in name)
        if param.grad is not None:
            assert_close(param.grad, want[name], what=name)


@pytest.mark.parametrize("again", [False, True])
def test_experts_train_where_nothing_before_them_does(again: bool) -> None:
    want, block = train(make_block(), tokens(), False), make_block(chunk_tokens=7)
    block.layer.gate.requires_grad_(False)
    ctx = context([TOKENS], tokens=TOKENS)
    out_TD, _ = recomputed(block, tokens(), ctx) if again else block(tokens(), ctx)
    out_TD.square().sum().backward()
    for name, param in block.layer.experts.named_parameters():
        assert_close(param.grad, want[f"layer.experts.{name}"])  # type: ignore[arg-type]


@pytest.mark.parametrize("again", [False, True])
def test_products_of_chunks_can_wait_until_after_the_backward_pass(again: bool) -> None:
    want, block = train(make_block(), tokens(), False), make_block(chunk_tokens=7)
    ctx = context([TOKENS], tokens=TOKENS)
    out_TD, _ = recomputed(block, tokens().requires_grad_(), ctx) if again else block(tokens(), ctx)
    queue: Deferred = []
    with deferred_gradients(queue):
        out_TD.square().sum().backward()
    assert all(param.grad is None for param in block.layer.experts.parameters())
    run_deferred(queue)
    for name, param in block.layer.experts.named_parameters():
        assert_close(param.grad, want[f"layer.experts.{name}"])  # type: ignore[arg-type]


def test_a_second_derivative_through_chunks_is_refused() -> None:
    block, x_TD = make_block(chunk_tokens=7), tokens().requires_grad_()
    out_TD, _ = block(x_TD, context([TOKENS], tokens=TOKENS))
    (grad,) = torch.autograd.grad(out_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
