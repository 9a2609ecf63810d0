"""`pithwood estimate`: tables, JSON, the comparison with measured rows, refusals."""

from __future__ import annotations

import json

import pytest

from pithwood.bench.train_rows import workload
from pithwood.cli import main
from pithwood.config import apply_overrides
from pithwood.estimate.efficiency import REST_SHARE, default
from pithwood.observe.step_parts import IDLE
from pithwood.recipes import load_recipe

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def estimate(capsys, *words: str) -> dict:
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_memory_and_time_add_up(capsys):
    found = estimate(capsys, "qwen3_30b_8l")
    assert sum(found["memory_gb"].values()) == pytest.approx(found["peak_gb"])
    assert sum(found["ms"].values()) + sum(found["communication_ms"].values()) == pytest.approx(found["step_ms"])
    assert found["tokens_per_s"] == pytest.approx(65_536 / found["step_ms"] * 1e3)
    assert found["fits"]
    assert found["mfu_measured"] == pytest.approx(found["mfu"] * 989 / 790)


def test_the_tables_say_what_does_not_fit(capsys):
    assert main(["estimate", "qwen3_30b_8l", "model.num_layers=48", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "it does not fit" in out
    assert "experts" in out
    assert main(["estimate", "qwen3_30b_8l", "samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=8"]) == 0
    out = capsys.readouterr().out
    assert "8 x nvidia-h200 (dp_shard 8, ep 8)" in out
    assert "sending: experts" in out
    assert "the rest behind compute" in out
    assert "on each device" in out


def test_a_small_model_is_told_in_small_units(capsys):
    found = estimate(capsys, "debug")
    assert main(["estimate", "debug"]) == 0
    out = capsys.readouterr().out
    assert f"{found['parameters'] / 1e3:.2f}K parameters" in out
    memory, times = out.split("part of a step")
    assert memory.split("memory of a device")[1].split()[0] == "MB"
    assert f"{found['peak_gb'] * 1e3:.2f}  of 150.1 GB" in memory
    assert times.split()[0] == "us"
    assert f"{found['step_ms'] * 1e3:.1f}\n" in times
    assert found["peak_gb"] < 1


def test_a_model_far_narrower_than_the_measured_ones_is_told_so(capsys):
    for words, narrow in (("debug", True), ("qwen3_30b_8l", False)):
        assert estimate(capsys, words)["narrower_than_measured"] == narrow
        assert main(["estimate", words]) == 0
        assert ("measured on far wider models" in capsys.readouterr().out) == narrow


def test_measured_rows_stand_beside_their_estimates(tmp_path, capsys):
    rows = []
    for words, op in (([], "full"), (["model.attention=MoBAConfig"], "moba")):
        found = estimate(capsys, "qwen3_30b_8l", *words)
        run = apply_overrides(load_recipe("qwen3_30b_8l"), words)
        floors = {part: ms for part, ms in found["floor_ms"].items() if ms}
        # as if the constants were measured, whatever this checkout's results files say
        ms = {part: floor / default(part, op) for part, floor in floors.items()}
        ms[IDLE] = REST_SHARE * sum(ms.values())
        breakdown = {"ms": ms, "floor_ms": floors, "repeated": dict.fromkeys(floors, 1.0)}
        taken = {"status": "ok", "step_ms": sum(ms.values()), "peak_gb": found["peak_gb"] / 1.1}
        taken["parameters"] = found["parameters"]
        speed = {**taken, "breakdown": breakdown}
        rows.append({**workload(run, "qwen3_30b_8l", words, "fake"), **speed})
        assert rows[-1]["attention"]["op"] == op
    rows.append({**rows[0], "status": "out of memory", "seq_len": 8192})
    (tmp_path / "train.json").write_text(json.dumps({"rows": rows}))
    found = estimate(capsys, "--compare", "h200", "--out", str(tmp_path))
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["memory_error"] == pytest.approx(0.1)
        assert row["time_error"] == pytest.approx(0, abs=1e-9)
        # what the breakdowns say here is what the constants say
        assert row["others_error"] == pytest.approx(0, abs=1e-9)
    written = json.loads((tmp_path / "estimate.json").read_text())
    assert written["device"] == "nvidia-h200"
    assert written["rows"] == found["rows"]
    assert main(["estimate", "--compare", "h200", "--out", str(tmp_path)]) == 0
    assert "16 x 4K, MoBA (128, 8), balanced" in capsys.readouterr().out.replace("learned", "balanced")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a RECIPE, or --compare h200"),
        (["debug", "--device", "a100"], "--device a100 is not known; choose one of h200, h100"),
        (["debug", "mesh.tp=2"], "mesh.tp"),
        (["debug", "mesh.dp_shard=3"], "set samples_per_micro_batch to a multiple of 3"),
        (["debug", "--compare", "h200"], "drop the recipe"),
        (["--compare", "h200", "--out", "nowhere"], "measure first: pithwood bench train RECIPE"),
        (["qwen3_30b_8l", "samples_per_micro_batch=3"], "must divide"),
    ],
)
def test_bad_input_is_refused_in_words(words, told, capsys):
    assert main(["estimate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pithwood: error: ")
    assert told in error
