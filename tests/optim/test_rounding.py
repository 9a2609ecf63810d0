"""Rounding by chance: fair, repeatable, harmless to what needs no rounding, and the same in kernels."""

from __future__ import annotations

import pytest
import torch

from pithwood.optim.rounding import random_bits, round_to_bf16, rounding_key

pytestmark = pytest.mark.quick


def test_on_average_nothing_is_lost():
    x = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-20, 0.3])
    count = 40_000
    rounded = round_to_bf16(x.repeat(count, 1), random_bits(4 * count, (1, 2)).view(count, 4)).double()
    # A digit is 2^-7 of the number's power of two; the mean of n of them is off by at most 4 / (2 sqrt(n)) digits.
    digit = torch.tensor([2**-7, 2**-6, 1e-20 * 2**-7, 2**-9], dtype=torch.float64)
    assert ((rounded.mean(0) - x.double()).abs() < 2 * digit / count**0.5).all()
    assert (rounded - x.double()).abs().max(0).values.le(digit).all()


def test_what_bf16_holds_stays_itself():
    x = torch.randn(1000).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.0e38, -1e-39]).bfloat16()
    for values in (x, special):
        rounded = round_to_bf16(values.float(), torch.full(values.shape, 0xFFFF))
        assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))
    assert round_to_bf16(torch.tensor([float("nan")]), torch.tensor([0xFFFF])).isnan().all()


def test_the_bits_of_an_element_do_not_depend_on_where_the_stretch_begins():
    key = rounding_key(3, "layers.0.weight", 7)
    whole = random_bits(1000, key, first=2**32 - 500)
    assert torch.equal(whole[300:400], random_bits(100, key, first=2**32 - 200))


def test_other_seeds_names_and_steps_give_other_bits():
    keys = {rounding_key(seed, name, step) for seed in range(3) for name in ("a", "b") for step in range(5)}
    assert len(keys) == 30
    bits = torch.stack([random_bits(4096, key) for key in sorted(keys)])
    # Agreement of two independent bits is a fair coin: 4096 * 32 throws deviate by less than five standard deviations.
    for other in bits[1:]:
        same = 32 - torch.stack([((bits[0] ^ other) >> place) & 1 for place in range(32)]).sum(0)
        assert abs(same.double().mean().item() - 16) < 5 * 8**0.5 / 64


def test_each_bit_is_set_half_of_the_time_and_neighbours_are_independent():
    bits = random_bits(1 << 16, rounding_key(0, "w", 0))
    ones = torch.stack([((bits >> place) & 1).double() for place in range(32)])
    assert ((ones.mean(1) - 0.5).abs() < 5 * 0.5 / 256).all()
    low = (bits & 0xFFFF).double() - 32767.5
    correlation = (low[1:] * low[:-1]).mean() / low.square().mean()
    assert abs(correlation.item()) < 5 / 256
