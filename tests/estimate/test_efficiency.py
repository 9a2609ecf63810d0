"""Efficiencies: from breakdowns at the nearest lengths, of the same attention where there is one, else constants."""

from __future__ import annotations

import pytest

from pithwood.estimate.efficiency import ATTENTION, DEFAULTS, REST_SHARE, efficiency, read_rows
from pithwood.observe.step_parts import IDLE, PARTS

pytestmark = pytest.mark.quick


def row(seq_len: int, op: str = "full", share: float = 0.5, repeated: float = 1.0):
    """Every part takes 100 ms against a floor of share * 100 ms; other and idle take 30 ms each."""
    ms = {**dict.fromkeys(PARTS, 100.0), "other": 30.0, IDLE: 30.0}
    floors = {part: 100.0 * share for part in PARTS if part != "other"}
    breakdown = {"ms": ms, "floor_ms": floors, "repeated": dict.fromkeys(floors, repeated)}
    return {"status": "ok", "seq_len": seq_len, "attention": {"op": op}, "breakdown": breakdown}


def test_without_breakdowns_constants_are_taken_and_said():
    found = efficiency([{**row(4096), "breakdown": None}], "moba", 4096)
    assert found.parts == {"attention": ATTENTION["moba"], **DEFAULTS}
    assert found.rest == REST_SHARE
    assert "constants" in found.source


def test_between_measured_lengths_the_logarithm_decides_and_beyond_the_nearest():
    rows = [row(4096, share=0.4), row(65_536, share=0.8)]
    assert efficiency(rows, "full", 16_384).parts["attention"] == pytest.approx(0.6)
    assert efficiency(rows, "full", 128).parts["dense"] == pytest.approx(0.4)
    assert efficiency(rows, "full", 2**20).parts["dense"] == pytest.approx(0.8)
    assert efficiency(rows, "full", 4096).rest == pytest.approx(0.1)


def test_other_attention_tells_of_all_parts_but_attention():
    found = efficiency([row(4096, "full", share=0.4)], "moba", 4096)
    assert found.parts["attention"] == ATTENTION["moba"]
    assert found.parts["experts"] == pytest.approx(0.4)
    assert "none of them with moba attention" in found.source


def test_what_a_row_computed_twice_does_not_count_as_waste():
    found = efficiency([row(4096, share=0.4, repeated=1.5)], "full", 4096)
    assert found.parts["experts"] == pytest.approx(0.6)


def test_a_device_without_results_has_no_rows(tmp_path):
    assert read_rows(tmp_path, "nvidia-h200") == ([], "bench/results/nvidia-h200/train.json")
