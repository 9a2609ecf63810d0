"""Early queries on a GPU: in bf16, in blocks that people train with, by the kernel of this GPU and by the general one.

Errors are held against those of plain PyTorch, as in test_gpu_moba.py.
"""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import attend
from pithwood.ops.attend import triton as schedule
from pithwood.ops.attend.ranks_triton import TILE_UNITS
from tests.ops.test_gpu_moba import check, like, make, random_selection, route, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BLOCK, TOP_K = 128, 4
SPAN = BLOCK * TOP_K
AROUND = (0, 1, BLOCK - 1, SPAN, 0, SPAN + 1, 2 * SPAN, 4 * SPAN + 1, 37)
"""Documents on both sides of every limit, in one packing."""
ALL_EARLY = 100_000


@pytest.mark.parametrize("pair_keys", [0, schedule.PAIR_KEYS, ALL_EARLY])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 8])
def test_documents_around_every_limit(monkeypatch, pair_keys, dim, ratio):
    monkeypatch.setattr(schedule, "PAIR_KEYS", pair_keys)
    q, k, v, packing = make(AROUND, 8, 8 // ratio, dim)
    check(q, k, v, packing, route(q, k, packing, BLOCK, TOP_K))


@pytest.mark.parametrize(("block", "top_k"), [(64, 8), (100, 3), (128, 16), (256, 3), (384, 2), (512, 3), (1024, 2)])
def test_block_sizes(block, top_k):
    q, k, v, packing = make([3 * block + 17, 2 * top_k * block + 1, 40], 4, 2, 128)
    check(q, k, v, packing, route(q, k, packing, block, top_k))


@pytest.mark.parametrize("pair_keys", [0, ALL_EARLY])
def test_queries_that_take_fewer_blocks_than_they_could(monkeypatch, pair_keys):
    monkeypatch.setattr(schedule, "PAIR_KEYS", pair_keys)
    q, k, v, packing = make([4 * SPAN + 9, SPAN], 4, 1, 128)
    check(q, k, v, packing, random_selection(packing, 4, BLOCK, TOP_K))


@pytest.mark.parametrize(("block", "top_k"), [(64, 2), (64, 5), (128, 3)])
def test_documents_of_more_units_than_a_tile_counts_and_of_fewer(block, top_k):
    few, some, many = (units * block + 9 for units in (TILE_UNITS // 2 - 2, TILE_UNITS - 2, TILE_UNITS + 3))
    q, k, v, packing = make([few, some, many, 40], 2, 1)
    check(q, k, v, packing, random_selection(packing, 2, block, top_k))


def test_the_kernel_of_this_gpu_and_the_general_one_agree():
    q, k, v, packing = make([4 * SPAN, 700, 2 * SPAN + 1], 8, 2, 128)
    selection = route(q, k, packing, BLOCK, TOP_K)
    found = attend(q, k, v, packing, selection, deterministic=False)
    # rows that do not begin at 16 bytes: not for the kernel that copies 16 at a time
    wide = torch.zeros(*q.shape[:2], 136, device="cuda", dtype=q.dtype)
    odd = wide[..., 3:131]
    odd.copy_(q.detach())
    general = attend(odd, k, v, packing, selection, deterministic=False)
    for a, b in zip(found, general, strict=True):
        assert (a.float() - b.float()).norm() <= 5e-3 * b.float().norm()


def test_what_is_early_changes_results_by_rounding_alone(monkeypatch):
    q, k, v, packing = make([4 * SPAN, 700], 8, 2, 128)
    selection, grad_o = route(q, k, packing, BLOCK, TOP_K), like(v, 8)
    found = run(q, k, v, packing, selection, grad_o)
    monkeypatch.setattr(schedule, "PAIR_KEYS", -ALL_EARLY)
    key_major = run(q, k, v, packing, selection, grad_o)
    for name, value in found.items():
        assert (value.float() - key_major[name].float()).norm() <= 5e-3 * key_major[name].float().norm(), name


def test_nothing_leaks_from_one_document_into_another():
    q, k, v, packing = make([SPAN + 7, 2 * SPAN, 300], dim=128)
    selection = route(q, k, packing, BLOCK, TOP_K)
    before = run(q, k, v, packing, selection, deterministic=True)
    with torch.no_grad():
        for x in (q, k, v):
            x[SPAN + 7 : 3 * SPAN + 7] = float("nan")
    after = run(q, k, v, packing, selection, deterministic=True)
    for name in before:
        for part in (slice(0, SPAN + 7), slice(3 * SPAN + 7, None)):
            assert torch.equal(before[name][part], after[name][part]), name


def test_ten_runs_agree_bit_by_bit():
    q, k, v, packing = make([2 * SPAN] * 20 + [5 * SPAN], 8, 1, 128)
    selection = route(q, k, packing, BLOCK, TOP_K)
    first = attend(q, k, v, packing, selection, deterministic=False)
    for _ in range(9):
        for a, b in zip(attend(q, k, v, packing, selection, deterministic=False), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_scales_of_either_sign(scale):
    q, k, v, packing = make([2 * SPAN + 5], 4, 2, 128)
    selection = route(q, k, packing, BLOCK, TOP_K)
    o, lse = attend(q, k, v, packing, selection, scale)
    # The sign and the size of the scale can as well be the queries'.
    with torch.no_grad():
        like_q = (q.double() * (scale * 128**0.5)).to(q.dtype)
    other, other_lse = attend(like_q, k, v, packing, selection)
    assert (o.float() - other.float()).norm() <= 3e-2 * o.float().norm()
    assert (lse - other_lse).norm() <= 1e-2 * lse.norm()
