"""Curves out of an event log: which points, how they are summed up and thinned."""

from __future__ import annotations

import math

import pytest

from pithwood.facts.curves import curves, summarise_curve, thin_curve

pytestmark = pytest.mark.quick


def train_event(step: int, **fields: float) -> dict:
    return {"kind": "train", "step": step, "tokens": 10 * step, **fields}


def test_every_logged_field_becomes_a_curve_of_its_own():
    events = [
        {"kind": "run", "step": 0, "loss": 9.0},
        train_event(1, loss=3.0, lr=0.1),
        train_event(2, loss=2.0, lr=0.2, mfu=0.5),
        {"kind": "validation", "step": 2, "tokens": 20, "loss": 2.5},
    ]
    found = curves(events)
    assert set(found) == {"loss", "lr", "mfu", "validation/loss"}
    assert found["loss"] == {"steps": [1, 2], "tokens": [10, 20], "values": [3.0, 2.0]}
    assert found["mfu"] == {"steps": [2], "tokens": [20], "values": [0.5]}
    assert found["validation/loss"]["values"] == [2.5]


def test_of_a_step_logged_twice_the_later_line_counts():
    found = curves([train_event(1, loss=3.0), train_event(2, loss=9.0), train_event(2, loss=2.0)])
    assert found["loss"]["values"] == [3.0, 2.0]


def test_a_summary_passes_over_what_is_not_finite_and_counts_it():
    summary = summarise_curve({"values": [math.nan, 4.0, math.inf, 1.0, 2.0]})
    assert summary == {"first": 4.0, "last": 2.0, "least": 1.0, "greatest": 4.0, "median": 2.0, "not_finite": 2}
    assert math.isnan(summarise_curve({"values": [math.nan]})["last"])


@pytest.mark.parametrize(("count", "points", "kept"), [(5, 10, 5), (1000, 10, 10), (11, 10, 10), (1, 10, 1)])
def test_thinning_keeps_both_ends(count, points, kept):
    curve = {"steps": list(range(count)), "tokens": list(range(count)), "values": [float(i) for i in range(count)]}
    thin = thin_curve(curve, points)
    assert len(thin["steps"]) == len(thin["values"]) == kept
    assert (thin["steps"][0], thin["steps"][-1]) == (0, count - 1)
    assert thin["values"] == [float(step) for step in thin["steps"]]
