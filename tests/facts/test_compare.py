"""Comparisons: which settings differ, and what is read off the curves at equal tokens."""

from __future__ import annotations

import json
import math

import pytest

from pithwood.facts.compare import _mean_before, _value_at, compare_runs, differing_settings, flatten_settings
from pithwood.observe.events import read_events


@pytest.mark.quick
def test_settings_are_flattened_to_the_paths_of_overrides():
    tree = {"a": 1, "b": {"c": [1, 2], "d": [{"e": 3}, {"e": 4}]}, "f": {}, "g": None}
    assert flatten_settings(tree) == {"a": 1, "b.c": [1, 2], "b.d.0.e": 3, "b.d.1.e": 4, "f": {}, "g": None}


@pytest.mark.quick
def test_only_settings_that_differ_are_told_and_absent_ones_are_marked():
    rows = differing_settings([{"a": 1, "b": {"type": "X", "k": 2}}, {"a": 1, "b": {"type": "Y"}}])
    assert rows == [{"key": "b.type", "values": ["X", "Y"]}, {"key": "b.k", "values": [2, "-"]}]


@pytest.mark.quick
def test_a_curve_is_read_between_its_points_and_never_beyond_them():
    curve = {"tokens": [100, 200], "values": [4.0, 3.0]}
    assert _value_at(curve, 100) == (4.0, True)
    assert _value_at(curve, 150) == (3.5, False)
    assert math.isnan(_value_at(curve, 250)[0])
    assert math.isnan(_value_at(curve, 50)[0])
    assert math.isnan(_value_at(None, 50)[0])


@pytest.mark.quick
def test_training_losses_are_means_over_the_last_twentieth():
    curve = {"tokens": list(range(1, 101)), "values": [float(i) for i in range(1, 101)]}
    assert _mean_before(curve, 100) == pytest.approx(sum(range(96, 101)) / 5)
    assert _mean_before(curve, 1.5) == 1.0
    assert math.isnan(_mean_before({"tokens": [1, 2], "values": [1.0, math.nan]}, 2))


def test_two_runs_are_compared_at_the_tokens_that_both_have_seen(copied):
    log = copied.moba / "events.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 6]
    log.write_text("\n".join(kept) + "\n")
    result = compare_runs([copied.moba, copied.dense])
    settings = {row["key"]: row["values"] for row in result["settings"]}
    assert settings["name"] == ["small", "dense"]
    assert settings["optim.lr"] == [0.02, 0.01]
    assert settings["model.attention.type"] == ["MoBAConfig", "FullAttentionConfig"]
    assert settings["model.attention.top_k"] == [2, "-"]
    assert "steps" not in settings
    assert result["same_text"]
    assert result["tokens"] == 6 * 4 * 64
    last = result["metrics"][-1]
    assert last["tokens"] == result["tokens"]
    dense = {e["step"]: e["loss"] for e in read_events(copied.dense) if e["kind"] == "validation"}
    # the dense run was validated at steps 4 and 8, so at step 6 stands the mean of the two
    assert last["values"][1]["validation_loss"] == pytest.approx((dense[4] + dense[8]) / 2)
    assert last["values"][1]["interpolated"]
    assert math.isnan(last["values"][0]["validation_loss"])  # its only validation was at step 4
    assert all(speed > 0 for speed in result["speed"])


def test_a_run_without_steps_cannot_be_compared(copied):
    (copied.moba / "events.jsonl").unlink()
    with pytest.raises(ValueError, match="has no training step"):
        compare_runs([copied.moba, copied.dense])
    (copied.moba / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the configuration of a run"):
        compare_runs([copied.moba, copied.dense])
