"""The kernel of the gate: the sets of fp64 and of the reference, every switch, hard inputs, packing, compilation."""

from __future__ import annotations

import functools
import importlib
import itertools
from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, Selection, select, summarise
from pithwood.ops.select.means import rounded_means
from pithwood.ops.select.triton import _as_scored, select_blocks
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, exact_inputs, on_device
from tests.ops.reference import Inputs, make_inputs, selected

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # The interpreter takes maxima with numpy, which warns of rows in which nothing is left.
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
    *KERNEL_MARKS,
]


def _select(inputs: Inputs, block: int, top_k: int, impl: str = "triton", **options):
    summary = summarise(inputs.k, inputs.packing, block, impl="torch")
    run = _gate if impl == "triton" else functools.partial(select, impl=impl)
    return run(inputs.q, summary, inputs.packing, top_k, block_size=block, **options)


def _gate(q, s, p, top_k, *, block_size, forced=None, tie="later", route_per="q_head", mean_dtype="input") -> Selection:
    """`select` by the kernel for documents of any length, though `select` has others for these."""
    own = (forced or ("own" if p.causal else "none")) == "own"
    per_group = route_per == "kv_group"
    ids, count = select_blocks(q, s, p.cu_q, p.cu_k, p.causal, top_k, block_size, own, tie, per_group, mean_dtype)
    return Selection(ids, count, block_size, 1, own)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "block", "top_k", "dim", "heads", "kv_heads", "mode"),
    [
        ([100, 0, 1, 37, 8], 16, 3, 16, 4, 2, "input"),
        ([0, 150, 70], 24, 4, 64, 2, 1, "centered"),
        ([500], 64, 3, 80, 2, 2, "fp32"),
        ([513, 2], 128, 2, 128, 1, 1, "input"),
        ([600], 150, 3, 40, 4, 1, "centered"),
        ([90], 8, 3, 256, 1, 1, "input"),
    ],
)
def test_the_chosen_blocks_are_those_of_fp64(dtype, lengths, block, top_k, dim, heads, kv_heads, mode):
    inputs = make_inputs(lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, block, top_k, mode)
    found = _select(on_device(inputs), block, top_k, mean_dtype=mode)
    differ = (found.ids.cpu() != expected).any(-1)
    assert not (differ & (gap > 1e-5)).any()
    assert differ.double().mean() <= 0.005
    assert torch.equal(found.count.cpu().long(), (expected >= 0).sum(-1))
    assert found.own
    assert found.ids.dtype == found.count.dtype == torch.int32


@pytest.mark.parametrize(
    ("top_k", "route_per", "dtype"),
    [
        *itertools.product([1, 2, 3, 8, 9, 10, 16], ["q_head", "kv_group"], [torch.float32]),
        *itertools.product([2, 9, 16, 17], ["q_head"], [torch.float16]),
        (64, "q_head", torch.float32),
    ],
)
def test_every_top_k_finds_the_same_as_the_reference(top_k, route_per, dtype):
    inputs = exact_inputs([138], heads=1 if top_k == 64 else 2, dim=16, dtype=dtype)
    ref, fast = (_select(inputs, 2, top_k, impl, route_per=route_per) for impl in ("ref", "triton"))
    assert torch.equal(ref.ids, fast.ids)
    assert torch.equal(ref.count, fast.count)


SWITCHES = list(
    itertools.product([True, False], ["own", "none"], ["later", "earlier"], ["q_head", "kv_group"], ["good", "bad"])
)
FIRST = SWITCHES[0]
SWITCHES_BY_SPEED = [
    pytest.param(*case, marks=pytest.mark.slow if sum(a != b for a, b in zip(case, FIRST, strict=True)) % 2 else ())
    for case in SWITCHES
]
"""Those that differ from the first in an odd number of switches are slow: the others hold every setting of any four."""


@pytest.mark.parametrize(("causal", "forced", "tie", "route_per", "spread"), SWITCHES_BY_SPEED)
def test_every_mode_is_that_of_the_reference(causal, forced, tie, route_per, spread):
    # Lengths that give every block a power of two of keys, so that means and scores are exact.
    for lengths, key_lengths in (([0, 4, 72, 0], None), ([3, 40, 0, 9], [20, 42, 17, 4])):
        inputs = exact_inputs(lengths, key_lengths, heads=2, causal=causal)
        if spread == "bad":
            inputs.k[::29], inputs.k[40:42], inputs.q[1] = float("nan"), float("inf"), float("inf")
        options = {"forced": forced, "tie": tie, "route_per": route_per}
        options["mean_dtype"] = "centered" if spread == "good" and causal else "input"
        ref, fast = (_select(inputs, 8, 4, impl, **options) for impl in ("ref", "triton"))
        assert torch.equal(ref.ids, fast.ids), (lengths, key_lengths)
        assert torch.equal(ref.count, fast.count)


@pytest.mark.parametrize("what", ["zero keys", "equal keys", "duplicated blocks", "signed zeros"])
@pytest.mark.parametrize(("tie", "expected"), [("later", [147, 148, 149]), ("earlier", [0, 1, 149])])
def test_ties_follow_the_rule_across_tiles(what, tie, expected):
    inputs = on_device(make_inputs([300], dtype=torch.float16))
    if what == "zero keys":
        inputs.k.zero_()
    elif what == "equal keys":
        inputs.k.copy_(inputs.k[:1].clone())
    elif what == "signed zeros":
        inputs.k.zero_()
        inputs.k[::4] = -0.0
        inputs.k[1::4] = -0.0
        inputs.q[::3] *= -1.0
    else:
        inputs.k.copy_(inputs.k[:2].clone().repeat(150, 1, 1))
    found = _select(inputs, 2, 3, tie=tie)
    assert found.ids[298:].unique(dim=0).tolist() == [[expected, expected]]


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("tie", ["later", "earlier"])
def test_scores_in_the_order_that_moves_the_list_most(order, tie):
    inputs = on_device(make_inputs([300], heads=1))
    inputs.q.copy_(torch.ones_like(inputs.q))
    score = torch.arange(150, device=DEVICE).repeat_interleave(2)[:, None, None]
    inputs.k.copy_((score if order == "ascending" else -score).expand_as(inputs.k))
    ids = _select(inputs, 2, 5, tie=tie).ids[:, 0].cpu()
    for t in (2, 9, 130, 299):
        own = t // 2
        best = range(max(own - 4, 0), own) if order == "ascending" else range(min(4, own))
        assert ids[t][ids[t] >= 0].tolist() == [*best, own]


@pytest.mark.parametrize(
    ("sign", "tie"),
    [
        (1, "later"),
        (-1, "earlier"),
        pytest.param(1, "earlier", marks=pytest.mark.slow),
        pytest.param(-1, "later", marks=pytest.mark.slow),
    ],
)
def test_best_scores_a_tile_apart_or_a_bit_apart(tie, sign):
    inputs = on_device(make_inputs([1200], heads=1))
    inputs.q.copy_(torch.eye(16, device=DEVICE)[:1].expand_as(inputs.q))
    score = torch.arange(600, device=DEVICE) % 97 - 200.0
    score[torch.arange(7, 600, 64)] = torch.arange(10, device=DEVICE) + 1.0  # one column, whatever the tile
    score[torch.arange(400, 420)] += 200 + torch.arange(20, device=DEVICE) * 2.0**-21
    score = sign * score
    inputs.k.copy_(score.repeat_interleave(2)[:, None, None].expand_as(inputs.k))
    ref, fast = (_select(inputs, 2, 6, impl, tie=tie, mean_dtype="fp32") for impl in ("ref", "triton"))
    assert torch.equal(ref.ids, fast.ids)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("route_per", ["q_head", "kv_group"])
@pytest.mark.parametrize(
    ("segment", "parts", "with_some"), [(64, 4, [0, 1, 2, 5, 6, 7, 8, 9, 10, 12, 13]), (256, 2, [0, 3, 4, 5, 6])]
)
def test_rows_in_doubt_are_sought_again_from_the_lists_of_all_segments(
    segment, parts, with_some, dtype, route_per, monkeypatch
):
    gate = importlib.import_module("pithwood.ops.select.triton")
    listed = []
    kernel = gate.listed_kernel

    class Recorded:
        def __getitem__(self, grid):
            def launch(*args, **options):
                listed.append(args[5].clone())
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(gate, "SEGMENT", segment)
    monkeypatch.setattr(gate, "LIST_PARTS", parts)
    monkeypatch.setattr(gate, "listed_kernel", Recorded())
    inputs = exact_inputs([150, 0, 1, 290, 64, 129], heads=4, kv_heads=2, dim=16, dtype=dtype)
    inputs.k[151:441] = 0
    ref, fast = (_select(inputs, 2, 5, impl, route_per=route_per) for impl in ("ref", "triton"))
    assert torch.equal(ref.ids, fast.ids)
    assert torch.equal(ref.count, fast.count)
    # Document n has its segments from its first row // segment + n on. Small whole numbers tie in each, but for that of
    # the document of one row and, of 64 rows, that of the last document's last row.
    rows = listed[0].sum(1).tolist()
    assert [n for n, some in enumerate(rows[:14]) if some] == with_some
    # the tiles of a list are more than the programs that share it
    assert segment == 64 or listed[0].max() > 64 * parts
    assert sum(rows) < 634 * ref.ids.shape[1]


def test_nan_is_never_selected_plus_infinity_first_minus_infinity_last():
    packing = Packing.from_lengths([64], device=DEVICE)
    q = torch.ones(64, 1, 4, device=DEVICE)
    summary = torch.zeros(packing.num_units_bound(64, 8), 1, 4, device=DEVICE)
    summary[:8, 0, 0] = torch.tensor([1.0, float("nan"), float("-inf"), float("inf"), 2.0, 0.5, float("nan"), 0.0])

    def last(top_k):
        return _gate(q, summary, packing, top_k, block_size=8, mean_dtype="fp32").ids[63, 0].tolist()

    assert last(2) == [3, 7]
    assert last(3) == [3, 4, 7]
    assert last(5) == [0, 3, 4, 5, 7]
    assert last(6) == [0, 2, 3, 4, 5, 7]
    assert last(8) == [0, 2, 3, 4, 5, 7, -1, -1]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_means_are_rounded_as_the_reference_rounds_them(dtype):
    from pithwood.ops.offsets_triton import block_offsets

    inputs = on_device(make_inputs([0, 50, 7, 0, 33, 0], kv_heads=2, dim=24, dtype=dtype))
    inputs.k[3, 0], inputs.k[51, 1] = float("nan"), float("inf")
    summary = summarise(inputs.k, inputs.packing, 8)
    num_units = 7 + 1 + 5
    for mode in ("input", "centered", "fp32"):
        expected = rounded_means(summary, inputs.packing, 8, mode, dtype)[:num_units]
        wanted = torch.float32 if mode == "fp32" else dtype
        found = _as_scored(summary, block_offsets(inputs.packing.cu_k, 8), mode, dtype, wanted)[:num_units]
        assert found.dtype == wanted
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0, equal_nan=True)


def test_a_document_selects_the_same_alone_packed_and_in_any_order():
    inputs = on_device(make_inputs([150, 33, 97], heads=2, dtype=torch.float16))
    packed = _select(inputs, 8, 4, mean_dtype="centered").ids
    order = [*range(183, 280), *range(150), *range(150, 183)]
    permuted = inputs._replace(
        q=inputs.q[order], k=inputs.k[order], packing=Packing.from_lengths([97, 150, 33], device=DEVICE)
    )
    assert torch.equal(_select(permuted, 8, 4, mean_dtype="centered").ids, packed[order])
    alone = inputs._replace(q=inputs.q[183:], k=inputs.k[183:], packing=Packing.from_lengths([97], device=DEVICE))
    assert torch.equal(_select(alone, 8, 4, mean_dtype="centered").ids, packed[183:])


def test_strided_queries_and_summaries_need_no_copy():
    fused = torch.randn(100, 5, 32, device=DEVICE)
    packing = Packing.from_lengths([60, 40], device=DEVICE)
    summary = torch.randn(packing.num_units_bound(100, 8), 2, 48, device=DEVICE)
    found = _gate(fused[:, 1:3, ::2], summary[..., 8:24], packing, 3, block_size=8)
    expected = _gate(fused[:, 1:3, ::2].contiguous(), summary[..., 8:24].contiguous(), packing, 3, block_size=8)
    assert torch.equal(found.ids, expected.ids)


def test_heads_of_a_group_may_lie_2_31_elements_apart(tmp_path):
    packing = Packing.from_lengths([60], device=DEVICE)
    q = torch.randn(60, 3, 16, dtype=torch.float16)
    summary = torch.randn(packing.num_units_bound(60, 8), 1, 16, dtype=torch.float16, device=DEVICE)
    size = 2**31 + 60 * 16
    if DEVICE == "cuda":
        whole = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:  # of a file, which takes no memory where nothing is written
        whole = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    far = whole.as_strided((60, 3, 16), (16, 2**30, 1))
    far.copy_(q)
    options = {"block_size": 8, "route_per": "kv_group"}
    found, expected = (_gate(x, summary, packing, 3, **options) for x in (far, q.to(DEVICE)))
    assert torch.equal(found.ids, expected.ids)


def test_unused_offsets_at_the_end_and_no_documents_at_all():
    inputs = on_device(make_inputs([30, 50]))
    cu = torch.tensor([0, 30, 80, 80, 80], dtype=torch.int32, device=DEVICE)
    padded = replace(inputs.packing, cu_q=cu, cu_k=cu)
    assert torch.equal(_select(inputs._replace(packing=padded), 8, 3).ids, _select(inputs, 8, 3).ids)
    for lengths in ([], [0, 0]):
        assert _select(on_device(make_inputs(lengths)), 8, 3).ids.shape == (0, 2, 3)


def test_sizes_that_do_not_fit_are_refused_by_name():
    inputs = on_device(make_inputs([16]))
    wide, double = (on_device(make_inputs([16], **other)) for other in ({"dim": 264}, {"dtype": torch.float64}))
    for given, top_k, message in (
        (inputs, 65, "top_k up to 64, got 65; use impl='torch'"),
        (wide, 2, "head dims up to 256, got 264"),
        (double, 2, r"fp32, fp16 and bf16, got torch\.float64"),
    ):
        summary = summarise(given.k, given.packing, 8, impl="torch")
        with pytest.raises(ValueError, match=message):
            select(given.q, summary, given.packing, top_k, block_size=8, impl="triton")


def test_it_is_one_opaque_operation_to_the_compiler():
    inputs = on_device(make_inputs([40, 24]))

    @torch.compile(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    def chosen(q, k):
        # More blocks than the kernel of short documents takes.
        summary = summarise(k, inputs.packing, 1, impl="triton")
        return select(q + 0.0, summary, inputs.packing, 3, block_size=1, impl="triton").ids

    assert torch.equal(chosen(inputs.q, inputs.k), _select(inputs, 1, 3).ids)
    summary = summarise(inputs.k, inputs.packing, 8)
    cu = inputs.packing.cu_q
    args = (inputs.q, summary, cu, cu, True, 3, 8, True, "later", False, "input")
    torch.library.opcheck(select_blocks.op, args, test_utils=("test_schema", "test_faketensor"))
