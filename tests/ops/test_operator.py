"""Operators: eager calls, gradients, compiled graphs, changed inputs, and what has no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.ops.operator import operator

pytestmark = pytest.mark.quick


@operator("test_scaled")
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(x * factor, the elements of each row)."""
    return x * factor, torch.full(x.shape[:1], x.shape[1], dtype=torch.int32)


@scaled.register_fake
def _(x, factor):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.int32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None]:
    assert ctx.saved_tensors[0].shape == grad.shape
    return grad * ctx.factor if ctx.needs_input_grad[0] else None, None


scaled.register_autograd(_backward, setup_context=_keep)


@operator("test_doubled")
def doubled(x: Tensor) -> Tensor:
    """2 x."""
    return 2 * x


@operator("test_filled", mutates=("out",))
def filled(value: float, out: Tensor) -> None:
    """Write the value over `out`."""
    out.detach().numpy()[...] = value


def test_a_call_is_the_function_and_its_gradient_that_of_torch_s_operator():
    x = torch.randn(3, 5, requires_grad=True)
    for call in (scaled, torch.ops.pithwood.test_scaled):
        out, sizes = call(x, 3.0)
        assert torch.equal(out, 3 * x)
        assert sizes.tolist() == [5, 5, 5]
        assert not sizes.requires_grad
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 3.0))
    assert not scaled(x.detach(), 3.0)[0].requires_grad


def test_a_compiled_graph_holds_torch_s_operator():
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 5, requires_grad=True)
    out = torch.compile(lambda x: scaled(x, 3.0)[0] + 1, backend=keep, fullgraph=True)(x)
    assert torch.equal(out, 3 * x + 1)
    assert any("test_scaled" in str(node.target) for node in graphs[0].graph.nodes)
    (grad,) = torch.autograd.grad(torch.compile(lambda x: scaled(x, 2.0)[0].sum(), backend="aot_eager")(x), x)
    assert torch.equal(grad, torch.full_like(x, 2.0))


def test_without_a_formula_the_backward_pass_raises():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(doubled(x), 2 * x)
    with pytest.raises(RuntimeError, match="test_doubled"):
        doubled(x).sum().backward()


def test_what_it_changes_is_a_changed_tensor_to_autograd():
    x = torch.randn(3, requires_grad=True)
    buffer = torch.ones(3)
    out = (x * buffer).sum()
    filled(2.0, buffer)
    assert buffer.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
