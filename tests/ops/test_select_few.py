"""Block selection of decode steps: the kernels of few queries against the reference, fp64 and each other's ids."""

from __future__ import annotations

import itertools

import pytest
import torch

from pithwood.ops import Packing, select, summarise
from pithwood.ops.select import few_triton
from pithwood.ops.select.triton import select_blocks
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, exact_inputs, on_device
from tests.ops.reference import Inputs, make_inputs, selected

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # The interpreter multiplies and takes maxima with numpy, which warns of infinities and of rows of NaN.
    pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered in matmul"),
    *KERNEL_MARKS,
]

STEPS = ([1, 3, 0, 2, 1, 2, 0, 16], [130, 70, 25, 2, 1, 0, 0, 90])
"""Decode steps of documents of many lengths: without new queries, without keys, of the new tokens alone."""


def _summary(inputs: Inputs, block: int):
    return summarise(inputs.k, inputs.packing, block, impl="torch")


def _select(inputs: Inputs, block: int, top_k: int, impl: str = "triton", **options):
    return select(inputs.q, _summary(inputs, block), inputs.packing, top_k, block_size=block, impl=impl, **options)


def _few(inputs: Inputs, block: int, top_k: int, tie: str = "later", mean_dtype: str = "input"):
    p = inputs.packing
    arguments = (None, p.cu_q, p.cu_k, p.max_q, p.max_k, top_k, block, tie, mean_dtype)
    return few_triton.select_few(inputs.q, _summary(inputs, block), *arguments)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("block", "top_k", "dim", "heads", "kv_heads", "mode"),
    [
        (16, 3, 16, 4, 2, "input"),
        (4, 4, 80, 6, 2, "centered"),
        (3, 5, 40, 8, 1, "fp32"),
        (2, 16, 128, 1, 1, "centered"),
    ],
)
def test_the_chosen_blocks_are_those_of_fp64(dtype, block, top_k, dim, heads, kv_heads, mode):
    inputs = make_inputs(*STEPS, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, block, top_k, mode)
    ids, count = (x.cpu() for x in _few(on_device(inputs), block, top_k, mean_dtype=mode))
    differ = (ids != expected).any(-1)
    assert not (differ & (gap > 1e-5)).any()
    assert differ.double().mean() <= 0.02
    assert torch.equal(count.long(), (expected >= 0).sum(-1))


@pytest.mark.parametrize(
    ("top_k", "tie", "spread"), [*itertools.product([1, 2, 4], ["later", "earlier"], ["good", "bad"])]
)
def test_every_mode_is_that_of_the_reference(top_k, tie, spread):
    # Lengths that give every block a power of two of keys, so that means and scores are exact.
    inputs = exact_inputs([3, 12, 0, 9], [20, 42, 17, 4], heads=4, kv_heads=2)
    if spread == "bad":
        inputs.k[::29], inputs.k[40:42], inputs.q[1] = float("nan"), float("inf"), float("inf")
    mode = "centered" if spread == "good" else "input"
    ref = _select(inputs, 2, top_k, "ref", tie=tie, mean_dtype=mode)
    ids, count = _few(inputs, 2, top_k, tie, mode)
    assert torch.equal(ids, ref.ids)
    assert torch.equal(count, ref.count)


@pytest.mark.parametrize("what", ["zero keys", "equal keys", "signed zeros"])
@pytest.mark.parametrize(("tie", "expected"), [("later", [147, 148, 149]), ("earlier", [0, 1, 149])])
def test_ties_follow_the_rule_across_programs(what, tie, expected):
    inputs = on_device(make_inputs([2], [300], dtype=torch.float16))
    if what == "zero keys":
        inputs.k.zero_()
    elif what == "equal keys":
        inputs.k.copy_(inputs.k[:1].clone())
    else:
        inputs.k.zero_()
        inputs.k[::4] = -0.0
        inputs.k[1::4] = -0.0
        inputs.q[::2] *= -1.0
    ids, _ = _few(inputs, 2, 3, tie)
    assert ids.unique(dim=0).tolist() == [[expected, expected]]


def test_a_centre_that_is_not_finite_is_not_subtracted():
    inputs = exact_inputs([2], [80], heads=2)
    inputs.k[1] = float("inf")
    ref, (ids, _) = _select(inputs, 2, 4, "ref", mean_dtype="centered"), _few(inputs, 2, 4, "later", "centered")
    assert torch.equal(ids, ref.ids)


def test_the_gate_of_training_chooses_the_same_blocks():
    inputs = exact_inputs(*STEPS, heads=4, kv_heads=2)
    p, summary = inputs.packing, _summary(inputs, 2)
    ids, count = select_blocks(inputs.q, summary, p.cu_q, p.cu_k, True, 5, 2, True, "later", False, "input")
    few = _few(inputs, 2, 5)
    assert torch.equal(few[0], ids)
    assert torch.equal(few[1], count)


def test_more_documents_than_are_counted_at_a_time():
    num_docs = few_triton.DOCS_CHUNK + 3
    inputs = exact_inputs([0] * (num_docs - 2) + [1, 1], [3] * (num_docs - 2) + [40, 33], heads=2)
    ref, (ids, _) = _select(inputs, 2, 4, "ref"), _few(inputs, 2, 4)
    assert torch.equal(ids, ref.ids)


def test_more_rows_than_a_program_takes():
    inputs = exact_inputs([9, 16], [60, 40], heads=16, kv_heads=2)
    assert few_triton.MOST_ROWS < 16 * 8
    ref, (ids, _) = _select(inputs, 2, 3, "ref"), _few(inputs, 2, 3)
    assert torch.equal(ids, ref.ids)


def test_a_document_s_choice_does_not_depend_on_the_others():
    inputs = on_device(make_inputs([1, 2, 1], [90, 45, 60], heads=2))
    changed = Inputs(inputs.q, inputs.k.clone(), inputs.v, inputs.packing)
    changed.k[:90] = float("nan")
    assert torch.equal(_few(inputs, 4, 3)[0][1:], _few(changed, 4, 3)[0][1:])


def test_nothing_to_choose_from():
    for lengths in (([], []), ([0, 0], [5, 0]), ([2, 1], [0, 0]), ([1], [1])):
        inputs = on_device(make_inputs(*lengths, heads=2))
        ids, count = _few(inputs, 4, 3)
        own = 0 if lengths == ([1], [1]) else -1
        assert torch.equal(ids[..., 0], torch.full_like(count, own))
        assert (ids[..., 1:] == -1).all()
        assert torch.equal(count, torch.full_like(count, own + 1))


def test_select_takes_these_kernels_for_decode_steps():
    def fits(packing: Packing, top_k: int = 8, block: int = 128, units: int = 10**6) -> bool:
        return few_triton.decodes_few(packing, 32, units, top_k, block)

    assert fits(Packing.from_lengths([1] * 32, [131072] * 32))
    assert fits(Packing.from_lengths([16], [2**20]))
    assert not fits(Packing.from_lengths([17], [2**20]))
    assert not fits(Packing.from_lengths([1], [2**20]), top_k=17)
    assert not fits(Packing.from_lengths([1], [2**20]), block=64)
    inputs = on_device(make_inputs(*STEPS, heads=4, kv_heads=2))
    chosen = _select(inputs, 4, 3, mean_dtype="centered")
    assert torch.equal(chosen.ids, _few(inputs, 4, 3, "later", "centered")[0])
    assert chosen.own


def test_the_custom_op_passes_torch_s_own_checks():
    inputs = on_device(make_inputs([1, 2], [40, 33], heads=2))
    p = inputs.packing
    arguments = (inputs.q, _summary(inputs, 4), None, p.cu_q, p.cu_k, p.max_q, p.max_k, 3, 4, "later", "centered")
    torch.library.opcheck(few_triton.select_few.op, arguments)


@pytest.mark.parametrize(
    ("impl", "route_per"),
    [
        ("ref", "q_head"),
        ("ref", "kv_group"),
        ("torch", "q_head"),
        ("torch", "kv_group"),
        ("triton", "q_head"),
        pytest.param("triton", "kv_group", marks=pytest.mark.slow),
    ],
)
def test_means_where_a_cache_holds_them_give_the_ids_of_packed_ones(impl, route_per):
    inputs = exact_inputs(*STEPS, heads=4, kv_heads=2)
    summary, block = _summary(inputs, 2), 2
    offsets = inputs.packing.unit_offsets(block).tolist()
    complete = (inputs.packing.cu_k.diff() // block).tolist()
    room = torch.full_like(summary[:3], float("nan"))
    parts, start, at = [], [0] * len(complete), 0
    for n in reversed(range(len(complete))):
        parts += [room, summary[offsets[n] : offsets[n] + complete[n]]]
        start[n] = at + len(room)
        at += len(room) + complete[n]
    options = {"block_size": block, "impl": impl, "route_per": route_per, "mean_dtype": "centered"}
    at_N = torch.tensor(start, device=DEVICE)
    found = select(inputs.q, torch.cat([*parts, room]), inputs.packing, 4, unit_start_N=at_N, **options)
    expected = select(inputs.q, summary, inputs.packing, 4, **options)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.count, expected.count)


def test_starts_that_do_not_fit_are_refused():
    inputs = on_device(make_inputs([1, 2], [20, 30]))
    with pytest.raises(ValueError, match=r"one row number per document, \[2\]"):
        select(inputs.q, _summary(inputs, 4), inputs.packing, 2, block_size=4, unit_start_N=inputs.packing.cu_k)
    both_ways = on_device(make_inputs([1, 2], [20, 30], causal=False))
    start_N = both_ways.packing.cu_k[:-1]
    with pytest.raises(ValueError, match="unit_start is for complete blocks"):
        select(both_ways.q, _summary(both_ways, 4), both_ways.packing, 2, block_size=4, unit_start_N=start_N)


def test_strided_queries_and_means():
    inputs = exact_inputs([1, 2], [40, 33], heads=4, kv_heads=2)
    q = inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    summary = _summary(inputs, 2).transpose(0, 1).contiguous().transpose(0, 1)
    p = inputs.packing
    ids, _ = few_triton.select_few(q, summary, None, p.cu_q, p.cu_k, p.max_q, p.max_k, 4, 2, "later", "input")
    assert torch.equal(ids, _select(inputs, 2, 4, "ref").ids)


def test_rows_of_unused_offsets_are_not_there():
    packing = Packing.from_lengths([1, 1, 0, 0], [40, 30, 0, 0], device=DEVICE)
    inputs = Inputs(*exact_inputs([1, 1], [40, 30])[:3], packing)
    assert torch.equal(_few(inputs, 2, 4)[0], _select(inputs, 2, 4, "ref").ids)
