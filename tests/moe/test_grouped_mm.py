"""Grouped products against plain torch: values, every gradient, empty and overloaded groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pithwood.ops.grouped_mm import grouped_mm
from pithwood.ops.swiglu import swiglu
from tests.numerics import assert_close

SIZES = {"mixed": [5, 0, 12, 1], "all_on_one": [0, 0, 24, 0], "first_and_last_empty": [0, 9, 9, 0], "one_group": [17]}


def inputs(sizes: list[int], dtype: torch.dtype, tail: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes) + tail, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(len(sizes), 8, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, w, torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def by_split(rows: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([part @ w[e].t() for e, part in enumerate(rows[: sum(sizes)].split(sizes))])


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(impl: str, dtype: torch.dtype, case: str) -> None:
    sizes = SIZES[case]
    rows, w, offsets = inputs(sizes, dtype)
    out = grouped_mm(rows, w, offsets, impl=impl)  # type: ignore[arg-type]
    expected = by_split(rows.double(), w.double(), sizes)
    assert out.dtype == dtype
    assert_close(out, expected)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * pull.to(dtype)).sum(), (rows, w))
    wants = torch.autograd.grad((expected * pull.to(dtype).double()).sum(), (rows, w))
    for grad, want in zip(grads, wants, strict=True):
        assert_close(grad, want)
    for e, size in enumerate(sizes):
        assert size or grads[1][e].eq(0).all(), "an empty group's weight has gradient zero"


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_rows_behind_the_last_group_touch_nothing(impl: str) -> None:
    sizes = [4, 3]
    rows, w, offsets = inputs(sizes, torch.float32, tail=5)
    with torch.no_grad():
        rows[7:] = float("nan")
    out = grouped_mm(rows, w, offsets, impl=impl)  # type: ignore[arg-type]
    pull = torch.ones_like(out)
    pull[7:] = float("nan")
    grad_rows, grad_w = torch.autograd.grad(out, (rows, w), pull)
    expected = by_split(rows.detach(), w.detach(), sizes)
    assert_close(out[:7], expected)
    assert torch.isfinite(grad_rows[:7]).all()
    assert torch.isfinite(grad_w).all()


def test_gradcheck() -> None:
    rows, w, offsets = inputs([3, 0, 2], torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, offsets), (rows, w))


def test_no_rows_at_all() -> None:
    rows, w, offsets = inputs([0, 0], torch.float32)
    out = grouped_mm(rows, w, offsets)
    assert out.shape == (0, 8)
    grad_rows, grad_w = torch.autograd.grad(out.sum(), (rows, w))
    assert grad_rows.shape == (0, 16)
    assert grad_w.eq(0).all()


def test_bad_input_is_refused() -> None:
    rows, w, offsets = inputs([3, 2], torch.float32)
    with pytest.raises(ValueError, match=r"must be \[R, D\]"):
        grouped_mm(rows[:, :8], w, offsets)
    with pytest.raises(ValueError, match="one entry more than the 2 groups"):
        grouped_mm(rows, w, offsets[1:])
    with pytest.raises(ValueError, match="cast one of them"):
        grouped_mm(rows.bfloat16(), w, offsets)
    with pytest.raises(ValueError, match="choose 'ref', 'torch' or None"):
        grouped_mm(rows, w, offsets, impl="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", SIZES)
def test_default_on_cuda(dtype: torch.dtype, case: str) -> None:
    sizes = [size * 8 for size in SIZES[case]]
    rows, w, offsets = inputs(sizes, dtype, tail=16)
    rows, w = rows.detach().cuda().requires_grad_(), w.detach().cuda().requires_grad_()
    out = grouped_mm(rows, w, offsets.cuda())[: sum(sizes)]
    expected = by_split(rows.double(), w.double(), sizes)
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-3  # TF32 may be on
    assert_close(out, expected, tol)
    pull = torch.randn_like(out)
    grads = torch.autograd.grad((out * pull).sum(), (rows, w))
    wants = torch.autograd.grad((expected * pull.double()).sum(), (rows, w))
    assert_close(grads[0][: sum(sizes)], wants[0][: sum(sizes)], tol)
    assert_close(grads[1], wants[1], tol)


@pytest.mark.gpu
def test_odd_widths_and_other_dtypes_are_refused_on_cuda() -> None:
    rows = torch.zeros(4, 12, device="cuda", dtype=torch.bfloat16)
    w = torch.zeros(1, 8, 12, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4], device="cuda", dtype=torch.int32)
    with pytest.raises(ValueError, match="multiples of 8"):
        grouped_mm(rows, w, offsets)
    with pytest.raises(ValueError, match="takes bfloat16 on CUDA"):
        grouped_mm(rows.half(), w.half(), offsets, impl="torch")


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_compiles_as_one_graph_whatever_the_group_sizes(impl: str) -> None:
    def run(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return swiglu(grouped_mm(rows, w, offsets, impl=impl))  # type: ignore[arg-type]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for sizes in ([5, 0, 12, 1], [0, 0, 18, 0]):
        # The shape rules of F.grouped_mm under compilation are those of CUDA, on any device.
        rows, w, offsets = inputs(sizes, torch.bfloat16)
        out = compiled(rows, w, offsets)
        assert_close(out, run(rows, w, offsets))
        grads = torch.autograd.grad(out.sum(), (rows, w))
        wants = torch.autograd.grad(run(rows, w, offsets).sum(), (rows, w))
        for grad, want in zip(grads, wants, strict=True):
            assert_close(grad, want)
