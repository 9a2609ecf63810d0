"""The weights' gradient of grouped products, written and added in place: groups of any size, tails of NaN."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.grouped_mm import grouped_grad_weight
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

IMPLS = ["ref", pytest.param("triton", marks=KERNEL_MARKS)]
pytestmark = pytest.mark.usefixtures("poison")

CASES = {
    # sizes of the groups, rows behind them, width of the gradient, width of the rows
    "mixed": ([5, 0, 70, 1], 3, 24, 40),
    "one_takes_all": ([0, 0, 130, 0], 0, 16, 16),
    "whole_chunks": ([64, 128], 64, 16, 24),
    "odd_widths": ([7, 9], 1, 5, 3),
    "wider_than_a_tile": ([40], 5, 300, 264),
    "nothing_but_tail": ([0, 0], 6, 8, 8),
    "no_rows": ([0, 0], 0, 8, 8),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_product_of_each_groups_rows(case: str, dtype: torch.dtype, add: bool, impl: str) -> None:
    sizes, behind, width_x, width_d = CASES[case]
    used = sum(sizes)
    grad_RX = torch.randn(used + behind, width_x, device=DEVICE).to(dtype)
    rows_RD = torch.randn(used + behind, width_d, device=DEVICE).to(dtype)
    grad_RX[used:], rows_RD[used:] = float("nan"), float("inf")
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(torch.int32)
    out = torch.full((len(sizes), width_x, width_d), float("nan"), device=DEVICE)
    if add:
        out = torch.randn(out.shape, device=DEVICE)
    before = out.double() if add else torch.zeros_like(out, dtype=torch.float64)
    assert grouped_grad_weight(grad_RX, rows_RD, offsets, out, add=add, impl=impl) is out
    for e, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        want = before[e] + grad_RX[begin:end].double().t() @ rows_RD[begin:end].double()
        if begin == end:
            assert torch.equal(out[e].double(), before[e])
        # the factors are exact in fp32, so is all but the order of the sum
        assert_close(out[e], want, 1e-5)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])
@pytest.mark.parametrize("way", ["plain", "bulk"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", ["mixed", "one_takes_all", "whole_chunks", "nothing_but_tail"])
def test_all_ways_to_load_agree(case: str, add: bool, way: str, impl: str) -> None:
    from pithwood.ops.grouped_mm.weight_triton import PLAIN, launch

    sizes, behind, width_x, width_d = CASES[case]
    used = sum(sizes)
    grad_RX = torch.randn(used + behind, width_x, device=DEVICE).half()
    rows_RD = torch.randn(used + behind, width_d, device=DEVICE).half()
    grad_RX[used:], rows_RD[used:] = float("nan"), float("inf")
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(torch.int32)
    out = torch.randn(len(sizes), width_x, width_d, device=DEVICE)
    want = grouped_grad_weight(grad_RX, rows_RD, offsets, out.clone(), add=add, impl="ref")
    launch(grad_RX, rows_RD, offsets, out, add, PLAIN._replace(way=way))
    assert_close(out, want, 1e-5)
    assert impl == "triton"


@pytest.mark.parametrize("impl", IMPLS)
def test_one_groups_nan_stays_its_own(impl: str) -> None:
    grad_RX, rows_RD = torch.randn(20, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    rows_RD[7:12] = float("nan")
    offsets = torch.tensor([0, 7, 12, 20], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(3, 8, 8, device=DEVICE)
    grouped_grad_weight(grad_RX, rows_RD, offsets, out, add=True, impl=impl)
    assert out.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_result_may_be_as_narrow_as_the_rows(impl: str) -> None:
    rows = torch.randn(20, 8, device=DEVICE).half()
    offsets = torch.tensor([0, 13, 20], dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, 8, 8, device=DEVICE, dtype=torch.float16)
    grouped_grad_weight(rows, rows, offsets, out, add=False, impl=impl)
    assert_close(out[1], rows[13:].double().t() @ rows[13:].double())


def test_bad_input_is_refused() -> None:
    rows, offsets = torch.zeros(4, 6), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must be \[R, X\] and \[R, D\]"):
        grouped_grad_weight(torch.zeros(3, 2), rows, offsets, torch.zeros(1, 2, 6), add=True)
    with pytest.raises(ValueError, match=r"must be contiguous and \(1, 2, 6\)"):
        grouped_grad_weight(torch.zeros(4, 2), rows, offsets, torch.zeros(1, 6, 2), add=True)
    with pytest.raises(ValueError, match=r"must agree, out torch\.float32 be theirs or fp32"):
        grouped_grad_weight(torch.zeros(4, 2).half(), rows, offsets, torch.zeros(1, 2, 6), add=True)
    wide = torch.zeros(4, 2).double(), rows.double()
    with pytest.raises(ValueError, match=r"got torch\.float64; use impl='ref'"):
        grouped_grad_weight(*wide, offsets, torch.zeros(1, 2, 6).double(), add=True, impl="triton")


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])
def test_the_operator_is_known_to_the_compiler(impl: str) -> None:
    rows, offsets = torch.zeros(4, 6, device=DEVICE), torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    grouped_grad_weight(rows, rows, offsets, torch.zeros(1, 6, 6, device=DEVICE), add=True, impl=impl)
    operator = torch.ops.pithwood.grouped_grad_weight.default
    args = (rows, rows, offsets, torch.zeros(1, 6, 6, device=DEVICE), True)
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
