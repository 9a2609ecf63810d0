"""Tile shapes by GPU: the smaller ones compute the same. That both fit is shown by tests/bench/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.attend import shapes
from pithwood.ops.attend import triton as schedule
from tests.ops.attending import check_attend, moba_selection
from tests.ops.devices import DEVICE, KERNEL_MARKS
from tests.ops.reference import make_inputs

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("block", "dim"), [(128, 64), pytest.param(150, 144, marks=pytest.mark.slow)])
def test_smaller_tiles_compute_the_same(monkeypatch, block, dim, deterministic):
    monkeypatch.setattr(schedule, "has_large_shared", lambda _: False)
    monkeypatch.setattr(schedule, "PAIR_KEYS", 0)  # some queries go key-major in short documents too
    inputs = make_inputs([3 * block + 9, 70], heads=2, kv_heads=1, dim=dim, dtype=torch.float16)
    check_attend(inputs, moba_selection(inputs, block, 2), "triton", device=DEVICE, deterministic=deterministic)


def test_every_choice_differs_where_it_has_to():
    for choose in (shapes.forward_tiles, shapes.own_tiles, shapes.early_tiles, shapes.backward_tiles, shapes.dq_tiles):
        for dim in (128, 256):
            large, small = choose(256, dim, 2, True), choose(256, dim, 2, False)
            assert small.rows * dim <= 64 * 128
            assert small.keys * dim <= 64 * 128
            assert small.rows <= large.rows
            assert small.keys <= large.keys
        assert choose(256, 128, 4, True) == choose(256, 128, 4, False)


def test_heads_too_far_apart_for_32_bits_are_copied():
    def heads_first(tokens: int, heads: int) -> torch.Tensor:
        return torch.empty(heads, tokens, 128, dtype=torch.float16, device="meta").transpose(0, 1)

    near, far = heads_first(2**20, 15), heads_first(2**20, 16)
    assert schedule.readable(near) is near
    assert schedule.readable(far).stride() == (16 * 128, 128, 1)
    narrow = torch.empty(128, 4, 50, device="meta").permute(2, 1, 0)
    assert schedule.readable(narrow).stride() == (4 * 128, 128, 1)
