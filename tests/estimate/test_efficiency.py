"""Efficiencies: from breakdowns at the nearest lengths, of the same attention where there is one, else constants."""

from __future__ import annotations

import pytest

from pithwood.config import apply_overrides
from pithwood.estimate.efficiency import ATTENTION, DEFAULTS, REST_SHARE, efficiency, read_rows
from pithwood.observe.step_parts import IDLE, PARTS
from pithwood.recipes import load_recipe
from pithwood.run import Run

pytestmark = pytest.mark.quick

MOBA = "model.attention=MoBAConfig"


def run_of(seq_len: int, *overrides: str) -> Run:
    words = [f"seq_len={seq_len}", "samples_per_step=16", "samples_per_micro_batch=1", *overrides]
    return apply_overrides(load_recipe("qwen3_30b_8l"), words)


def row(seq_len: int, op: str = "full", share: float = 0.5, repeated: float = 1.0, routing: str = "learned", micro=1):
    """Every part takes 100 ms against a floor of share * 100 ms; other and idle take 30 ms each."""
    ms = {**dict.fromkeys(PARTS, 100.0), "other": 30.0, IDLE: 30.0}
    floors = {part: 100.0 * share for part in PARTS if part != "other"}
    breakdown = {"ms": ms, "floor_ms": floors, "repeated": dict.fromkeys(floors, repeated)}
    what = {"seq_len": seq_len, "attention": {"op": op}, "routing": routing, "micro_batch": micro, "precision": "bf16"}
    size = {"parameters": 5_600_000_000, "layers": 8}
    return {"status": "ok", **what, **size, "breakdown": breakdown}


def test_without_breakdowns_constants_are_taken_and_said():
    found = efficiency([{**row(4096), "breakdown": None}], run_of(4096, MOBA))
    assert found.parts == {"attention": ATTENTION["moba"], **DEFAULTS}
    assert found.rest == REST_SHARE
    assert "constants" in found.source


def test_between_measured_lengths_the_logarithm_decides_and_beyond_the_nearest():
    rows = [row(4096, share=0.4), row(65_536, share=0.8)]
    assert efficiency(rows, run_of(16_384)).parts["attention"] == pytest.approx(0.6)
    assert efficiency(rows, run_of(128)).parts["dense"] == pytest.approx(0.4)
    assert efficiency(rows, run_of(2**20)).parts["dense"] == pytest.approx(0.8)
    assert efficiency(rows, run_of(4096)).rest == pytest.approx(0.1)


def test_other_attention_tells_of_all_parts_but_attention():
    found = efficiency([row(4096, "full", share=0.4)], run_of(4096, MOBA))
    assert found.parts["attention"] == ATTENTION["moba"]
    assert found.parts["experts"] == pytest.approx(0.4)
    assert "none of them with moba attention" in found.source


def test_an_fp32_run_is_told_that_only_bf16_was_measured():
    assert "bf16" not in efficiency([row(4096)], run_of(4096)).source
    source = efficiency([row(4096)], run_of(4096, "precision=fp32")).source
    assert source.endswith("at 4096 tokens, all in bf16 where this run is fp32")


def test_the_narrowest_measured_model_is_known_by_its_parameters_a_layer():
    wide = {**row(4096), "layers": 4}
    assert efficiency([row(4096), wide], run_of(4096)).layer_parameters == 700_000_000
    assert efficiency([], run_of(4096)).layer_parameters is None


def test_what_a_row_computed_twice_does_not_count_as_waste():
    found = efficiency([row(4096, share=0.4, repeated=1.5)], run_of(4096))
    assert found.parts["experts"] == pytest.approx(0.6)


def test_updates_that_wait_for_their_state_do_not_count():
    waits = {**row(2**20, share=0.1), "settings": ["optim.offload_state=true", "recompute=block"]}
    found = efficiency([row(4096, share=0.6), waits], run_of(2**20)).parts
    assert found["optimizer"] == pytest.approx(0.6)
    assert found["dense"] == pytest.approx(0.1)
    assert efficiency([waits], run_of(2**20)).parts["optimizer"] == DEFAULTS["optimizer"]


def test_a_device_without_results_has_no_rows(tmp_path):
    assert read_rows(tmp_path, "nvidia-h200") == ([], "bench/results/nvidia-h200/train.json")


def test_at_one_length_the_rows_most_like_the_run_count():
    rows = [row(4096, share=0.2, routing="balanced"), row(4096, share=0.4, micro=4), row(4096, share=0.6)]
    assert efficiency(rows, run_of(4096)).parts["experts"] == pytest.approx(0.6)
    assert efficiency(rows[:2], run_of(4096)).parts["experts"] == pytest.approx(0.4)
    assert efficiency(rows[:1], run_of(4096)).parts["experts"] == pytest.approx(0.2)
    assert efficiency(rows, run_of(4096, "model.moe.routing=balanced")).parts["experts"] == pytest.approx(0.2)
