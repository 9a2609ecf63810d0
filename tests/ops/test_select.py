"""Block selection: exact sets against fp64, tie and NaN rules, packing, and invariances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, select, summarise
from pithwood.ops.select.topk import REPEATED_MAX
from tests.ops.reference import make_inputs, selected

pytestmark = pytest.mark.usefixtures("poison")
IMPLS = ["ref", "torch"]


def _select(inputs, block, top_k, **options):
    return select(
        inputs.q, summarise(inputs.k, inputs.packing, block), inputs.packing, top_k, block_size=block, **options
    )


def _assert_same_but_for_near_ties(ids, expected, gap, most=0.005):
    """Rows may differ only where the fp64 scores at the cut lie within 1e-5, and on few rows."""
    differ = (ids != expected).any(-1)
    assert not (differ & (gap > 1e-5)).any(), f"{int((differ & (gap > 1e-5)).sum())} rows differ without a near tie"
    assert differ.double().mean() <= most


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["input", "fp32", "centered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_chosen_blocks_are_those_of_fp64(impl, mode, dtype):
    inputs = make_inputs([100, 0, 1, 37, 8], heads=4, kv_heads=2, dtype=dtype)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, 8, 4, mode)
    found = _select(inputs, 8, 4, mean_dtype=mode, impl=impl)
    _assert_same_but_for_near_ties(found.ids, expected, gap)
    assert found.own
    assert found.ids.dtype == found.count.dtype == torch.int32


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 12, REPEATED_MAX + 2, 32, 64])
def test_every_top_k_up_to_more_than_there_are_blocks(top_k):
    inputs = make_inputs([330], heads=2)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, 8, top_k)
    found = _select(inputs, 8, top_k)
    _assert_same_but_for_near_ties(found.ids, expected, gap)
    own = torch.arange(330) // 8
    assert torch.equal(found.count.long(), (own + 1).clamp(max=top_k)[:, None].expand(-1, 2))
    assert (found.ids == own[:, None, None]).sum(-1).eq(1).all()
    valid = found.ids >= 0
    assert torch.equal(valid, torch.arange(top_k) < found.count[..., None])
    step = found.ids.diff(dim=-1)
    assert (step[valid[..., 1:]] > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [([7, 33, 0, 20], [40, 20, 9, 20]), ([1, 1], [65, 3]), ([50], [16])])
def test_keys_longer_or_shorter_than_queries_align_at_the_end(impl, lengths):
    inputs = make_inputs(*lengths, heads=2)
    expected, gap = selected(inputs.q, inputs.k, inputs.packing, 8, 3)
    found = _select(inputs, 8, 3, impl=impl)
    _assert_same_but_for_near_ties(found.ids, expected, gap)
    before = inputs.packing.query_key_position() < 0
    assert (found.count[before] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("forced", ["own", "none"])
@pytest.mark.parametrize("tie", ["later", "earlier"])
@pytest.mark.parametrize("route_per", ["q_head", "kv_group"])
def test_both_implementations_agree_in_every_mode_on_easy_and_hard_inputs(causal, forced, tie, route_per):
    lengths = ([0, 5, 7, 1, 64, 100, 0], None), ([3, 40, 0, 9], [20, 45, 17, 4])
    for spread in ("random", "equal", "bad"):
        for pair in lengths:
            inputs = make_inputs(*pair, heads=4, kv_heads=2, causal=causal)
            with torch.no_grad():
                if spread == "equal":
                    inputs.k.zero_()
                if spread == "bad":
                    inputs.k[::9], inputs.k[40:42], inputs.q[1] = float("nan"), float("inf"), float("inf")
            for top_k in (1, 2, 5, 20):
                for mode in ("input", "fp32", "centered"):
                    options = {"forced": forced, "tie": tie, "route_per": route_per, "mean_dtype": mode}
                    ref, fast = (_select(inputs, 8, top_k, impl=impl, **options).ids for impl in IMPLS)
                    assert torch.equal(ref, fast), (spread, pair, top_k, mode)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("what", ["zero keys", "equal keys", "duplicated blocks", "signed zeros"])
@pytest.mark.parametrize(("tie", "expected"), [("later", [7, 8, 9]), ("earlier", [0, 1, 9])])
def test_ties_follow_the_rule(impl, what, tie, expected):
    # Small whole numbers: equal keys then score equally to the last bit, in whatever order a CPU's matmul adds them up.
    inputs = make_inputs([80], heads=2)
    with torch.no_grad():
        for tensor in (inputs.q, inputs.k):
            tensor.mul_(2).round_()
        if what == "zero keys":
            inputs.k.zero_()
        elif what == "equal keys":
            inputs.k.copy_(inputs.k[:1].clone())
        elif what == "signed zeros":
            inputs.k.zero_()
            inputs.k[::2] = -0.0
            inputs.q[::3] *= -1.0
        else:
            inputs.k.copy_(inputs.k[:8].clone().repeat(10, 1, 1))
    found = _select(inputs, 8, 3, tie=tie, impl=impl)
    assert found.ids[72:].unique(dim=0).tolist() == [[expected, expected]]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_never_selected_plus_infinity_first_minus_infinity_last(impl):
    packing = Packing.from_lengths([64])
    q = torch.ones(64, 1, 4)
    means = torch.tensor([1.0, float("nan"), float("-inf"), float("inf"), 2.0, 0.5, float("nan"), 0.0])
    summary = torch.zeros(packing.num_units_bound(64, 8), 1, 4)
    summary[:8, 0, 0] = means
    summary[:, 0, 1:] = 0.0

    def last(top_k):
        return select(q, summary, packing, top_k, block_size=8, mean_dtype="fp32", impl=impl).ids[63, 0].tolist()

    assert last(2) == [3, 7]
    assert last(3) == [3, 4, 7]
    assert last(5) == [0, 3, 4, 5, 7]
    assert last(6) == [0, 2, 3, 4, 5, 7]
    assert last(8) == [0, 2, 3, 4, 5, 7, -1, -1]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_in_block_0_leaves_the_other_blocks_selectable_in_centered_mode(impl):
    inputs = make_inputs([80])
    with torch.no_grad():
        inputs.k[3] = float("nan")
    ids = _select(inputs, 8, 3, mean_dtype="centered", impl=impl).ids
    assert (ids[8:] != 0).all()
    assert (ids[24:] >= 0).all()


@pytest.mark.parametrize("offset", [1.0, 100.0])
def test_a_vector_common_to_all_keys_does_not_change_the_ranking(offset):
    inputs = make_inputs([400], heads=2, dtype=torch.float64)
    shifted = inputs._replace(k=inputs.k + offset * torch.randn(16, dtype=torch.float64))
    plain = _select(inputs, 16, 4, mean_dtype="fp32").ids
    assert torch.equal(_select(shifted, 16, 4, mean_dtype="fp32").ids, plain)
    assert torch.equal(_select(shifted, 16, 4, mean_dtype="centered").ids, plain)


def test_centering_repairs_the_rounding_of_means_with_a_common_offset():
    """Rounding bf16 means at offset 3 changes several per cent of the slots, centred means a few per mille."""
    generator = torch.Generator().manual_seed(0)
    packing = Packing.from_lengths([4096])
    q = torch.randn(4096, 1, 64, generator=generator).bfloat16()
    k = (torch.randn(4096, 1, 64, generator=generator) + 3 * torch.randn(64, generator=generator)).bfloat16()
    summary = summarise(k, packing, 64)

    def chosen(mode):
        return select(q, summary, packing, 8, block_size=64, mean_dtype=mode).ids

    exact = chosen("fp32")
    rounded, centered = ((chosen(mode) != exact).any(-1).double().mean() for mode in ("input", "centered"))
    assert centered < 0.05
    assert rounded > 4 * centered


def test_queries_heads_and_documents_choose_independently():
    inputs = make_inputs([60, 90, 60], heads=4, kv_heads=2)
    ids = _select(inputs, 8, 3).ids
    with torch.no_grad():
        changed_q = inputs.q.clone()
        changed_q[100, 2] = torch.randn(16)
        changed_k = inputs.k.clone()
        changed_k[60:150] = torch.randn(90, 2, 16)
    moved = _select(inputs._replace(q=changed_q), 8, 3).ids != ids
    moved[100, 2] = False
    assert not moved.any()
    moved = _select(inputs._replace(k=changed_k), 8, 3).ids != ids
    assert moved[60:150].any()
    assert not moved[:60].any()
    assert not moved[150:].any()
    one_group = _select(inputs._replace(q=inputs.q[:, 2:], k=inputs.k[:, 1:]), 8, 3).ids
    assert torch.equal(one_group, ids[:, 2:])


def test_a_later_token_does_not_change_earlier_selections():
    inputs = make_inputs([200], heads=2)
    ids = _select(inputs, 16, 4).ids
    with torch.no_grad():
        inputs.k[100] += 10.0
    moved = (_select(inputs, 16, 4).ids != ids).flatten(1).any(1)
    assert moved[112:].any()
    # 100 // 16 = 6: queries up to the end of block 6 know nothing of its mean.
    assert not moved[:112].any()


def test_a_document_selects_the_same_alone_packed_and_in_any_order():
    inputs = make_inputs([150, 33, 97], heads=4, kv_heads=2)
    packed = _select(inputs, 8, 4, mean_dtype="centered").ids
    order = [range(183, 280), range(0, 150), range(150, 183)]
    rows = torch.cat([torch.tensor(list(r)) for r in order])
    permuted = inputs._replace(q=inputs.q[rows], k=inputs.k[rows], packing=Packing.from_lengths([97, 150, 33]))
    assert torch.equal(_select(permuted, 8, 4, mean_dtype="centered").ids, packed[rows])
    alone = inputs._replace(q=inputs.q[183:], k=inputs.k[183:], packing=Packing.from_lengths([97]))
    assert torch.equal(_select(alone, 8, 4, mean_dtype="centered").ids, packed[183:])


def test_heads_of_a_kv_group_share_the_choice_of_their_mean_query():
    inputs = make_inputs([120], heads=4, kv_heads=2, dtype=torch.float64)
    expected, _ = selected(inputs.q, inputs.k, inputs.packing, 8, 3, route_per="kv_group")
    found = _select(inputs, 8, 3, route_per="kv_group")
    assert found.ids.shape == (120, 2, 3)
    assert torch.equal(found.ids, expected)


def test_without_causality_all_blocks_compete_and_own_is_not_forced():
    inputs = make_inputs([40, 24], causal=False, dtype=torch.float64)
    found = _select(inputs, 8, 2)
    assert not found.own
    means = summarise(inputs.k, inputs.packing, 8, dtype=torch.float64)[:5, 0]
    best = (inputs.q[:40, 0].detach() @ means.T).topk(2).indices.sort(-1).values
    assert torch.equal(found.ids[:40, 0].long(), best)
    forced = _select(inputs, 8, 2, forced="own")
    own = (torch.arange(40) // 8)[:, None, None]
    assert (forced.ids[:40] == own).any(-1).all()


def test_unused_offsets_at_the_end_change_nothing():
    inputs = make_inputs([30, 50])
    cu = torch.tensor([0, 30, 80, 80, 80], dtype=torch.int32)
    padded = replace(inputs.packing, cu_q=cu, cu_k=cu)
    assert torch.equal(_select(inputs._replace(packing=padded), 8, 3).ids, _select(inputs, 8, 3).ids)


def test_the_selection_carries_no_gradient():
    inputs = make_inputs([40])
    assert not _select(inputs, 8, 2).ids.requires_grad
    summary = summarise(inputs.k, inputs.packing, 8).requires_grad_()
    assert select(inputs.q, summary, inputs.packing, 2, block_size=8).ids.grad_fn is None


def test_bad_switches_are_refused_with_what_is_allowed():
    inputs = make_inputs([16])
    for options, words in (
        ({"tie": "first"}, "'later', 'earlier'"),
        ({"mean_dtype": "bf16"}, "'input', 'fp32', 'centered'"),
        ({"route_per": "layer"}, "'q_head', 'kv_group'"),
        ({"forced": "sink"}, "'own', 'none'"),
        ({"impl": "cuda"}, "'ref', 'torch', 'triton'"),
    ):
        with pytest.raises(ValueError, match=words):
            _select(inputs, 8, 2, **options)
    with pytest.raises(ValueError, match="top_k=0"):
        _select(inputs, 8, 0)
    for top_k in (2.0, "3", None, torch.tensor(2), True):
        with pytest.raises(ValueError, match="top_k must be a whole number"):
            _select(inputs, 8, top_k)
    with pytest.raises(ValueError, match=r"block_size must be a whole number, at least 1, got 8\.0"):
        select(inputs.q, summarise(inputs.k, inputs.packing, 8), inputs.packing, 2, block_size=8.0)
    with pytest.raises(ValueError, match="q and the packing must lie on one device, got meta and cpu"):
        select(inputs.q.to("meta"), inputs.k, inputs.packing, 2, block_size=8)
    with pytest.raises(ValueError, match="packing must be a Packing, got list"):
        select(inputs.q, inputs.k, [0, 16], 2, block_size=8)
    with pytest.raises(ValueError, match="3 query heads must be a multiple of 2 KV heads"):
        select(torch.randn(16, 3, 8), torch.randn(3, 2, 8), inputs.packing, 2, block_size=8)
    with pytest.raises(ValueError, match="15 rows but the packing describes 16"):
        select(torch.randn(15, 2, 8), torch.randn(3, 1, 8), inputs.packing, 2, block_size=8)


@pytest.mark.quick
@pytest.mark.parametrize("lengths", [([10, 54, 0], None), ([1, 2, 0], [10, 54, 0])], ids=["self", "cross"])
def test_summaries_of_other_blocks_are_refused(lengths):
    inputs = make_inputs(*lengths)
    summary = summarise(inputs.k, inputs.packing, 8)
    expected = select(inputs.q, summary, inputs.packing, 2, block_size=8)
    enough = select(inputs.q, summary[:9], inputs.packing, 2, block_size=8)
    assert torch.equal(enough.ids, expected.ids)
    there = inputs.packing.to("cpu")
    for bad in (summary[:2], summary[:0], summary[:8], *(summarise(inputs.k, inputs.packing, n) for n in (2, 16))):
        for packing in (inputs.packing, there):
            with pytest.raises(ValueError, match=r"blocks of 8 keys .* need 9 to 11; give summarise\(k, packing, 8\)"):
                select(inputs.q, bad, packing, 2, block_size=8)


def test_summaries_are_counted_by_tokens_where_lengths_are_not_known():
    inputs = make_inputs([10, 54])
    packing = replace(inputs.packing, causal=True)
    summary = summarise(inputs.k, packing, 8)
    for bad in (summary[:7], torch.cat([summary, summary])):
        with pytest.raises(ValueError, match="need 8 to 10"):
            select(inputs.q, bad, packing, 2, block_size=8)


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_rows_of_a_cache_that_are_not_there_are_refused(impl):
    inputs = make_inputs([1, 1], [40, 20])
    summary = torch.randn(20, 1, 16)
    for start, words in (
        ([0, 5000], "the 2 complete blocks of document 1 at rows 5000 to 5001, but there are 20 summaries"),
        ([-1, 10], "the 5 complete blocks of document 0 at rows -1 to 3"),
        ([0, 19], "document 1 at rows 19 to 20"),
    ):
        with pytest.raises(ValueError, match=words):
            select(inputs.q, summary, inputs.packing, 2, block_size=8, unit_start_N=torch.tensor(start), impl=impl)
    select(inputs.q, summary, inputs.packing, 2, block_size=8, unit_start_N=torch.tensor([15, 18]), impl=impl)
