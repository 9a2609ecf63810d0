"""Attention to given selections against fp64 masks (ids fed to both sides): shapes, tiles, tokens, gradients, leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, Selection, attend, moba_attention, select, summarise
from pithwood.ops.attend import key_major, tiles
from tests.numerics import assert_close, rel_error
from tests.ops.attending import CROSS, SELF, check_attend, expected_attention, moba_selection
from tests.ops.reference import gradients, make_inputs, random_selection, spans

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [SELF, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("block", [16, 24, 33, 150])
def test_moba_selections_with_and_without_the_own_block(impl, causal, lengths, block):
    inputs = make_inputs(*lengths, heads=4, kv_heads=2, dim=8, value_dim=6, dtype=torch.float64, causal=causal)
    for forced in ("own", "none"):
        for route_per in ("q_head", "kv_group"):
            check_attend(inputs, moba_selection(inputs, block, 3, forced=forced, route_per=route_per), impl)


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("sets", [1, 2, 4])
@pytest.mark.parametrize(
    ("unit", "row_size"), [(1, 1), (1, 64), (3, 1), (5, 16), (16, 1), (16, 64), (40, 16), (130, 64)]
)
def test_any_selection_tokens_or_blocks_per_query_or_per_tile(impl, sets, unit, row_size):
    for lengths, causal in ((SELF, True), (CROSS, True), (CROSS, False)):
        inputs = make_inputs(*lengths, heads=4, kv_heads=2, dim=8, value_dim=6, dtype=torch.float64, causal=causal)
        for own in (False, True):
            if own and row_size > 1:
                continue  # the rows of a tile have several own units
            selection = random_selection(inputs.packing, unit, 4, sets=sets, row_size=row_size, own=own)
            check_attend(inputs, selection, impl)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
def test_grouped_heads_in_every_ratio(heads):
    inputs = make_inputs([70, 33], heads=heads, kv_heads=1, dtype=torch.float64)
    check_attend(inputs, moba_selection(inputs, 16, 3))
    if heads > 1:
        inputs = make_inputs([70, 33], heads=heads, kv_heads=heads, dtype=torch.float64)
        check_attend(inputs, moba_selection(inputs, 16, 3))


@pytest.mark.parametrize("block", [16, 32, 64, 100, 128, 131, 256, 512, 1000, 1024, 2048, 4096])
def test_block_sizes_that_are_cut_and_that_are_not(block):
    inputs = make_inputs([3 * block + 17 if block <= 128 else 600, 40], heads=2, dtype=torch.float64)
    check_attend(inputs, moba_selection(inputs, block, 2))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 12, 16, 32, 64])
def test_every_top_k(top_k):
    inputs = make_inputs([300], heads=2, dtype=torch.float64)
    check_attend(inputs, moba_selection(inputs, 16, top_k))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 47, 48, 49, 113, 128, 257])
def test_lengths_around_block_and_tile_edges(length):
    inputs = make_inputs([length], heads=2, dtype=torch.float64)
    check_attend(inputs, moba_selection(inputs, 16, 3))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 64), (80, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dims_and_dtypes(dim, value_dim, dtype):
    inputs = make_inputs([130, 45], heads=2, dim=dim, value_dim=value_dim, dtype=dtype)
    check_attend(inputs, moba_selection(inputs, 32, 3))


@pytest.mark.parametrize("unit", [1, 16])
def test_a_sink_takes_its_share_and_its_gradient(unit):
    inputs = make_inputs([70, 20], [50, 20], heads=4, kv_heads=2, dtype=torch.float64)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    check_attend(inputs, random_selection(inputs.packing, unit, 4, sets=4), sink_H=sink)


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_large_logits_do_not_overflow(factor):
    inputs = make_inputs([100], heads=2, dtype=torch.float64)
    with torch.no_grad():
        inputs.q.mul_(factor)
    check_attend(inputs, moba_selection(inputs, 16, 3), tol=1e-9)
    single = inputs._replace(**{n: getattr(inputs, n).detach().float().requires_grad_() for n in "qkv"})
    o, lse = attend(*single, moba_selection(single, 16, 3))
    assert o.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("trouble", ["common offset", "outlier channel"])
def test_keys_with_a_common_offset_or_an_outlier_channel(trouble):
    inputs = make_inputs([200], heads=2)
    with torch.no_grad():
        if trouble == "common offset":
            inputs.k.add_(10 * torch.randn(16))
        else:
            inputs.k[..., 3] *= 50
    selection = moba_selection(inputs, 16, 3)
    # the conditioning, not the schedule, sets this error: allow twice that of plain fp32 attention
    expected, _ = expected_attention(inputs, selection)
    plain, _ = attend(*inputs, selection, impl="ref")
    found, _ = attend(*inputs, selection, impl="torch")
    assert rel_error(found, expected) <= 2 * rel_error(plain, expected) + 1e-6


@pytest.mark.parametrize("unit", [1, 16])
def test_gradients_by_finite_differences(unit):
    inputs = make_inputs([20, 7], [20, 9], heads=2, dim=4, value_dim=3, dtype=torch.float64)
    selection = random_selection(inputs.packing, unit, 4, sets=2)
    seen = selection.ids_per_head(inputs.packing, 2, 1)[..., 0] >= 0
    visible = expected_attention(inputs, selection)[1] > float("-inf")
    assert (seen & ~visible).any() or visible.all()

    def outputs(q, k, v):
        o, lse = attend(q, k, v, inputs.packing, selection)
        return o, torch.where(visible, lse, 0.0)

    assert torch.autograd.gradcheck(outputs, inputs[:3])


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("route_per", ["q_head", "kv_group"])
def test_the_gate_has_no_gradient(impl, route_per, monkeypatch):
    """End to end, the gradient is that of attention to a frozen selection, and what only moves scores gets none."""
    inputs = make_inputs([90, 40], heads=4, kv_heads=2, dtype=torch.float64)
    detached = inputs._replace(**{name: getattr(inputs, name).detach() for name in "qkv"})
    frozen = moba_selection(detached, 16, 3, route_per=route_per)
    # The means take a part of their own to the scores: a gradient through the gate would arrive there.
    shift = torch.zeros(*summarise(detached.k, inputs.packing, 16).shape, dtype=torch.float64, requires_grad=True)
    scored = []

    def shifted(*args, **options):
        scored.append(summarise(*args, **options) + shift)
        return scored[-1]

    def run():
        options = {"block_size": 16, "top_k": 3, "route_per": route_per, "impl": impl, "return_lse": True}
        return moba_attention(*inputs[:3], cu_seqlens=inputs.packing.cu_q, **options)

    def chosen():
        return select(
            inputs.q, scored[-1], inputs.packing, 3, block_size=16, route_per=route_per, mean_dtype="centered"
        )

    monkeypatch.setattr("pithwood.ops.moba.summarise", shifted)
    o, lse = run()
    found = gradients(o, lse, [*inputs[:3], shift])
    assert scored[-1].requires_grad
    assert torch.equal(chosen().ids, frozen.ids)
    for a, b in zip(found, gradients(*attend(*inputs, frozen, impl=impl), inputs[:3]), strict=False):
        assert torch.equal(a, b)
    assert torch.count_nonzero(found[3]) == 0

    # Scores that move without moving the choice change no digit; moved further they change the choice and the output.
    for size, same in ((1e-6, True), (10.0, False)):
        with torch.no_grad():
            shift.copy_(size * torch.randn(shift.shape, dtype=torch.float64))
        moved = run()
        assert torch.equal(chosen().ids, frozen.ids) == same
        assert torch.equal(moved[0], o) == torch.equal(moved[1], lse) == same


def test_gradients_accumulate_into_existing_ones():
    inputs = make_inputs([60], heads=2)
    selection = moba_selection(inputs, 16, 2)
    attend(*inputs, selection)[0].sum().backward()
    once = [x.grad.clone() for x in inputs[:3]]
    attend(*inputs, selection)[0].sum().backward()
    for x, g in zip(inputs[:3], once, strict=True):
        assert torch.equal(x.grad, 2 * g)


@pytest.mark.parametrize("unit", [1, 16])
def test_broadcast_and_strided_gradients_of_the_output(unit):
    inputs = make_inputs([60], heads=2)
    selection = random_selection(inputs.packing, unit, 4, sets=2)
    o, _ = attend(*inputs, selection)
    flat = torch.autograd.grad(o, inputs[:3], torch.ones(()).expand_as(o), retain_graph=True)
    dense = torch.autograd.grad(o, inputs[:3], torch.ones_like(o), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(flat, dense, strict=True))
    upstream = torch.randn(2, 60, 16)
    strided = torch.autograd.grad(o, inputs[:3], upstream.transpose(0, 1), retain_graph=True)
    dense = torch.autograd.grad(o, inputs[:3], upstream.transpose(0, 1).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("unit", [1, 16])
def test_inputs_may_be_slices_of_a_fused_projection(unit):
    fused = torch.randn(60, 4, 16)
    packing = Packing.from_lengths([60])
    selection = random_selection(packing, unit, 4, sets=2)
    views = [x.requires_grad_() for x in (fused[:, :2], fused[:, 2:3], fused[:, 3:])]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    results = [attend(*x, packing, selection) for x in (views, copies)]
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(gradients(*results[0], views), gradients(*results[1], copies), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("routing", ["all to block 0", "uniform", "cold"])
def test_hot_uniform_and_cold_blocks(routing):
    """A list longer than any tile, lists of one length, and blocks that nobody chose (gradients exactly zero)."""
    inputs = make_inputs([640], heads=2, dtype=torch.float64)
    own = torch.arange(640)[:, None, None] // 16
    other = {"all to block 0": own * 0, "uniform": (own + 7) % own.clamp(min=1), "cold": own * 0 + 3}[routing]
    other = torch.where(other < own, other, -1).expand(-1, 2, 1)
    ids = torch.cat([other, own.expand(-1, 2, 1)], dim=-1)
    ids = torch.where(other < 0, ids.flip(-1), ids).to(torch.int32)
    selection = Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), 16, 1, True)
    check_attend(inputs, selection)
    if routing == "cold":
        # Only what queries 320 onwards see matters: of the earlier blocks, block 3 alone.
        o, _ = attend(*inputs, selection)
        dk, dv = torch.autograd.grad(o[320:].sum(), inputs[1:3])
        cold = torch.ones(640, dtype=torch.bool)
        cold[48:64] = cold[320:] = False
        assert torch.count_nonzero(dk[cold]) == torch.count_nonzero(dv[cold]) == 0
        assert (dv[48:64] != 0).all()


def _run(q, k, v, packing, selection):
    o, lse = attend(q, k, v, packing, selection)
    weight = torch.arange(1, o.shape[2] + 1, dtype=o.dtype) / o.shape[2]
    grads = torch.autograd.grad((o * weight).sum() + lse.sum(), (q, k, v))
    return [o, lse, *grads]


def _documents(x, packing, order):
    at = spans(packing)
    return torch.cat([x[at[n][0] : at[n][1]] for n in order])


@pytest.mark.parametrize("block", [4, 16, 48, 200])
@pytest.mark.parametrize("budget", [None, 300])
def test_documents_do_not_see_each_other_in_any_digit(block, budget, monkeypatch):
    """Forward and gradients are bitwise those of each document alone, in any order, with any neighbours, cut or not."""
    if budget is not None:
        monkeypatch.setattr(tiles, "PAIR_BUDGET", budget)
    lengths = [90, 260, 17, 1, 130]
    inputs = make_inputs(lengths, heads=4, kv_heads=2)
    packed = _run(*inputs, moba_selection(inputs, block, 3))
    order = [3, 1, 4, 0, 2]
    leaves = [_documents(x.detach(), inputs.packing, order).requires_grad_() for x in inputs[:3]]
    permuted = inputs._replace(
        q=leaves[0], k=leaves[1], v=leaves[2], packing=Packing.from_lengths([lengths[n] for n in order])
    )
    for a, b in zip(packed, _run(*permuted, moba_selection(permuted, block, 3)), strict=True):
        assert torch.equal(_documents(a, inputs.packing, order), b)
    leaves = [x[90:350].detach().requires_grad_() for x in inputs[:3]]
    alone = inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2], packing=Packing.from_lengths([260]))
    for a, b in zip(packed, _run(*alone, moba_selection(alone, block, 3)), strict=True):
        assert torch.equal(a[90:350], b)
    poisoned = [x.detach().clone() for x in inputs[:3]]
    for x in poisoned:
        x[90:350] = float("nan")
    poisoned = inputs._replace(**dict(zip("qkv", (x.requires_grad_() for x in poisoned), strict=True)))
    for a, b in zip(packed, _run(*poisoned, moba_selection(poisoned, block, 3)), strict=True):
        assert torch.equal(a[:90], b[:90])
        assert torch.equal(a[350:], b[350:])


@pytest.mark.parametrize("block", [4, 16, 200])
def test_a_later_token_changes_nothing_before_it(block):
    inputs = make_inputs([300], heads=4, kv_heads=2)
    before = attend(*inputs, moba_selection(inputs, block, 3))
    with torch.no_grad():
        for x in inputs[:3]:
            x[150] += 3.0
    after = attend(*inputs, moba_selection(inputs, block, 3))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:150], b[:150])
        assert not torch.equal(a[150], b[150])


def test_chunks_and_batches_do_not_show(monkeypatch):
    """The pair budget, the batch size and the kept work list are matters of memory: same values, forward bitwise."""
    inputs = make_inputs([200, 330], heads=4, kv_heads=2)
    selection = moba_selection(inputs, 16, 4)
    whole = _run(*inputs, selection)
    monkeypatch.setattr(tiles, "PAIR_BUDGET", 1000)
    monkeypatch.setattr(key_major, "LIVE_SCORES", 3000)
    monkeypatch.setattr(key_major, "KEPT_SLOTS", 0)
    pieces = _run(*inputs, selection)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    for a, b in zip(whole[2:], pieces[2:], strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("block", [4, 16])
def test_ten_runs_agree_bit_for_bit(block):
    inputs = make_inputs([150, 50], heads=4, kv_heads=2)
    selection = moba_selection(inputs, block, 4)
    first = _run(*inputs, selection)
    for _ in range(9):
        for a, b in zip(first, _run(*inputs, selection), strict=True):
            assert torch.equal(a, b)


def test_activation_checkpointing_recomputes_the_same_selection_and_digits():
    inputs = make_inputs([150, 50], heads=4, kv_heads=2)
    chosen = []

    def layer(q, k, v):
        moved = inputs._replace(q=q * 1.5, k=k + 0.25, v=v)
        chosen.append(moba_selection(moved, 16, 3))
        return attend(*moved, chosen[-1])[0]

    plain = layer(*inputs[:3])
    expected = torch.autograd.grad(plain.square().sum(), inputs[:3])
    chosen.clear()
    again = torch.utils.checkpoint.checkpoint(layer, *inputs[:3], use_reentrant=False)
    found = torch.autograd.grad(again.square().sum(), inputs[:3])
    assert torch.equal(plain, again)
    assert len(chosen) == 2
    assert torch.equal(chosen[0].ids, chosen[1].ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_documents_that_see_everything_take_no_gather_and_change_nothing(monkeypatch):
    """Documents of up to top_k blocks need no gathering; beside long ones they keep values and gradients."""
    inputs = make_inputs([40, 200, 48, 1, 130], heads=4, kv_heads=2, dtype=torch.float64)
    selection = moba_selection(inputs, 16, 3)
    geometry = tiles.Geometry.of(inputs.packing, selection, 4, 2, inputs.k.shape[0])
    assert geometry.whole_docs == [0, 2, 3]
    dense = _run(*inputs, selection)
    check_attend(inputs, selection)
    monkeypatch.setattr(tiles, "_whole_documents", lambda *_: ([], None))
    for a, b in zip(dense, _run(*inputs, selection), strict=True):
        assert_close(a, b)


def test_a_replayed_selection_that_leaves_blocks_out_is_kept_on_short_documents():
    inputs = make_inputs([40, 48], heads=4, kv_heads=2, dtype=torch.float64)
    selection = moba_selection(inputs, 16, 1)
    assert tiles.Geometry.of(inputs.packing, selection, 4, 2, 88).whole_docs == []
    check_attend(inputs, selection)


def _ids_by_block(rows_of_block, length, unit=16):
    """(ids, count) of one document whose queries of a block share a list of ids."""
    width = max(len(row) for row in rows_of_block)
    padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows_of_block], dtype=torch.int32)
    ids = padded[torch.arange(length) // unit][:, None]
    return ids, (ids >= 0).sum(-1, dtype=torch.int32)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_units_ahead_of_the_query_do_not_stand_in_for_those_left_out(impl, own):
    """As many ids as a query could see, one of them in the future: a unit of the past is missing."""
    inputs = make_inputs([48], heads=2, dtype=torch.float64)
    check_attend(inputs, Selection(*_ids_by_block([[0], [1, 2], [0, 1, 2]], 48), 16, own=own), impl)
    check_attend(inputs, Selection(*_ids_by_block([[0, 1, 2], [0, 1, 2], [0, 1, 2]], 48), 16, own=own), impl)
    check_attend(inputs, Selection(*_ids_by_block([[0, 1], [0, 1], [1, 2]], 48), 16, own=own), impl)


@pytest.mark.parametrize("unit", [1, 16, 150])
@pytest.mark.parametrize("row_size", [1, 16])
def test_future_units_are_legal_and_invisible(unit, row_size):
    """Ids drawn past every query, in units that are cut and that are not."""
    inputs = make_inputs([48, 310, 16], heads=4, kv_heads=2, dtype=torch.float64)
    selection = random_selection(inputs.packing, unit, 6, sets=2, row_size=row_size, own=row_size == 1)
    position = inputs.packing.query_key_position()
    ahead = selection.ids_per_head(inputs.packing, 4, 2) * unit > position[:, None, None]
    assert ahead.any()
    check_attend(inputs, selection)
    check_attend(inputs, replace(selection, own=False))


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("lengths", [[40, 48, 130], [20]])
def test_a_selection_by_hand_may_leave_out_the_own_block(impl, lengths):
    inputs = make_inputs(lengths, heads=2, dtype=torch.float64)
    own = inputs.packing.query_key_position() // 16
    ids = torch.where(own > 0, own - 1, -1).to(torch.int32)[:, None, None]
    check_attend(inputs, Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), 16), impl)


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("unit", [1, 16])
def test_a_promise_of_the_own_block_that_is_not_kept_is_refused(impl, unit):
    inputs = make_inputs([20, 40], [10, 60], heads=2)
    kept = random_selection(inputs.packing, unit, 3, sets=2, own=True)
    attend(*inputs, kept, impl=impl)
    broken = kept.ids.clone()
    broken[37, 1] = -1
    with pytest.raises(ValueError, match=r"own=True.*query 37.*own=False"):
        attend(*inputs, replace(kept, ids=broken), impl=impl)
    attend(*inputs, replace(kept, ids=broken, own=False), impl=impl)
    tiled = Selection(torch.zeros(3 + 1, 1, 1, dtype=torch.int32), torch.ones(4, 1, dtype=torch.int32), 16, 16, True)
    with pytest.raises(ValueError, match=r"own=True.*query 16"):
        attend(*make_inputs([20, 20]), tiled, impl=impl)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_tiny_probabilities_cost_no_accuracy(spread):
    inputs = make_inputs([300, 30], heads=2)
    with torch.no_grad():
        inputs.q.mul_(spread)
    selection = moba_selection(inputs, 16, 3)
    (plain, _), (found, _) = (attend(*inputs, selection, impl=impl) for impl in ("ref", "torch"))
    expected, _ = expected_attention(inputs, selection)
    assert rel_error(found, expected) <= 2 * rel_error(plain, expected) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [1, 16, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_code_runs_on_the_gpu(unit, dtype):
    inputs = make_inputs([300, 0, 41, 700], heads=4, kv_heads=2, dim=64, dtype=dtype)
    selection = random_selection(inputs.packing, unit, 4, sets=4, own=True)
    o, lse = attend(*inputs, selection)
    wanted = [o, lse, *gradients(o, lse, inputs[:3])]
    leaves = [x.detach().cuda().requires_grad_() for x in inputs[:3]]
    moved = replace(selection, ids=selection.ids.cuda(), count=selection.count.cuda())
    o, lse = attend(*leaves, inputs.packing.to("cuda"), moved)
    found = [o, lse, *gradients(o.cpu(), lse.cpu(), leaves)]
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.cpu(), b, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
def test_selection_on_the_gpu_is_that_on_the_cpu_outside_near_ties():
    inputs = make_inputs([300, 0, 41, 700], heads=4, kv_heads=2, dim=64)
    summary = summarise(inputs.k, inputs.packing, 16)
    here = select(inputs.q, summary, inputs.packing, 4, block_size=16)
    there = summarise(inputs.k.cuda(), inputs.packing.to("cuda"), 16)
    assert_close(there.cpu(), summary, 1e-6)
    there = select(inputs.q.cuda(), there, inputs.packing.to("cuda"), 4, block_size=16)
    assert (there.ids.cpu() != here.ids).any(-1).double().mean() <= 0.005


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("unit", [1, 16])
def test_nothing_in_nothing_out(lengths, unit):
    inputs = make_inputs(lengths)
    selection = random_selection(inputs.packing, unit, 2)
    o, lse = attend(*inputs, selection)
    assert o.shape == (0, 2, 16)
    assert lse.shape == (0, 2)
    assert all(g.numel() == 0 for g in gradients(o, lse, inputs[:3]))


@pytest.mark.quick
@pytest.mark.parametrize("unit", [4, 16])
def test_ids_changed_before_the_backward_pass_are_refused(unit):
    inputs = make_inputs([64], heads=4, kv_heads=2)
    selection = moba_selection(inputs, unit, 2)
    o, _ = attend(*inputs, selection, impl="torch")
    selection.ids[40:] = -1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("unit", [4, 16])
def test_ids_of_inference_mode_serve_a_call_with_gradients(unit):
    inputs = make_inputs([64], heads=4, kv_heads=2)
    with torch.inference_mode():
        selection = moba_selection(inputs, unit, 2)
    o, _ = attend(*inputs, selection, impl="torch")
    expected, _ = attend(*inputs, moba_selection(inputs, unit, 2), impl="torch")
    for a, b in zip(gradients(o, None, inputs[:3]), gradients(expected, None, inputs[:3]), strict=True):
        assert torch.equal(a, b)


def test_bad_selections_are_refused_with_what_is_allowed():
    inputs = make_inputs([32], heads=4, kv_heads=2)
    good = random_selection(inputs.packing, 16, 2, sets=4)

    def refused(words, **changes):
        fields = {"ids": good.ids, "count": good.count, "unit": 16, **changes}
        with pytest.raises(ValueError, match=words):
            attend(*inputs, Selection(**fields))

    refused("allowed are 1, 2 .KV heads., 4", ids=good.ids[:, :3])
    refused("31 rows; packing and row_size=1 need 32", ids=good.ids[1:])
    refused("unit=0", unit=0)
    refused("must be integers", ids=good.ids.float())
    refused(r"\[rows, sets, k >= 1\], got \(32, 4, 0\)", ids=good.ids[..., :0])
    refused(r"count must be integers \[rows, sets\] = \(32, 4\), got \(32, 2\)", count=good.count[:, :2])
    refused("selection count must be a torch tensor, got NoneType", count=None)
    refused("selection ids must be a torch tensor, got list", ids=[0, 1])
    refused("selection unit must be a whole number", unit=16.0)
    refused("selection ids and the packing must lie on one device", ids=good.ids.to("meta"))
    with pytest.raises(ValueError, match="selection must be a Selection, got Tensor; give what select returns"):
        attend(*inputs, good.ids)
    with pytest.raises(ValueError, match="packing must be a Packing, got Tensor"):
        attend(*inputs[:3], inputs.packing.cu_q, good)
    with pytest.raises(ValueError, match="q must be a torch tensor, got ndarray"):
        attend(inputs.q.detach().numpy(), *inputs[1:], good)
    with pytest.raises(ValueError, match="allowed are 'ref', 'torch', 'triton'"):
        attend(*inputs, good, impl="cuda")
    with pytest.raises(ValueError, match="k has 2 KV heads but v has 1"):
        attend(inputs.q, inputs.k, inputs.v[:, :1], inputs.packing, good)
