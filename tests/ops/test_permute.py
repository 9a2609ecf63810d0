"""Rows sorted by expert: kernels and reference against loops, for empty and overloaded experts and pairs of none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pithwood.ops.permute import (
    RowPlan,
    count_pairs,
    gather_ids,
    gather_rows,
    owner_ids,
    plan_rows,
    plan_slots,
    row_weights,
    sum_rows,
)
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

IMPLS = ["ref", pytest.param("triton", marks=KERNEL_MARKS)]
pytestmark = pytest.mark.usefixtures("poison")

CASES = {
    "no_tokens": (0, 4, 2, 0.0),
    "one_pair": (1, 1, 1, 0.0),
    "all_of_one_expert": (300, 1, 1, 0.0),
    "mixed": (300, 8, 2, 0.0),
    "some_none": (190, 5, 3, 0.3),
    "no_expert_at_all": (70, 3, 2, 1.0),
    "more_experts_than_pairs": (9, 512, 4, 0.1),
    "many_slots": (40, 16, 16, 0.2),
    "more_tiles_than_a_scan_takes": (16_450, 3, 2, 0.01),
}


def some_ids(case: str, dtype: torch.dtype = torch.int64) -> tuple[Tensor, int]:
    """Ids that leave the last expert empty where there are several, and burden the first."""
    num_tokens, num_experts, k, none = CASES[case]
    generator = torch.Generator().manual_seed(0)
    most = max(num_experts - 1, 1)
    ids_Tk = (torch.rand(num_tokens, k, generator=generator).square() * most).to(dtype)
    ids_Tk[torch.rand(num_tokens, k, generator=generator) < none] = -1
    return ids_Tk.to(DEVICE), num_experts


def by_loop(ids_Tk: Tensor, num_experts: int) -> list[list[int]]:
    """The pairs of every expert, then those without one, by the definition."""
    flat = ids_Tk.flatten().tolist()
    groups: list[list[int]] = [[] for _ in range(num_experts + 1)]
    for pair, expert in enumerate(flat):
        groups[expert if expert >= 0 else num_experts].append(pair)
    return groups


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "case"),
    [*((torch.int64, case) for case in CASES), (torch.int32, "some_none"), (torch.int32, "mixed")],
)
def test_pairs_are_sorted_by_expert_then_token_then_slot(impl: str, dtype: torch.dtype, case: str) -> None:
    ids_Tk, num_experts = some_ids(case, dtype)
    plan = plan_rows(ids_Tk, num_experts, impl=impl)
    groups = by_loop(ids_Tk, num_experts)
    pairs = [pair for group in groups for pair in group]
    ends = torch.tensor([0, *(len(group) for group in groups[:-1])]).cumsum(0)
    assert plan.offsets.tolist() == ends.tolist()
    assert plan.pair_R.tolist() == pairs
    assert plan.token_R.tolist() == [pair // ids_Tk.shape[1] for pair in pairs]
    assert plan.row_Tk.flatten()[plan.pair_R].tolist() == list(range(len(pairs)))
    assert {x.dtype for x in (plan.offsets, plan.row_Tk, plan.pair_R, plan.token_R)} == {torch.int32}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none", "no_expert_at_all", "more_experts_than_pairs"])
def test_pairs_are_counted(impl: str, case: str) -> None:
    ids_Tk, num_experts = some_ids(case)
    counts_E = count_pairs(ids_Tk, num_experts, impl=impl)
    assert counts_E.dtype == torch.int64
    assert counts_E.tolist() == [len(group) for group in by_loop(ids_Tk, num_experts)[:-1]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none", "no_expert_at_all"])
def test_pairs_beyond_a_bound_have_no_row(impl: str, case: str, share: float) -> None:
    ids_Tk, num_experts = some_ids(case)
    bound = int(share * ids_Tk.numel())
    plan, whole = plan_rows(ids_Tk, num_experts, max_rows=bound, impl=impl), make_plan(case)
    rows = min(bound, ids_Tk.numel())
    assert plan.num_rows == rows
    assert torch.equal(plan.offsets, whole.offsets.clamp(max=rows))
    assert torch.equal(plan.row_Tk, whole.row_Tk)
    assert torch.equal(plan.pair_R, whole.pair_R[:rows])
    assert torch.equal(plan.token_R, whole.token_R[:rows])
    assert plan.count is not None
    assert plan.count.tolist() == [len(group) for group in by_loop(ids_Tk, num_experts)[:-1]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["mixed", "some_none"])
def test_experts_elsewhere_have_no_rows(impl: str, case: str) -> None:
    ids_Tk, _ = some_ids(case)
    plan = plan_rows(ids_Tk, 2, first=1, impl=impl)
    want = plan_rows(torch.where((ids_Tk == 1) | (ids_Tk == 2), ids_Tk - 1, -1), 2, impl="ref")
    for name in ("offsets", "row_Tk", "pair_R", "token_R"):
        assert torch.equal(getattr(plan, name), getattr(want, name)), name
    assert not plan.all_routed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("experts", "each", "k"), [(8, 4, 3), (8, 2, 3), (8, 1, 3), (6, 6, 1), (40, 5, 8)])
def test_the_owners_of_a_tokens_experts_are_named_once(
    impl: str, dtype: torch.dtype, experts: int, each: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_Tk = torch.rand(300, experts, generator=generator).topk(k).indices.to(dtype)
    ids_Tk[torch.rand(300, k, generator=generator) < 0.3] = -1
    owner_Tm = owner_ids(ids_Tk.to(DEVICE), each, experts // each, impl=impl)
    assert owner_Tm.dtype == torch.int32
    assert owner_Tm.shape == (300, min(k, experts // each))
    for ids, named in zip(ids_Tk.tolist(), owner_Tm.tolist(), strict=True):
        assert sorted(owner for owner in named if owner >= 0) == sorted({e // each for e in ids if e >= 0})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none"])
def test_ids_go_with_their_tokens(impl: str, case: str) -> None:
    ids_Tk, num_experts = some_ids(case)
    plan = plan_slots(ids_Tk, num_experts, 37, impl="ref")
    found = gather_ids(ids_Tk, plan, impl=impl)
    assert found.dtype == torch.int32
    rows = ids_Tk.tolist()
    assert found.tolist() == [rows[token] if token >= 0 else [-1] * ids_Tk.shape[1] for token in plan.token_R.tolist()]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("capacity", [1, 37, 600])
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none", "no_expert_at_all"])
def test_equal_parts_hold_their_pairs_in_order(impl: str, case: str, capacity: int) -> None:
    ids_Tk, parts = some_ids(case)
    plan = plan_slots(ids_Tk, parts, capacity, impl=impl)
    groups = by_loop(ids_Tk, parts)[:-1]
    padded = [(group + [-1] * capacity)[:capacity] for group in groups]
    assert plan.count is not None
    assert plan.count.tolist() == [len(group) for group in groups]
    assert plan.offsets.tolist() == [part * capacity for part in range(parts + 1)]
    assert plan.pair_R.tolist() == [pair for group in padded for pair in group]
    assert plan.token_R.tolist() == [pair // ids_Tk.shape[1] for group in padded for pair in group]
    place = {pair: row for row, pair in enumerate(plan.pair_R.tolist()) if pair >= 0}
    assert plan.row_Tk.flatten().tolist() == [place.get(pair, parts * capacity) for pair in range(ids_Tk.numel())]


def make_plan(case: str) -> RowPlan:
    return plan_rows(*some_ids(case), impl="ref")


def incomplete_plans() -> list[RowPlan]:
    """Plans in which not every pair has a row, nor every row a pair."""
    ids_Tk, num_experts = some_ids("some_none")
    return [
        plan_rows(ids_Tk, num_experts, max_rows=170, impl="ref"),
        plan_rows(ids_Tk, num_experts, max_rows=0, impl="ref"),
        plan_slots(ids_Tk, num_experts, 60, impl="ref"),
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_pairs_without_a_row_are_left_out_of_sums_and_gradients(impl: str) -> None:
    for plan in incomplete_plans():
        used_R = (plan.pair_R >= 0) & (torch.arange(plan.num_rows, device=DEVICE) < plan.offsets[-1])
        x_TD = torch.randn(plan.num_tokens, 24, device=DEVICE, requires_grad=True)
        rows_RD = gather_rows(x_TD, plan, impl=impl)
        assert torch.equal(rows_RD[used_R], x_TD[plan.token_R[used_R]])
        pull_RD = torch.randn(plan.num_rows, 24, device=DEVICE).masked_fill(~used_R[:, None], float("nan"))
        want = torch.zeros(plan.num_tokens, 24, dtype=torch.float64, device=DEVICE)
        want.index_add_(0, plan.token_R[used_R], pull_RD[used_R].double())
        (grad_TD,) = torch.autograd.grad(rows_RD, x_TD, pull_RD)
        assert_close(grad_TD, want)
        pull_RD.requires_grad_()
        out_TD = sum_rows(pull_RD, plan, x_TD, impl=impl)
        assert_close(out_TD, want + x_TD.double())
        (back_RD,) = torch.autograd.grad(out_TD, pull_RD, x_TD.detach())
        assert torch.equal(back_RD[used_R], x_TD[plan.token_R[used_R]])


def test_weights_of_pairs_without_a_row_have_no_gradient() -> None:
    for plan in incomplete_plans()[:2]:
        weight_Tk = torch.rand(plan.row_Tk.shape, device=DEVICE, requires_grad=True)
        weight_R = row_weights(weight_Tk, plan)
        assert torch.equal(weight_R, weight_Tk.flatten()[plan.pair_R])
        pull_R = torch.randn(plan.num_rows, device=DEVICE)
        used = int(plan.offsets[-1])
        pull_R[used:] = float("nan")
        (grad_Tk,) = torch.autograd.grad(weight_R, weight_Tk, pull_R)
        want = torch.zeros(weight_Tk.numel(), device=DEVICE)
        want[plan.pair_R[:used]] = pull_R[:used]
        assert torch.equal(grad_Tk.flatten(), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("dim", "case"),
    [(24, "no_tokens"), (1, "mixed"), (24, "mixed"), (64, "some_none"), (24, "no_expert_at_all"), (2100, "many_slots")],
)
def test_gather_copies_and_its_gradient_sums(impl: str, dtype: torch.dtype, dim: int, case: str) -> None:
    plan = make_plan(case)
    x_TD = torch.randn(plan.num_tokens, dim, device=DEVICE).to(dtype).requires_grad_()
    rows_RD = gather_rows(x_TD, plan, impl=impl)
    used = int(plan.offsets[-1])
    assert torch.equal(rows_RD[:used], x_TD[plan.token_R[:used]])
    pull_RD = torch.randn(plan.num_rows, dim, device=DEVICE).to(dtype)
    pull_RD[used:] = float("nan")
    (grad_TD,) = torch.autograd.grad(rows_RD, x_TD, pull_RD)
    want = torch.zeros(plan.num_tokens, dim, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, plan.token_R[:used], pull_RD[:used].double())
    assert grad_TD.dtype == dtype
    assert_close(grad_TD, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none", "no_expert_at_all", "many_slots"])
def test_sum_adds_a_tokens_rows_and_its_gradient_copies(
    impl: str, dtype: torch.dtype, with_residual: bool, case: str
) -> None:
    plan = make_plan(case)
    used, dim = int(plan.offsets[-1]), 40
    rows_RD = torch.randn(plan.num_rows, dim, device=DEVICE).to(dtype)
    rows_RD[used:] = float("nan")
    rows_RD.requires_grad_()
    residual_TD = torch.randn(plan.num_tokens, dim, device=DEVICE).to(dtype).requires_grad_() if with_residual else None
    out_TD = sum_rows(rows_RD, plan, residual_TD, impl=impl)
    want = torch.zeros(plan.num_tokens, dim, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, plan.token_R[:used], rows_RD[:used].double())
    assert out_TD.dtype == dtype
    assert_close(out_TD, want if residual_TD is None else want + residual_TD.double())
    pull_TD = torch.randn(plan.num_tokens, dim, device=DEVICE).to(dtype)
    grad_RD, *others = torch.autograd.grad(
        out_TD, [rows_RD] if residual_TD is None else [rows_RD, residual_TD], pull_TD
    )
    assert torch.equal(grad_RD[:used], pull_TD[plan.token_R[:used]])
    assert all(torch.equal(grad, pull_TD) for grad in others)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["no_tokens", "mixed", "some_none"])
def test_a_sum_that_nobody_reads_has_the_same_gradients_and_no_memory(impl: str, case: str) -> None:
    plan = make_plan(case)
    used, dim = int(plan.offsets[-1]), 40
    rows_RD = torch.full((plan.num_rows, dim), float("nan"), device=DEVICE, requires_grad=True)
    residual_TD = torch.full((plan.num_tokens, dim), float("nan"), device=DEVICE, requires_grad=True)
    out_TD = sum_rows(rows_RD, plan, residual_TD, unread=True, impl=impl)
    assert out_TD.shape == residual_TD.shape
    assert out_TD.eq(0).all()
    assert out_TD.untyped_storage().nbytes() == 4
    pull_TD = torch.randn(plan.num_tokens, dim, device=DEVICE)
    grad_RD, grad_TD = torch.autograd.grad(out_TD, [rows_RD, residual_TD], pull_TD)
    assert torch.equal(grad_RD[:used], pull_TD[plan.token_R[:used]])
    assert torch.equal(grad_TD, pull_TD)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sum_is_rounded_once(impl: str) -> None:
    plan = plan_rows(torch.tensor([[0, 1, 2]], device=DEVICE), 3, impl="ref")
    rows_RD = torch.tensor([[2048.0], [1.0], [1.0]], dtype=torch.float16, device=DEVICE)
    # in fp16 neighbours of 2048 are 2 apart: one after the other, the ones would vanish
    assert sum_rows(rows_RD, plan, impl=impl).item() == 2050.0
    residual = torch.tensor([[-2048.0]], dtype=torch.float16, device=DEVICE)
    rows_RD[2] = 0.0
    assert sum_rows(rows_RD, plan, residual, impl=impl).item() == 1.0


@pytest.mark.parametrize("case", ["mixed", "some_none", "no_expert_at_all"])
def test_weights_follow_their_rows(case: str) -> None:
    plan = make_plan(case)
    weight_Tk = torch.rand(plan.row_Tk.shape, device=DEVICE, requires_grad=True)
    weight_R = row_weights(weight_Tk, plan)
    assert torch.equal(weight_R, weight_Tk.flatten()[plan.pair_R])
    pull_R = torch.randn(plan.num_rows, device=DEVICE)
    used = int(plan.offsets[-1])
    pull_R[used:] = float("nan")
    (grad_Tk,) = torch.autograd.grad(weight_R, weight_Tk, pull_R)
    want = torch.zeros(plan.num_rows, device=DEVICE)
    want[plan.pair_R[:used]] = pull_R[:used]
    assert torch.equal(grad_Tk.flatten(), want)


def test_bad_input_is_refused() -> None:
    plan = plan_rows(torch.zeros(3, 2, dtype=torch.int64), 2, impl="ref")
    with pytest.raises(ValueError, match=r"must be integers \[tokens, top_k\]"):
        plan_rows(torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="num_experts=0 must be at least 1"):
        plan_rows(torch.zeros(3, 2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="experts_each=0 must be at least 1"):
        owner_ids(torch.zeros(3, 2, dtype=torch.int64), 0, 2)
    with pytest.raises(ValueError, match="of the plan's 3 tokens"):
        gather_ids(torch.zeros(4, 2, dtype=torch.int64), plan_rows(torch.zeros(3, 2, dtype=torch.int64), 2))
    with pytest.raises(ValueError, match="max_rows=-2 must be at least 0"):
        plan_rows(torch.zeros(3, 2, dtype=torch.int64), 2, max_rows=-2)
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        plan_slots(torch.zeros(3, 2, dtype=torch.int64), 2, 0)
    with pytest.raises(ValueError, match="route fewer tokens at a time"):
        plan_slots(torch.zeros(3, 2, dtype=torch.int64), 4, 2**29)
    with pytest.raises(ValueError, match="of the plan's 3 tokens"):
        gather_rows(torch.zeros(4, 2), plan)
    with pytest.raises(ValueError, match="5 rows, but the plan has 6"):
        sum_rows(torch.zeros(5, 2), plan)
    with pytest.raises(ValueError, match="cast one of them"):
        sum_rows(torch.zeros(6, 2), plan, torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"residual \(3, 1\) must be \(3, 2\)"):
        sum_rows(torch.zeros(6, 2), plan, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must fit the plan"):
        row_weights(torch.zeros(3, 1), plan)
    with pytest.raises(ValueError, match=r"allowed are 'ref', 'triton'"):
        gather_rows(torch.zeros(3, 2), plan, impl="torch")
    with pytest.raises(ValueError, match=r"kernels take fp32, fp16 and bf16, got torch\.float64; use impl='ref'"):
        sum_rows(torch.zeros(6, 2, dtype=torch.float64), plan, impl="triton")


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])
def test_the_operators_are_known_to_the_compiler(impl: str) -> None:
    from pithwood.ops.permute import owners_triton, plan_triton, triton

    ids_Tk, num_experts = some_ids("some_none")
    plan = plan_rows(ids_Tk, num_experts, impl=impl)
    x_TD = torch.randn(plan.num_tokens, 8, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(plan_triton.plan_rows.op, (ids_Tk, num_experts, 1, 100), test_utils=tests)
    torch.library.opcheck(owners_triton.owner_ids.op, (ids_Tk, 2, 3), test_utils=tests)
    torch.library.opcheck(owners_triton.gather_ids.op, (ids_Tk, plan.token_R), test_utils=tests)
    torch.library.opcheck(plan_triton.plan_slots.op, (ids_Tk, num_experts, 20), test_utils=tests)
    torch.library.opcheck(triton.sum_rows.op, (x_TD[plan.token_R], plan.row_Tk, plan.offsets, x_TD), test_utils=tests)
    assert torch.compile(lambda x: gather_rows(x, plan, impl=impl), fullgraph=True, backend="aot_eager")(x_TD).shape
