from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithwood.data.interleave import LONGEST_PERIOD, Interleave, exact_shares

pytestmark = pytest.mark.quick


def named(weights: list[float]) -> dict[str, float]:
    return {f"p{number}": weight for number, weight in enumerate(weights)}


def schedule(*weights: float) -> Interleave:
    return Interleave(exact_shares(named(list(weights)), "data.parts"))


def largest_error(mix: Interleave, first: int, count: int) -> float:
    """The most that any part is off its share after any of these places, from the parts and from their numbers."""
    parts, turns = mix.turns(np.arange(first, first + count, dtype=np.int64))
    before = mix.counts(first)
    worst = 0.0
    for part, share in enumerate(mix.shares):
        mine = parts == part
        reached = before[part] + np.cumsum(mine)
        assert turns[mine].tolist() == list(range(before[part], before[part] + int(mine.sum())))
        # Exact in integers: reached / 1 against (first + i) * numerator / denominator.
        ideal = np.arange(first + 1, first + count + 1).astype(object) * share.numerator
        off = np.abs(reached.astype(object) * share.denominator - ideal).max()
        worst = max(worst, float(Fraction(int(off), share.denominator)))
    return worst


@pytest.mark.parametrize(
    "weights",
    [
        [0.999, 0.001],
        [0.001, 0.999],
        [1.0, 1.0, 1.0],
        [0.333, 0.333, 0.334],
        [0.7, 0.2, 0.1],
        [0.9, 0.0999, 0.0001],
        [5.0, 3.0, 1.0, 1.0, 1.0, 1.0],
        [1.0] * 97,
        [round(1 / (rank + 1), 2) for rank in range(60)],
        [1.0, 0.0, 2.0],
        [1.0],
    ],
)
def test_no_part_is_ever_a_whole_sample_off_its_share(weights):
    mix = schedule(*weights)
    assert largest_error(mix, 0, 3 * mix.period + 5) < 1
    assert largest_error(mix, 10**12 + 17, 2000) < 1


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30).filter(any), st.integers(0, 10**13))
@settings(max_examples=60)
def test_whole_numbers_as_weights_are_met_to_less_than_one_sample(weights, first):
    assert largest_error(schedule(*weights), first, 1500) < 1


@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=20), st.integers(0, 10**13))
@settings(max_examples=25)
def test_any_weights_are_met_to_less_than_two_samples_however_far_out(weights, first):
    assert largest_error(schedule(*weights), first, 3000) < 2


def test_turns_do_not_depend_on_what_was_asked_before():
    weights = [0.61803398875, 0.2, 0.1819660112501]
    places = np.arange(0, 5 * LONGEST_PERIOD, 97, dtype=np.int64)
    parts, turns = schedule(*weights).turns(places)
    mix = schedule(*weights)
    for index in random.Random(0).sample(range(len(places)), 40):
        part, turn = mix.turns(places[index : index + 1])
        assert (part[0], turn[0]) == (parts[index], turns[index])


def test_bounds_on_a_batch_hold_everywhere():
    for weights in ([0.999, 0.001], [0.5, 0.3, 0.2], [0.61803398875, 0.2, 0.1819660112501]):
        mix = schedule(*weights)
        parts, _ = mix.turns(np.arange(70_000, dtype=np.int64))
        for size in (1, 2, 7, 64):
            for part, most in enumerate(mix.most(size)):
                sums = np.convolve((parts == part).astype(np.int64), np.ones(size, dtype=np.int64), "valid")
                assert sums.max() <= most <= size


def test_the_schedule_is_the_same_on_every_machine_and_version():
    # Deadlines 2, 4, ... of the first, 4, 7, 10 of the second, 5, 10 of the third part, ties to the earlier part.
    # Changing these values breaks the exact resumption of every run on a mixture that exists.
    parts, turns = schedule(0.5, 0.3, 0.2).turns(np.arange(12, dtype=np.int64))
    assert parts.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert turns.tolist() == [0, 0, 1, 0, 2, 1, 3, 2, 4, 1, 5, 3]


def test_weights_mean_the_decimal_numbers_they_are_written_as():
    assert exact_shares({"a": 0.1, "b": 0.2}, "x") == (Fraction(1, 3), Fraction(2, 3))
    assert exact_shares({"a": 7, "b": 3.0}, "x") == (Fraction(7, 10), Fraction(3, 10))
    assert exact_shares({"a": 1e-3, "b": 0.999}, "x")[0] == Fraction(1, 1000)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5], r"data\.parts: the weight of 'p1' is -0\.5; give a finite number of 0 or more"),
        ([float("nan"), 1.0], r"the weight of 'p0' is nan"),
        ([1.0, float("inf")], r"the weight of 'p1' is inf"),
        ([0.0, 0.0], r"all weights are 0; give at least one part a weight above 0"),
        ([1.0, 1e-9], r"1e-09 of 'p1' is 1e-09 of all samples; the least share is one sample in 32768"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        exact_shares(named(weights), "data.parts")
