"""Early queries, which the forward sweeps over instead of going key-major, and how that cuts the lists of the backward:
on the GPU where there is one, else in the interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pithwood.ops import Packing, Selection, attend
from pithwood.ops.attend import lists_triton
from pithwood.ops.attend import triton as schedule
from pithwood.ops.attend.lists_triton import LISTS, Segments, build_items, build_lists
from pithwood.ops.attend.plan import block_plan
from tests.ops.attending import CROSS, check_attend, moba_selection
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, ON_GPU
from tests.ops.reference import make_inputs

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]

BLOCK, TOP_K = 16, 3
SPAN = BLOCK * TOP_K
AROUND = (0, 1, BLOCK - 1, SPAN, 0, SPAN + 1, 2 * SPAN, 4 * SPAN + 1, 2)
"""Documents on both sides of every limit, in one packing."""


SLOW = pytest.mark.slow
SMALL_TILES = pytest.mark.skipif(
    ON_GPU, reason="needs tiles of 64 queries or more: Triton 3.6 compiles ranks in smaller ones wrongly"
)


@pytest.fixture(autouse=True)
def _limit_of_small_units(monkeypatch):
    """So that queries are early up to 2.5 spans, of units as small as these."""
    monkeypatch.setattr(schedule, "PAIR_KEYS", 36)


def random_ids(packing: Packing, heads: int, seed: int = 0) -> Selection:
    """The own unit of every query, and each unit before it or not, as chance will have it."""
    generator = torch.Generator().manual_seed(seed)
    own_T = (packing.position_T // BLOCK).int()
    ids = torch.full((packing.num_queries, heads, TOP_K), -1, dtype=torch.int32)
    for t, own in enumerate(own_T.tolist()):
        for head in range(heads):
            wanted = int(torch.randint(0, TOP_K, (1,), generator=generator))
            past = torch.randperm(own, generator=generator)[:wanted].sort().values
            row = [*past.tolist(), own]
            ids[t, head, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), BLOCK, own=True)


@pytest.mark.parametrize(
    ("pair_keys", "deterministic"),
    [
        pytest.param(keys, deterministic, marks=() if (keys, deterministic) in ((36, True), (72, False)) else SLOW)
        for keys in (-1000, 0, 36, 72)
        for deterministic in (False, True)
    ],
)
def test_documents_around_every_limit(monkeypatch, pair_keys, deterministic):
    monkeypatch.setattr(schedule, "PAIR_KEYS", pair_keys)
    inputs = make_inputs(AROUND, heads=2, kv_heads=1)
    check_attend(inputs, moba_selection(inputs, BLOCK, TOP_K), "triton", None, DEVICE, deterministic)


@pytest.mark.parametrize("dtype", [KERNEL_DTYPES[0], *(pytest.param(dtype, marks=SLOW) for dtype in KERNEL_DTYPES[1:])])
def test_queries_that_take_fewer_units_than_they_could(dtype):
    inputs = make_inputs([0, SPAN + 1, 2 * SPAN], heads=4, kv_heads=2, dtype=dtype)
    check_attend(inputs, random_ids(inputs.packing, 4), "triton", None, DEVICE)


@SMALL_TILES
@SLOW
@pytest.mark.parametrize("tile_units", [8, 16])
def test_ranks_in_tiles_and_by_counters(monkeypatch, tile_units):
    monkeypatch.setattr(lists_triton, "TILE_BLOCK", BLOCK)
    monkeypatch.setattr(lists_triton, "TILE_UNITS", tile_units)  # documents below have more, and fewer
    inputs = make_inputs(AROUND, heads=4, kv_heads=2)
    check_attend(inputs, moba_selection(inputs, BLOCK, TOP_K), "triton", None, DEVICE)
    check_attend(inputs, random_ids(inputs.packing, 4), "triton", None, DEVICE)


@pytest.mark.parametrize("block", [33, pytest.param(70, marks=SLOW)])
def test_units_that_tiles_do_not_divide(block):
    inputs = make_inputs([4 * block + 5, 40], heads=2, dim=24)
    check_attend(inputs, moba_selection(inputs, block, 3), "triton", None, DEVICE)


@pytest.mark.parametrize("tile_block", [pytest.param(BLOCK, marks=SMALL_TILES), 64])
def test_queries_after_keys_of_their_own(monkeypatch, tile_block):
    monkeypatch.setattr(lists_triton, "TILE_BLOCK", tile_block)
    inputs = make_inputs(*CROSS, heads=2)
    check_attend(inputs, moba_selection(inputs, BLOCK, TOP_K), "triton", None, DEVICE)


def test_a_negative_scale():
    inputs = make_inputs([2 * SPAN])
    check_attend(inputs, moba_selection(inputs, BLOCK, TOP_K), "triton", None, DEVICE, scale=-0.3)


@pytest.mark.parametrize("pair_keys", [0, 72])
def test_nothing_leaks_from_one_document_into_another(monkeypatch, pair_keys):
    monkeypatch.setattr(schedule, "PAIR_KEYS", pair_keys)
    inputs = make_inputs([SPAN + 7, 2 * SPAN, 30], heads=1)
    ids = replace(moba_selection(inputs, BLOCK, TOP_K), ids=moba_selection(inputs, BLOCK, TOP_K).ids.to(DEVICE))
    packing = inputs.packing.to(DEVICE)
    leaves = [x.detach().to(DEVICE) for x in inputs[:3]]
    found = []
    for touched in (False, True):
        if touched:
            leaves = [
                x.index_fill(0, torch.arange(SPAN + 7, 3 * SPAN + 7, device=DEVICE), float("nan")) for x in leaves
            ]
        moved = [x.requires_grad_() for x in leaves]
        o, lse = attend(*moved, packing, ids, impl="triton", deterministic=True)
        found.append((o, lse, *torch.autograd.grad(o, moved, torch.ones_like(o))))
        leaves = [x.detach() for x in leaves]
    for before, after in zip(*found, strict=True):
        for part in (slice(0, SPAN + 7), slice(3 * SPAN + 7, None)):
            assert torch.equal(before[part], after[part])


def test_a_long_document_beside_them_does_not_change_a_bit_of_short_ones():
    inputs = make_inputs([2 * SPAN, 5, 5 * SPAN], heads=2)
    short = 2 * SPAN + 5
    selection = moba_selection(inputs, BLOCK, TOP_K)
    leaves = [x.detach().to(DEVICE) for x in inputs[:3]]
    beside = attend(*leaves, inputs.packing.to(DEVICE), replace(selection, ids=selection.ids.to(DEVICE)), impl="triton")
    # Alone they are all early, and nothing goes key-major.
    few = replace(selection, ids=selection.ids[:short].to(DEVICE), count=selection.count[:short])
    packing = Packing.from_lengths([2 * SPAN, 5], device=DEVICE)
    alone = attend(*(x[:short] for x in leaves), packing, few, impl="triton")
    for a, b in zip(beside, alone, strict=True):
        assert torch.equal(a[:short], b)


@pytest.mark.parametrize(("ordered", "tile_block"), [(False, 64), (True, 64), (False, BLOCK)])
def test_lists_ascend_by_segments_and_end_with_what_is_not_early(monkeypatch, ordered, tile_block):
    monkeypatch.setattr(lists_triton, "TILE_BLOCK", tile_block)
    monkeypatch.setattr(lists_triton, "SEGMENT_QUERIES", 32)
    inputs = make_inputs([4 * SPAN + 1, 2 * SPAN], heads=4, kv_heads=2)
    ids = moba_selection(inputs, BLOCK, TOP_K).ids
    packing = inputs.packing.to(DEVICE)
    plan = block_plan(packing, BLOCK, packing.num_queries, own=True)
    early, slots = 5, TOP_K - 1
    segments = Segments.of(BLOCK, early, own=True)
    whole, late = build_lists(ids.to(DEVICE), plan, 2, slots, segments, ordered)
    entry_P, own_T = whole.entry_P.tolist(), (packing.position_T // BLOCK).tolist()
    first_T = plan.first_unit_T.tolist()
    expected: dict[int, set[int]] = {x: set() for x in range(2 * plan.num_units)}
    for t, head, slot in (ids[..., :slots] >= 0).nonzero().tolist():
        unit = int(ids[t, head, slot])
        if unit < own_T[t]:
            expected[head // 2 * plan.num_units + first_T[t] + unit].add((t * 2 + head % 2) * slots + slot)
    for x, wanted in expected.items():
        start, count = int(whole.start_X[x]), int(whole.count_X[x])
        found = entry_P[start : start + count]
        assert set(found) == wanted
        assert len(found) == len(wanted)
        if ordered:
            assert found == sorted(found)
        owns = [own_T[entry // slots // 2] for entry in found]
        parts = [(own >= early, own // 2 if own < early else (own - early) // 2) for own in owns]
        assert parts == sorted(parts)
        late_start, late_count = int(late.start_X[x]), int(late.count_X[x])
        assert late_start + late_count == start + count
        assert late_count == sum(own >= early for own in owns)


@pytest.mark.parametrize("at_least_one", [False, True])
def test_longest_lists_first_are_the_same_items(at_least_one):
    packing = Packing.from_lengths((0, 700, 1, 4000, 90))
    ids = random_ids(packing, heads=2).ids.to(DEVICE)
    plan = block_plan(packing.to(DEVICE), BLOCK, packing.num_queries, own=True)
    lists, _ = build_lists(ids, plan, 2, TOP_K - 1, Segments.of(BLOCK, 0, own=True), ordered=True)
    most = packing.num_queries * 2 * (TOP_K - 1)
    found = {
        first: build_items(lists, plan, 16, most, at_least_one, longest_first=first) for first in (False, True)
    }  # fmt: skip
    items = {first: [*zip(each.list_I.tolist(), each.chunk_I.tolist(), strict=True)] for first, each in found.items()}
    real = {first: [item for item in each if item[0] >= 0] for first, each in items.items()}
    assert sorted(real[True]) == real[False]
    assert real[True] != real[False]
    count = lists.count_X.tolist()
    for a, b in pairwise(x for x, chunk in real[True] if chunk == 0):
        assert a // LISTS < b // LISTS or count[a] >= count[b]
    for x, chunk in real[True]:
        assert items[True][found[True].first_X[x] + chunk] == (x, chunk)
