"""The Triton kernels of `attend` against fp64 masks: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, Selection, attend
from pithwood.ops.attend import triton as schedule
from pithwood.ops.attend.plan import block_plan
from tests.numerics import assert_close
from tests.ops.attending import CROSS, SELF, check_attend, moba_selection
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS
from tests.ops.reference import gradients, make_inputs, random_selection

NONE_EARLY = -1000
"""As PAIR_KEYS: all queries go key-major."""

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]


@pytest.fixture(autouse=True)
def _few_early_queries(monkeypatch):
    """Documents here are short: with the usual limit none would have queries that go key-major in the forward."""
    monkeypatch.setattr(schedule, "PAIR_KEYS", 0)


def _check(inputs, selection, **options):
    return check_attend(inputs, selection, "triton", device=DEVICE, **options)


def _to_device(inputs, selection):
    moved = [x.detach().to(DEVICE).requires_grad_() for x in inputs[:3]]
    ids = replace(selection, ids=selection.ids.to(DEVICE), count=selection.count.to(DEVICE))
    return moved, inputs.packing.to(DEVICE), ids


@pytest.mark.parametrize(
    ("lengths", "deterministic"),
    [
        pytest.param(SELF, False, id="self"),
        pytest.param(SELF, True, id="self-deterministic", marks=pytest.mark.slow),
        pytest.param(CROSS, False, id="cross", marks=pytest.mark.slow),
        pytest.param(CROSS, True, id="cross-deterministic"),
    ],
)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", [33, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 150))])
def test_moba_selections_with_and_without_the_own_block(deterministic, causal, lengths, block):
    inputs = make_inputs(*lengths, heads=4, kv_heads=2, causal=causal)
    for forced in ("own", "none"):
        _check(inputs, moba_selection(inputs, block, 3, forced=forced), deterministic=deterministic)


@pytest.mark.parametrize(
    ("unit", "row_size", "sets"),
    [
        (16, 64, 2),
        (40, 16, 1),
        (40, 16, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((16, 64, 1), (16, 64, 4), (40, 16, 2))),
    ],
)
def test_selections_per_tile_and_shared_by_heads(sets, unit, row_size):
    inputs = make_inputs(*SELF, heads=4, kv_heads=2)
    _check(inputs, random_selection(inputs.packing, unit, 4, sets=sets, row_size=row_size))


@pytest.mark.parametrize("top_k", [1, 2, 5, 16])
def test_every_number_of_slots(top_k):
    inputs = make_inputs([100, 40], heads=2)
    _check(inputs, moba_selection(inputs, 16, top_k))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 40), (192, 128)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_head_dims_and_dtypes(dim, value_dim, dtype):
    inputs = make_inputs([90, 45], heads=2, dim=dim, value_dim=value_dim, dtype=dtype)
    _check(inputs, moba_selection(inputs, 32, 2))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_list_of_many_chunks_adds_up(monkeypatch, deterministic):
    monkeypatch.setattr(schedule, "backward_chunk", lambda parts: 16)
    inputs = make_inputs([150, 60], heads=2)
    selection = moba_selection(inputs, 16, 3)
    with torch.no_grad():
        # every query takes the first block besides its own
        own = torch.cat([torch.arange(n) // 16 for n in (150, 60)]).int()
        first = torch.where(own > 0, 0, -1)
        ids = torch.stack([own.where(own == 0, first), own.where(own > 0, first), torch.full_like(own, -1)], -1)
    _check(inputs, replace(selection, ids=ids[:, None].expand(-1, 2, -1).contiguous()), deterministic=deterministic)


@pytest.mark.parametrize("heads_at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_heads_worked_on_in_slices_give_the_same(monkeypatch, heads_at_once):
    inputs = make_inputs([70, 33], heads=4, kv_heads=2)
    selection = moba_selection(inputs, 16, 3)
    (q, k, v), packing, ids = _to_device(inputs, selection)
    monkeypatch.setattr(schedule, "PAIR_KEYS", NONE_EARLY)
    whole = attend(q, k, v, packing, ids, impl="triton")
    monkeypatch.setattr(schedule, "WORKSPACE_BYTES", heads_at_once * 103 * 2 * (16 * 4 + 4))
    sliced = attend(q, k, v, packing, ids, impl="triton")
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])
    wanted, found = (gradients(o.cpu(), lse.cpu(), (q, k, v)) for o, lse in (whole, sliced))
    for a, b in zip(wanted, found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("pair_keys", [NONE_EARLY, 16])
def test_a_broken_promise_gives_nan_in_the_rows_that_break_it(monkeypatch, pair_keys):
    monkeypatch.setattr(schedule, "PAIR_KEYS", pair_keys)
    inputs = make_inputs([64], heads=1)
    selection = moba_selection(inputs, 16, 2)
    selection.ids[40, 0] = torch.tensor([0, 1])
    (q, k, v), packing, ids = _to_device(inputs, selection)
    o, _ = attend(q, k, v, packing, ids, impl="triton")
    assert o[:, 0].isnan().any(-1).nonzero().flatten().tolist() == [40]


def test_views_with_strides_of_their_own_are_read_in_place():
    inputs = make_inputs([70], heads=2, kv_heads=1)
    selection = moba_selection(inputs, 16, 3)
    (q, k, v), packing, ids = _to_device(inputs, selection)
    wide = torch.cat([x.detach().flatten(1) for x in (q, k, v)], 1)
    parts = wide.split([32, 16, 16], 1)
    o, _ = attend(*(x.unflatten(1, (-1, 16)) for x in parts), packing, ids, impl="triton")
    assert torch.equal(o, attend(q, k, v, packing, ids, impl="triton")[0])


def test_the_ops_keep_the_rules_of_custom_ops():
    inputs = make_inputs([40, 10], heads=2)
    (q, k, v), packing, ids = _to_device(inputs, moba_selection(inputs, 16, 2))
    plan = block_plan(packing, 16, 50, own=True)
    args = (q, k, v, ids.ids_per_head(packing, 2, 1), plan.units, plan.queries, True, True, 16, 3, True, 0.25, True)
    torch.library.opcheck(schedule.attend_blocks.op, args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unit": 8}, "units of 8 keys are too small"),
        ({"dim": 272}, "head dims up to 256, got 272"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words):
    inputs = make_inputs([20], heads=1, dim=change.get("dim", 16), dtype=change.get("dtype", torch.float32))
    ids = torch.zeros(20, 1, 1, dtype=torch.int32)
    selection = Selection(ids, torch.ones(20, 1, dtype=torch.int32), change.get("unit", 32), own=False)
    moved, packing, ids = _to_device(inputs, selection)
    with pytest.raises(ValueError, match=words):
        attend(*moved, packing, ids, impl="triton")


def test_nothing_to_do_gives_nothing():
    q, k = torch.zeros(0, 2, 16, device=DEVICE), torch.zeros(0, 1, 16, device=DEVICE)
    ids = Selection(torch.zeros(0, 1, 1, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32), 16, own=True)
    o, lse = attend(q, k, k, Packing.from_lengths([]).to(DEVICE), ids, impl="triton")
    assert o.shape == (0, 2, 16)
    assert lse.shape == (0, 2)
