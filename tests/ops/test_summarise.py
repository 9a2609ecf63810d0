"""Block means against their definition: odd lengths, packing, dtypes, and what they must not do."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import Packing, summarise
from tests.numerics import assert_close
from tests.ops.reference import make_inputs

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[0, 5, 16, 0, 1, 47, 0], [33], [0, 0], []])
def test_each_row_is_the_mean_of_its_block_and_the_rest_is_zero(impl, dtype, lengths):
    inputs = make_inputs(lengths, kv_heads=2, dtype=dtype)
    summary = summarise(inputs.k, inputs.packing, 16, dtype=torch.float64, impl=impl)
    rows, start = [], 0
    for length in lengths:
        rows += [inputs.k[start + i : start + min(i + 16, length)].double().mean(0) for i in range(0, length, 16)]
        start += length
    assert summary.shape == (inputs.packing.num_units_bound(sum(lengths), 16), 2, 16)
    assert not summary.requires_grad
    if rows:
        assert_close(summary[: len(rows)], torch.stack(rows), 1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.count_nonzero(summary[len(rows) :]) == 0


@pytest.mark.parametrize("block", [1, 4096])
def test_blocks_of_one_key_and_blocks_longer_than_the_document(block):
    inputs = make_inputs([3, 100])
    summary = summarise(inputs.k, inputs.packing, block)
    if block == 1:
        assert torch.equal(summary[:103], inputs.k.detach())
    else:
        assert_close(summary[:2], torch.stack([inputs.k[:3].mean(0), inputs.k[3:].mean(0)]), 1e-6)


def test_a_block_has_the_same_digits_alone_and_packed():
    inputs = make_inputs([70, 33, 70])
    packed = summarise(inputs.k, inputs.packing, 16)
    alone = summarise(inputs.k[70:103], Packing.from_lengths([33]), 16)
    assert torch.equal(packed[5:8], alone[:3])


def test_a_nan_key_spoils_its_own_block_alone():
    inputs = make_inputs([40, 8])
    with torch.no_grad():
        inputs.k[17] = float("nan")
    bad = summarise(inputs.k, inputs.packing, 8).isnan().flatten(1).any(1)
    assert bad.nonzero().flatten().tolist() == [2]


def test_keys_of_a_fused_projection_need_no_copy():
    fused = torch.randn(50, 6, 16)
    packing = Packing.from_lengths([50])
    assert torch.equal(summarise(fused[:, 2:4], packing, 8), summarise(fused[:, 2:4].contiguous(), packing, 8))


def test_bad_arguments_are_refused_with_what_is_allowed():
    inputs = make_inputs([8])
    with pytest.raises(ValueError, match="allowed are 'mean'"):
        summarise(inputs.k, inputs.packing, 4, how="max")
    with pytest.raises(ValueError, match="allowed are 'ref', 'torch'"):
        summarise(inputs.k, inputs.packing, 4, impl="cuda")
    with pytest.raises(ValueError, match="block_size=0"):
        summarise(inputs.k, inputs.packing, 0)
    with pytest.raises(ValueError, match="7 rows but the packing describes 8"):
        summarise(inputs.k[:7], inputs.packing, 4)
