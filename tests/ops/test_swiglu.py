"""Weighted SwiGLU against its definition: values, every gradient, rows that nobody may look at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pithwood.ops.swiglu import swiglu, swiglu_backward
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

TRITON = pytest.param("triton", marks=KERNEL_MARKS)
pytestmark = pytest.mark.usefixtures("poison")


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up, weight, and a gradient of the result."""
    gate_up_RF = (torch.randn(rows, 2 * width, dtype=torch.float64) * 2).to(DEVICE, dtype).requires_grad_()
    weight_R = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE).requires_grad_()
    return gate_up_RF, weight_R, torch.randn(rows, width, dtype=torch.float64).to(DEVICE, dtype)


def by_definition(gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    gate, up = gate_up_RF.double().chunk(2, dim=-1)
    hidden = gate * torch.sigmoid(gate) * up
    return hidden if weight_R is None else hidden * weight_R.double()[:, None]


@pytest.mark.quick
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_agrees_with_the_definition(dtype: torch.dtype, weighted: bool) -> None:
    gate_up_RF, weight_R, pull = (x.cpu() for x in inputs(7, 5, dtype))
    leaves = [gate_up_RF, weight_R][: 1 + weighted]
    out = swiglu(*leaves, impl="ref")
    want = by_definition(*leaves) if weighted else by_definition(gate_up_RF, None)
    assert_close(out, want)
    grads = torch.autograd.grad(out, leaves, pull)
    for grad, expected in zip(grads, torch.autograd.grad(want, leaves, pull.double()), strict=True):
        assert_close(grad, expected, 2e-2 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rows", "width", "behind"), [(0, 8, 0), (3, 1, 0), (70, 48, 9), (20, 300, 20), (33, 16, 1)])
@pytest.mark.parametrize("impl", [TRITON])
def test_the_kernel_agrees_with_the_definition(
    impl: str, dtype: torch.dtype, weighted: bool, rows: int, width: int, behind: int
) -> None:
    gate_up_RF, weight_R, pull_RF = inputs(rows, width, dtype)
    used = rows - behind
    with torch.no_grad():
        gate_up_RF[used:], weight_R[used:], pull_RF[used:] = float("nan"), float("nan"), float("nan")
    offsets = torch.tensor([0, used // 2, used], dtype=torch.int32, device=DEVICE)
    weight = weight_R if weighted else None
    leaves = [gate_up_RF, weight_R] if weighted else [gate_up_RF]
    out = swiglu(gate_up_RF, weight, offsets, impl=impl)
    want = by_definition(gate_up_RF, weight)
    assert out.dtype == dtype
    assert_close(out[:used], want[:used])
    grads = torch.autograd.grad(out, leaves, pull_RF)
    wants = torch.autograd.grad(want, leaves, pull_RF.double())
    for grad, expected in zip(grads, wants, strict=True):
        assert_close(grad[:used], expected[:used], {torch.float32: 1e-5}.get(dtype, 2e-2))
    kept = pull_RF.clone()
    hidden, grad_gate_up, grad_weight = swiglu_backward(pull_RF, gate_up_RF, weight, offsets, impl=impl)
    assert torch.equal(hidden[:used], out[:used])
    assert torch.equal(grad_gate_up[:used], grads[0][:used])
    assert (grad_weight is None) == (weight is None)
    assert grad_weight is None or torch.equal(grad_weight[:used], grads[1][:used])
    # documented: the gradient's memory holds the forward's result afterwards
    assert hidden.data_ptr() == pull_RF.data_ptr()
    reference = swiglu_backward(kept, gate_up_RF, weight, offsets, impl="ref")
    for found, expected in zip((hidden, grad_gate_up), reference[:2], strict=True):
        assert_close(found[:used], expected[:used])


def test_without_offsets_every_row_counts() -> None:
    gate_up_RF, weight_R, pull_RF = inputs(9, 8, torch.float32)
    for impl in ("ref", "triton"):
        grads = torch.autograd.grad(swiglu(gate_up_RF, weight_R, impl=impl), (gate_up_RF, weight_R), pull_RF)
        wants = torch.autograd.grad(by_definition(gate_up_RF, weight_R), (gate_up_RF, weight_R), pull_RF.double())
        assert_close(grads[0], wants[0])
        assert_close(grads[1], wants[1])


def test_gradcheck() -> None:
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (gate_up, weight))
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="equal widths; got 7"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"weights \(3,\) must be one for each row of \(2, 8\)"):
        swiglu(torch.zeros(2, 8), torch.zeros(3))
    with pytest.raises(ValueError, match="must be half as wide as gate_up"):
        swiglu_backward(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"it takes \[R, 2F\], not 3 axes; use impl='ref'"):
        swiglu(torch.zeros(2, 2, 8, device=DEVICE), impl="triton")
    with pytest.raises(ValueError, match="allowed are 'ref', 'triton'"):
        swiglu(torch.zeros(2, 8), impl="torch")


@pytest.mark.parametrize("impl", [TRITON])
def test_the_operators_are_known_to_the_compiler(impl: str) -> None:
    from pithwood.ops.swiglu import triton

    gate_up_RF, weight_R, pull_RF = inputs(9, 8, torch.float32)
    args = (pull_RF, gate_up_RF.detach(), weight_R.detach(), None)
    for operator in (triton.swiglu_gradient, triton.swiglu_backward_):
        torch.library.opcheck(operator.op, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x, w: swiglu(x, w, impl=impl), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(gate_up_RF, weight_R), (gate_up_RF, weight_R), pull_RF)
    wants = torch.autograd.grad(swiglu(gate_up_RF, weight_R), (gate_up_RF, weight_R), pull_RF)
    assert_close(grads[0], wants[0])
    assert_close(grads[1], wants[1])
