"""Learning rate schedules at their corners."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from pithwood.optim.schedule import Constant, Cosine, WarmupStableDecay, schedule_factor, schedule_spans

WRONG: Any = "exp"

pytestmark = pytest.mark.quick


def curve(schedule, total: int) -> list[float]:
    return [schedule_factor(schedule, step, total) for step in range(total)]


def test_warmup_starts_above_zero_and_ends_at_one():
    for schedule in (Constant(4), WarmupStableDecay(4, 0), Cosine(4)):
        assert curve(schedule, 10)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_without_warmup_is_one_throughout():
    assert curve(Constant(), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [0.8, 0.6, 0.4, 0.2]), ("1-sqrt", [0.6, 0.2 + 0.8 * (1 - 0.5**0.5), 0.307180, 0.2])],
)
def test_decay_shapes(shape, expected):
    factors = curve(WarmupStableDecay(2, 4, final_fraction=0.2, shape=shape), 10)
    assert factors[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors[6:] == pytest.approx(expected, abs=1e-6)


def test_cosine_decay_is_half_way_in_the_middle_and_ends_at_the_final_fraction():
    factors = curve(WarmupStableDecay(0, 4, final_fraction=0.5, shape="cosine"), 8)
    assert factors[4:] == pytest.approx([0.926777, 0.75, 0.573223, 0.5], abs=1e-6)
    whole = curve(Cosine(2, final_fraction=0.1), 12)
    assert whole[6] == pytest.approx(0.55)
    assert whole[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(whole[1:]))


def test_decay_of_one_step_and_of_the_whole_run():
    assert curve(WarmupStableDecay(decay_steps=1), 3) == [1.0, 1.0, 0.0]
    assert curve(WarmupStableDecay(decay_steps=4), 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_neither_steps_nor_fraction_decays_over_a_fifth():
    assert schedule_spans(WarmupStableDecay(), 100) == (0, 20)


@pytest.mark.parametrize("total", range(1, 40))
def test_fractions_that_fill_the_run_fit_any_length(total):
    warmup, decay = schedule_spans(WarmupStableDecay(warmup_fraction=0.5, decay_fraction=0.5), total)
    assert warmup + decay <= total
    assert len(curve(WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.9), total)) == total


def test_a_single_step_run_has_a_rate():
    assert schedule_factor(Constant(warmup_fraction=0.1), 0, 1) == 1.0
    assert schedule_factor(Cosine(1), 0, 1) == 1.0


def test_warmup_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="60 warm-up steps and 50 decay steps do not fit into a run of 100"):
        schedule_spans(WarmupStableDecay(60, 50), 100)
    with pytest.raises(ValueError, match=r"^11 warm-up"):
        schedule_factor(Cosine(11), 0, 10)
    with pytest.raises(ValueError, match="do not fit"):
        schedule_spans(WarmupStableDecay(warmup_fraction=0.6, decay_fraction=0.5), 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupStableDecay(10, warmup_fraction=0.1), "^warmup_steps=10 and warmup_fraction=0.1 are both given"),
        (lambda: WarmupStableDecay(-1), "^warmup_steps=-1"),
        (lambda: WarmupStableDecay(decay_fraction=1.5), "^decay_fraction=1.5"),
        (lambda: WarmupStableDecay(final_fraction=-0.1), "^final_fraction=-0.1"),
        (lambda: WarmupStableDecay(shape=WRONG), "linear, 1-sqrt, cosine"),
        (lambda: Cosine(final_fraction=2.0), "final_fraction=2.0"),
        (lambda: schedule_factor(Constant(), 10, 10), "step=10"),
        (lambda: schedule_factor(Constant(), -1, 10), "step=-1"),
        (lambda: schedule_factor(Constant(), 0, 0), "total_steps=0"),
    ],
)
def test_impossible_values_are_refused_in_the_words_of_the_config(make, message):
    with pytest.raises(ValueError, match=message):
        make()
