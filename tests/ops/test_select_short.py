"""Block selection of short documents: its kernel against the reference, fp64 and the kernel for any length."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, select, summarise
from pithwood.ops.select import short_triton
from pithwood.ops.select.short_triton import Schedule
from pithwood.ops.select.triton import select_blocks
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, exact_inputs, on_device
from tests.ops.reference import Inputs, make_inputs, selected

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # The interpreter multiplies and takes maxima with numpy, which warns of infinities and of rows of NaN.
    pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered in matmul"),
    *KERNEL_MARKS,
]

MIXED = ([100, 0, 1, 37, 8], None)
CROSS = ([3, 40, 0, 9], [20, 42, 17, 4])
"""More keys than queries, and fewer: the first queries of a document stand before its first key."""


def _summary(inputs: Inputs, block: int):
    return summarise(inputs.k, inputs.packing, block, impl="torch")


def _ref(inputs: Inputs, block: int, top_k: int, **options):
    return select(inputs.q, _summary(inputs, block), inputs.packing, top_k, block_size=block, impl="ref", **options)


def _short(inputs: Inputs, block: int, top_k: int, tie: str = "later", mean_dtype: str = "input", schedule=None):
    p = inputs.packing
    arguments = (None, p.cu_q, p.cu_k, p.max_k, top_k, block, tie, mean_dtype)
    if schedule is None:
        return short_triton.select_short(inputs.q, _summary(inputs, block), *arguments)
    return short_triton.run_short(inputs.q, _summary(inputs, block), *arguments, schedule)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "block", "top_k", "dim", "heads", "kv_heads", "mode"),
    [
        (MIXED, 16, 3, 16, 4, 2, "input"),
        (MIXED, 8, 4, 80, 3, 1, "fp32"),
        (([0, 150, 70], None), 24, 4, 64, 2, 1, "centered"),
        (([513, 2], None), 128, 2, 128, 1, 1, "input"),
        (CROSS, 3, 5, 40, 4, 4, "centered"),
    ],
)
def test_the_chosen_blocks_are_those_of_fp64(dtype, lengths, block, top_k, dim, heads, kv_heads, mode):
    inputs = make_inputs(*lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, block, top_k, mode)
    ids, count = (x.cpu() for x in _short(on_device(inputs), block, top_k, mean_dtype=mode))
    differ = (ids != expected).any(-1)
    assert not (differ & (gap > 1e-5)).any()
    assert differ.double().mean() <= 0.005
    assert torch.equal(count.long(), (expected >= 0).sum(-1))


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9, 16])
def test_every_top_k_finds_the_same_as_the_reference(top_k):
    inputs = exact_inputs([64], heads=2, dim=16)
    ref, (ids, count) = _ref(inputs, 2, top_k), _short(inputs, 2, top_k)
    assert torch.equal(ids, ref.ids)
    assert torch.equal(count, ref.count)


@pytest.mark.parametrize(
    ("tie", "spread", "lengths"), [*itertools.product(["later", "earlier"], ["good", "bad"], [MIXED, CROSS])]
)
def test_every_mode_is_that_of_the_reference(tie, spread, lengths):
    # Blocks that hold a power of two of keys, so that means and scores are exact.
    lengths = ([4, 100, 0, 16], None) if lengths is MIXED else lengths
    inputs = exact_inputs(*lengths, heads=4, kv_heads=2)
    if spread == "bad":
        inputs.k[::29], inputs.k[40:42], inputs.q[1] = float("nan"), float("inf"), float("inf")
    mode = "centered" if spread == "good" else "input"
    ref, (ids, count) = _ref(inputs, 4, 4, tie=tie, mean_dtype=mode), _short(inputs, 4, 4, tie, mode)
    assert torch.equal(ids, ref.ids)
    assert torch.equal(count, ref.count)


@pytest.mark.parametrize("what", ["zero keys", "equal keys", "signed zeros"])
@pytest.mark.parametrize(("tie", "expected"), [("later", [29, 30, 31]), ("earlier", [0, 1, 31])])
def test_ties_follow_the_rule(what, tie, expected):
    inputs = on_device(make_inputs([64], dtype=torch.float16))
    if what == "zero keys":
        inputs.k.zero_()
    elif what == "equal keys":
        inputs.k.copy_(inputs.k[:1].clone())
    else:
        inputs.k.zero_()
        inputs.k[::4] = -0.0
        inputs.k[1::4] = -0.0
        inputs.q[::3] *= -1.0
    ids, _ = _short(inputs, 2, 3, tie)
    assert ids[62:].unique(dim=0).tolist() == [[expected, expected]]


@pytest.mark.parametrize("tie", ["later", "earlier"])
def test_a_tie_at_the_cut_among_scores_that_differ(tie):
    inputs = on_device(make_inputs([32], heads=1))
    inputs.q.copy_(torch.eye(16, device=DEVICE)[:1].expand_as(inputs.q))
    score = torch.tensor([1.0, 5, 2, 3, 2, 5, 2, 0, 2, 4, 1, 2, 1, 0, 0, 0], device=DEVICE)
    inputs.k.copy_(score.repeat_interleave(2)[:, None, None].expand_as(inputs.k))
    ids, _ = _short(inputs, 2, 7, tie)
    assert ids[31, 0].tolist() == ([1, 3, 5, 8, 9, 11, 15] if tie == "later" else [1, 2, 3, 4, 5, 9, 15])


def test_nan_is_never_selected_plus_infinity_first_minus_infinity_last():
    packing = Packing.from_lengths([64], device=DEVICE)
    q = torch.ones(64, 1, 4, device=DEVICE)
    summary = torch.zeros(packing.num_units_bound(64, 8), 1, 4, device=DEVICE)
    summary[:8, 0, 0] = torch.tensor([1.0, float("nan"), float("-inf"), float("inf"), 2.0, 0.5, float("nan"), 0.0])

    def last(top_k):
        arguments = (None, packing.cu_q, packing.cu_k, 64, top_k, 8, "later", "fp32")
        return short_triton.select_short(q, summary, *arguments)[0][63, 0].tolist()

    assert last(2) == [3, 7]
    assert last(3) == [3, 4, 7]
    assert last(5) == [0, 3, 4, 5, 7]
    assert last(6) == [0, 2, 3, 4, 5, 7]
    assert last(8) == [0, 2, 3, 4, 5, 7, -1, -1]


@pytest.mark.parametrize(
    "dtype", [KERNEL_DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in KERNEL_DTYPES[1:])]
)
def test_the_kernel_for_any_length_chooses_the_same_blocks(dtype):
    inputs = on_device(make_inputs(*MIXED, heads=4, kv_heads=2, dtype=dtype))
    p = inputs.packing
    for mode in ("input", "centered", "fp32"):
        gate = select_blocks(inputs.q, _summary(inputs, 4), p.cu_q, p.cu_k, True, 8, 4, True, "later", False, mode)
        ids, count = _short(inputs, 4, 8, mean_dtype=mode)
        assert torch.equal(ids, gate[0])
        assert torch.equal(count, gate[1])


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(16, 1, 4, 1),
        Schedule(64, 4, 4, 2),
        Schedule(128, 8, 8, 3, 80),
    ],
)
def test_a_schedule_changes_no_id(schedule):
    inputs = exact_inputs([70, 33], heads=6, kv_heads=2, dtype=torch.float16)
    ref, (ids, count) = _ref(inputs, 4, 4), _short(inputs, 4, 4, schedule=schedule)
    assert torch.equal(ids, ref.ids)
    assert torch.equal(count, ref.count)


def test_a_centre_that_is_not_finite_is_not_subtracted():
    inputs = exact_inputs([32, 16], heads=2)
    inputs.k[1], inputs.k[33] = float("inf"), float("nan")
    ref, (ids, _) = _ref(inputs, 2, 4, mean_dtype="centered"), _short(inputs, 2, 4, "later", "centered")
    assert torch.equal(ids, ref.ids)


def test_a_document_s_choice_does_not_depend_on_the_others():
    inputs = on_device(make_inputs([90, 45], heads=2))
    changed = Inputs(inputs.q, inputs.k.clone(), inputs.v, inputs.packing)
    changed.k[:90] = float("nan")
    assert torch.equal(_short(inputs, 4, 3)[0][90:], _short(changed, 4, 3)[0][90:])


def test_nothing_to_choose_from():
    for lengths in (([], []), ([0, 0], [5, 0]), ([2, 1], [0, 0]), ([1], [1])):
        inputs = on_device(make_inputs(*lengths, heads=2))
        ids, count = _short(inputs, 4, 3)
        own = 0 if lengths == ([1], [1]) else -1
        assert torch.equal(ids[..., 0], torch.full_like(count, own))
        assert (ids[..., 1:] == -1).all()
        assert torch.equal(count, torch.full_like(count, own + 1))


def test_rows_of_unused_offsets_are_not_there():
    inputs = on_device(make_inputs([30, 50]))
    cu = torch.tensor([0, 30, 80, 80, 80], dtype=torch.int32, device=DEVICE)
    padded = replace(inputs.packing, cu_q=cu, cu_k=cu)
    assert torch.equal(_short(inputs._replace(packing=padded), 4, 3)[0], _short(inputs, 4, 3)[0])


def test_strided_queries_and_means():
    inputs = exact_inputs([40, 33], heads=4, kv_heads=2)
    q = inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    summary = _summary(inputs, 4).transpose(0, 1).contiguous().transpose(0, 1)
    p = inputs.packing
    ids, _ = short_triton.select_short(q, summary, None, p.cu_q, p.cu_k, p.max_k, 4, 4, "later", "input")
    assert torch.equal(ids, _ref(inputs, 4, 4).ids)


def test_means_where_a_cache_holds_them():
    inputs = exact_inputs(*CROSS, heads=4, kv_heads=2)
    summary, p = _summary(inputs, 4), inputs.packing
    offsets = p.unit_offsets(4).tolist()
    room = torch.full_like(summary[:2], float("nan"))
    parts, start, at = [], [0] * p.num_docs, 0
    for n in reversed(range(p.num_docs)):
        parts += [room, summary[offsets[n] : offsets[n + 1]]]
        start[n] = at + len(room)
        at += len(room) + offsets[n + 1] - offsets[n]
    start_N = torch.tensor(start, device=DEVICE)
    arguments = (start_N, p.cu_q, p.cu_k, p.max_k, 4, 4, "later", "centered")
    ids, _ = short_triton.select_short(inputs.q, torch.cat([*parts, room]), *arguments)
    assert torch.equal(ids, _short(inputs, 4, 4, "later", "centered")[0])


def test_select_takes_this_kernel_for_short_documents():
    def fits(packing: Packing, top_k: int = 8, units: int = 10**6) -> bool:
        return short_triton.selects_short(packing, units, top_k, 128, held=False)

    assert fits(Packing.from_lengths([4096, 1]))
    assert fits(Packing.from_lengths([1], [4096]))
    assert not fits(Packing.from_lengths([4097]))
    assert not fits(Packing.from_lengths([4096]), top_k=17)
    inputs = on_device(make_inputs([62, 40], heads=2, dtype=torch.float16))
    options = {"block_size": 2, "mean_dtype": "centered", "impl": "triton"}
    chosen = select(inputs.q, _summary(inputs, 2), inputs.packing, 3, **options)
    assert torch.equal(chosen.ids, _short(inputs, 2, 3, "later", "centered")[0])
    assert chosen.own


@pytest.mark.parametrize("blocks", [17, 32, 33])
def test_the_own_block_needs_no_summary_where_a_cache_holds_them(blocks):
    inputs = exact_inputs([40], [16 * blocks - 5], heads=2)
    complete, start_N = _summary(inputs, 16)[: blocks - 1], torch.tensor([0], device=DEVICE)
    options = {"block_size": 16, "mean_dtype": "centered", "unit_start_N": start_N}
    fast, exact = (select(inputs.q, complete, inputs.packing, 4, **options, impl=impl) for impl in ("triton", "ref"))
    assert torch.equal(fast.ids, exact.ids)
    assert torch.equal(fast.count, exact.count)
    assert short_triton.selects_short(inputs.packing, blocks - 1, 4, 16, held=True) == (blocks <= 32)


def test_it_is_one_opaque_operation_to_the_compiler():
    inputs = on_device(make_inputs([40, 24], heads=2))

    @torch.compile(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    def chosen(q, k):
        summary = summarise(k, inputs.packing, 8, impl="triton")
        return select(q + 0.0, summary, inputs.packing, 3, block_size=8, impl="triton").ids

    assert torch.equal(chosen(inputs.q, inputs.k), _short(inputs, 8, 3)[0])


def test_the_custom_op_passes_torch_s_own_checks():
    inputs = on_device(make_inputs([40, 33], heads=2))
    p = inputs.packing
    arguments = (inputs.q, _summary(inputs, 4), None, p.cu_q, p.cu_k, p.max_k, 3, 4, "later", "centered")
    torch.library.opcheck(short_triton.select_short.op, arguments)
