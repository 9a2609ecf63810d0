"""`decode_attend` against fp64 masks: its kernels on the GPU where there is one, else in the interpreter; and by whom a
call is taken.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, Selection, attend, attention_mass, decode_attend, summarise
from pithwood.ops.decode import decodes_by_kernel
from pithwood.ops.decode import triton as schedule
from pithwood.ops.dense_attention import dense_attention
from tests.numerics import assert_close
from tests.ops.attending import expected_attention, moba_selection
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, ON_GPU, on_device
from tests.ops.reference import Inputs, assert_lse_close, attention, dense_masks, make_inputs, random_selection

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]

STEPS = ([1, 3, 0, 2, 1, 2, 0], [130, 70, 25, 2, 1, 0, 0])
"""Decode steps of documents of many lengths: without new queries, without keys, of the new tokens alone."""


def _expected(inputs, selection):
    if selection is not None:
        return expected_attention(inputs, selection)
    return attention(*inputs, dense_masks(inputs.packing, inputs.q.shape[1]))


def _run(inputs, selection, impl="triton", **options):
    moved = on_device(inputs)
    if selection is not None:
        selection = replace(selection, ids=selection.ids.to(DEVICE), count=selection.count.to(DEVICE))
    o, lse = decode_attend(*moved, selection, impl=impl, **options)
    return o.cpu(), lse.cpu()


def _check(inputs, selection, tol=None, **options):
    """Output and log-sums of one call against the reference; returns the output."""
    o, lse = _run(inputs, selection, **options)
    expected_o, expected_lse = (x.detach() for x in _expected(inputs, selection))
    tol = tol or (1e-5 if o.dtype == torch.float32 else None)
    assert (o.dtype, lse.dtype) == (inputs.q.dtype, torch.float32)
    assert_close(o, expected_o, tol, "o")
    assert_lse_close(lse, expected_lse, tol or 5e-3)
    assert torch.count_nonzero(o[expected_lse == float("-inf")]) == 0
    return o


@pytest.mark.parametrize(
    ("block", "causal"),
    [
        (16, True),
        (33, False),
        (150, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((16, False), (33, True), (150, False))),
    ],
)
def test_selected_blocks_of_documents_of_all_kinds(causal, block):
    inputs = make_inputs(*STEPS, heads=4, kv_heads=2, causal=causal)
    _check(inputs, moba_selection(inputs, block, 3))


@pytest.mark.parametrize("causal", [True, False])
def test_all_keys_of_documents_of_all_kinds(causal):
    _check(make_inputs(*STEPS, heads=4, kv_heads=2, causal=causal), None)


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 8])
def test_grouped_heads(ratio, selected):
    inputs = make_inputs([1, 2], [90, 47], heads=2 * ratio, kv_heads=2)
    _check(inputs, moba_selection(inputs, 16, 3) if selected else None)


@pytest.mark.parametrize("selected", [True, False])
def test_more_rows_than_a_program_takes(selected):
    inputs = make_inputs([0, 6], [5, 60], heads=8, kv_heads=1)
    assert schedule.tiles_for(16, 4).rows < 6 * 8
    _check(inputs, moba_selection(inputs, 16, 2) if selected else None)


@pytest.mark.parametrize("top_k", [1, 2, 5, 16])
def test_every_number_of_slots_also_more_than_there_are_blocks(top_k):
    inputs = make_inputs([1, 2, 1], [100, 40, 16], heads=4, kv_heads=2)
    _check(inputs, moba_selection(inputs, 16, top_k))


@pytest.mark.parametrize("filled", [1, 2, 15, 16])
def test_an_own_block_filled_to_any_degree(filled):
    inputs = make_inputs([1], [48 + filled], heads=2)
    _check(inputs, moba_selection(inputs, 16, 2))


@pytest.mark.parametrize(("sets", "row_size", "own"), [(1, 1, True), (1, 1, False), (2, 64, False), (4, 2, False)])
def test_selections_per_tile_shared_by_heads_or_empty(sets, row_size, own):
    inputs = make_inputs(*STEPS, heads=4, kv_heads=2)
    _check(inputs, random_selection(inputs.packing, 16, 4, sets=sets, row_size=row_size, own=own))


def test_ids_past_the_query_and_past_the_document_are_not_seen():
    inputs = make_inputs([2], [40], heads=2)
    ids = torch.tensor([0, 2, 3, 2**31 - 1], dtype=torch.int32).expand(2, 2, 4)
    seen = torch.tensor([0, 2, -1, -1], dtype=torch.int32).expand(2, 2, 4)
    count = torch.full((2, 2), 2, dtype=torch.int32)
    o, lse = _run(inputs, Selection(ids, count, 16))
    expected = _run(inputs, Selection(seen, count, 16))
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    _check(inputs, Selection(seen, count, 16))


@pytest.mark.parametrize("selected", [True, False])
def test_keys_and_units_cut_into_several_pieces(selected):
    lengths = [1, 2], [2 * schedule.LEAST_PIECE + 45, 700]
    inputs = make_inputs(*lengths, heads=4, kv_heads=2)
    _check(inputs, moba_selection(inputs, 300, 2) if selected else None)


def test_many_pieces_merge_in_channels():
    keys = (schedule.MANY_PIECES + 2) * schedule.LEAST_PIECE - 7
    _check(make_inputs([1], [keys], heads=1, dim=40), None)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 40), (192, 128)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("selected", [True, False])
def test_head_dims_and_dtypes(dim, value_dim, dtype, selected):
    inputs = make_inputs([1, 2], [90, 45], heads=2, dim=dim, value_dim=value_dim, dtype=dtype)
    _check(inputs, moba_selection(inputs, 32, 2) if selected else None)


@pytest.mark.parametrize("selected", [True, False])
def test_large_logits_and_a_scale_of_ones_own(selected):
    inputs = make_inputs([1, 2], [90, 45], heads=2)
    inputs = Inputs(inputs.q.detach() * 30, *inputs[1:])
    selection = moba_selection(inputs, 32, 2) if selected else None
    o, lse = _run(inputs, selection, scale=0.7)
    masked = {"scale": 0.7}
    if selection is not None:
        expected = expected_attention(inputs, selection, **masked)
    else:
        expected = attention(*inputs, dense_masks(inputs.packing, 2), **masked)
    assert_close(o, expected[0].detach(), 1e-5)
    assert_close(lse, expected[1].detach(), 1e-5)


def _with_room(inputs: Inputs, room: int) -> tuple[Inputs, torch.Tensor]:
    """The documents' keys and values in reverse order with NaN between, and where they begin."""
    cu_k = inputs.packing.cu_k.tolist()
    start = torch.zeros(len(cu_k) - 1, dtype=torch.int64)
    parts: list[list[torch.Tensor]] = [[], []]
    at = 0
    for n in reversed(range(len(cu_k) - 1)):
        start[n] = at + room
        for part, x in zip(parts, (inputs.k, inputs.v), strict=True):
            part += [torch.full_like(x[:1], float("nan")).expand(room, -1, -1), x[cu_k[n] : cu_k[n + 1]]]
        at += room + cu_k[n + 1] - cu_k[n]
    k, v = (torch.cat([*part, torch.full_like(part[0], float("nan"))]).detach() for part in parts)
    return Inputs(inputs.q.detach(), k, v, inputs.packing), start


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("selected", [True, False])
def test_keys_where_a_cache_holds_them_give_the_digits_of_packed_ones(selected, impl):
    inputs = make_inputs(*STEPS, heads=4, kv_heads=2)
    selection = moba_selection(inputs, 16, 3) if selected else None
    spread, start = _with_room(inputs, 9)
    o, lse = _run(spread, selection, impl, key_start_N=start.to(DEVICE))
    expected_o, expected_lse = _run(inputs, selection, impl)
    assert torch.equal(o, expected_o)
    assert torch.equal(lse, expected_lse)


def test_a_document_s_digits_do_not_depend_on_the_others():
    inputs = make_inputs([1, 2, 1], [90, 45, 60], heads=2)
    selection = moba_selection(inputs, 16, 3)
    changed = Inputs(inputs.q, *(x.detach().clone() for x in inputs[1:3]), inputs.packing)
    changed.k[:90] += 1.0
    changed.v[:90] = 1e30
    assert torch.equal(_run(inputs, selection)[0][1:], _run(changed, selection)[0][1:])
    assert torch.equal(_run(inputs, None)[0][1:], _run(changed, None)[0][1:])


def test_keys_after_a_query_do_not_touch_its_digits():
    inputs = make_inputs([4], [50], heads=2)
    changed = Inputs(inputs.q, *(x.detach().clone() for x in inputs[1:3]), inputs.packing)
    changed.k[48:] += 1.0
    changed.v[48:] = 1e30
    selection = moba_selection(inputs, 16, 2)
    for chosen in (selection, None):
        assert torch.equal(_run(inputs, chosen)[0][:2], _run(changed, chosen)[0][:2])


def test_strided_queries_keys_and_values_of_a_fused_projection():
    inputs = make_inputs([1, 2], [90, 45], heads=4, kv_heads=2)
    fused = torch.cat([inputs.k, inputs.v], dim=1).detach()
    strided = Inputs(inputs.q.detach().transpose(0, 1).contiguous().transpose(0, 1), *fused.split(2, 1), inputs.packing)
    _check(strided, moba_selection(inputs, 16, 3))
    _check(strided, None)


@pytest.mark.parametrize("selected", [True, False])
def test_no_queries_no_keys_no_documents(selected):
    for lengths in (([], []), ([0, 0], [5, 0]), ([2, 1], [0, 0])):
        inputs = make_inputs(*lengths, heads=2)
        selection = random_selection(inputs.packing, 16, 2, sets=2) if selected else None
        o, lse = _run(inputs, selection)
        assert o.shape == inputs.q.shape
        assert torch.count_nonzero(o) == 0
        assert (lse == float("-inf")).all()


def test_bounds_larger_than_the_documents_change_nothing_but_the_grid():
    inputs = make_inputs([1, 2], [90, 45], heads=4, kv_heads=2)
    loose = Packing.from_lengths([1, 2], [90, 45], max_q=3, max_k=4096)
    selection = moba_selection(inputs, 16, 3)
    for chosen in (selection, None):
        o, lse = _run(Inputs(*inputs[:3], loose), chosen)
        expected = _expected(inputs, chosen)
        assert_close(o, expected[0].detach(), 1e-5)
        assert_close(lse, expected[1].detach(), 1e-5)


def test_repeated_runs_agree_bit_for_bit():
    inputs = make_inputs([2, 1], [400, 45], heads=4, kv_heads=2)
    selection = moba_selection(inputs, 16, 4)
    for chosen in (selection, None):
        first, *others = (_run(inputs, chosen) for _ in range(3 if ON_GPU else 2))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("selected", [True, False])
def test_the_custom_op_passes_torch_s_own_checks(selected):
    inputs = on_device(make_inputs([1, 2], [40, 33], heads=2))
    selection = moba_selection(inputs, 16, 2)
    ids = selection.ids if selected else None
    p = inputs.packing
    arguments = (*inputs[:3], ids, p.cu_q, p.cu_k, None, p.max_q, p.max_k, True, 16 if selected else 0, 0.25)
    torch.library.opcheck(schedule.decode_split.op, arguments)


def test_other_calls_go_to_attend_and_dense_attention_as_before():
    inputs = make_inputs(*STEPS, heads=4, kv_heads=2)
    selection = moba_selection(inputs, 16, 3)
    o, lse = decode_attend(*inputs, selection)
    expected = attend(*inputs, selection)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    o, none = decode_attend(*inputs, need_lse=False)
    assert none is None
    assert torch.equal(o, dense_attention(*inputs)[0])
    o.sum().backward()
    assert inputs.q.grad is not None


def test_only_few_queries_without_gradient_choose_the_kernel():
    inputs = on_device(make_inputs([16, 1], [40, 20]))
    assert decodes_by_kernel(*inputs) == inputs.q.is_cuda
    assert not decodes_by_kernel(*inputs, unit=8)
    assert not decodes_by_kernel(*on_device(make_inputs([17, 1], [40, 20])))
    tracked = Inputs(inputs.q.requires_grad_(), *inputs[1:])
    assert not decodes_by_kernel(*tracked)
    with torch.no_grad():
        assert decodes_by_kernel(*tracked) == inputs.q.is_cuda


def test_a_wanted_gradient_is_refused_with_what_to_use():
    inputs = make_inputs([1], [20])
    selection = moba_selection(inputs, 16, 1)
    with pytest.raises(ValueError, match=r"no backward pass; call it under torch\.no_grad\(\), or use attend"):
        decode_attend(*inputs, selection, impl="triton")
    with pytest.raises(ValueError, match="or use dense_attention"):
        decode_attend(*inputs, impl="triton")


def test_what_does_not_fit_is_refused():
    inputs = on_device(make_inputs([1, 2], [20, 30]))
    with pytest.raises(ValueError, match="units of 16 keys or more, got 4; use impl='torch'"):
        decode_attend(*inputs, random_selection(inputs.packing, 4, 2), impl="triton")
    with pytest.raises(ValueError, match=r"one row number per document, \[2\]"):
        decode_attend(*inputs, key_start_N=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="impl='flash' does not exist"):
        decode_attend(*inputs, impl="flash")
    alone = on_device(make_inputs([1, 2]))
    with pytest.raises(ValueError, match="a cu_k of its own"):
        decode_attend(*alone, key_start_N=torch.zeros(2, dtype=torch.int64, device=DEVICE))


@pytest.mark.quick
@pytest.mark.parametrize("rows", [50, 70])
def test_keys_that_are_not_the_packing_s_are_refused_by_every_op(rows):
    inputs = make_inputs([3], [60])
    selection = random_selection(inputs.packing, 16, 2)
    k, v = (torch.randn(rows, 1, 16) for _ in range(2))
    packing, words = inputs.packing, f"k has {rows} rows but the packing describes 60"
    for call in (
        lambda: decode_attend(inputs.q, k, v, packing),
        lambda: attend(inputs.q, k, v, packing, selection),
        lambda: dense_attention(inputs.q, k, v, packing.to("cpu")),
        lambda: summarise(k, packing, 16),
        lambda: attention_mass(inputs.q, k, torch.zeros(3, 2), packing, selection),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("selected", [True, False])
def test_keys_before_or_behind_the_rows_of_a_cache_are_refused(selected, impl):
    inputs = make_inputs([1, 2], [20, 30])
    selection = random_selection(inputs.packing, 16, 2) if selected else None
    for start, words in (
        ([-5, 20], "the 20 keys of document 0 at rows -5 to 14, but k has 50 rows"),
        ([0, 21], "the 30 keys of document 1 at rows 21 to 50, but k has 50 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_attend(*inputs, selection, key_start_N=torch.tensor(start), impl=impl)
    with pytest.raises(ValueError, match="key_start must be a torch tensor, got list"):
        decode_attend(*inputs, selection, key_start_N=[0, 20], impl=impl)
