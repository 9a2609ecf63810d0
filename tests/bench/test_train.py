"""`pithwood bench train` on a CPU: real steps of the debug recipe, its results file, comparisons, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pithwood.bench import train_rows
from pithwood.bench.train import lengthened, spread
from pithwood.bench.train_rows import comparison, row_key, workload
from pithwood.bench.train_text import breakdown_lines
from pithwood.cli import main
from pithwood.config import apply_overrides
from pithwood.observe.step_parts import IDLE, PARTS
from pithwood.recipes import load_recipe
from pithwood.run import Phase

SMALL = ["seq_len=64", "samples_per_step=2", "samples_per_micro_batch=1"]


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def bench(capsys, *words: str) -> dict:
    assert main(["bench", "train", "debug", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def columns(*overrides: str, tokens: str = "fake") -> dict:
    return workload(apply_overrides(load_recipe("debug"), overrides), "debug", overrides, tokens)


def test_a_row_tells_speed_memory_and_what_was_trained(tmp_path, capsys):
    result = bench(capsys, *SMALL, "--steps", "6", "--drop", "2", "--out", str(tmp_path))
    row = result["row"]
    assert (row["recipe"], row["layers"], row["seq_len"], row["sequences"], row["micro_batch"]) == (
        "debug",
        2,
        64,
        2,
        1,
    )
    assert row["attention"] == {"op": "moba", "block_size": 16, "top_k": 3, "impl": "pithwood"}
    assert (row["optimizer"], row["routing"], row["tokens"], row["settings"]) == ("muon", "learned", "fake", [])
    assert (row["status"], row["steps"], row["dropped"]) == ("ok", 4, 2)
    assert row["tokens_per_s"] == pytest.approx(128 / row["step_ms"] * 1e3)
    assert 0 < row["step_ms"] / 1e3 < row["first_step_s"]
    assert row["mfu"] > 0
    assert row["peak_gb"] > 0.1
    assert row["command"].startswith("pithwood bench train debug")


def test_the_results_file_keeps_other_rows_and_replaces_an_equal_one(tmp_path, capsys):
    words = ["--steps", "2", "--drop", "1", "--out", str(tmp_path)]
    first = bench(capsys, *SMALL, *words)
    bench(capsys, *SMALL, *words, "--routing", "balanced")
    again = bench(capsys, *SMALL, *words)
    file = json.loads((tmp_path / "train.json").read_text())
    assert str(tmp_path / "train.json") == again["file"]
    assert [row["routing"] for row in file["rows"]] == ["learned", "balanced"]
    assert file["rows"][0]["step_ms"] == again["row"]["step_ms"] != first["row"]["step_ms"]


def test_a_breakdown_adds_up_to_the_step_and_has_floors(tmp_path, capsys):
    row = bench(capsys, *SMALL, "--steps", "3", "--drop", "1", "--out", str(tmp_path), "--breakdown")["row"]
    found = row["breakdown"]
    assert list(found["ms"]) == [*PARTS, IDLE]
    assert sum(found["ms"].values()) == pytest.approx(found["total_ms"])
    assert all(0 < found["floor_ms"][part] < found["ms"][part] for part in PARTS if part != "other")
    assert json.loads((tmp_path / "train.json").read_text())["rows"][0]["breakdown"] == found


@pytest.mark.parametrize(
    ("step_ms", "said"),
    [
        (900.0, ["    of profiled steps (1,020.0 ms), slower than the timed ones"]),
        (990.0, ["    of profiled steps (1,020.0 ms)"]),
        (1000.0, []),
    ],
)
def test_a_breakdown_that_is_not_of_the_timed_steps_says_so(step_ms, said):
    parts = {"attention": 600.0, IDLE: 400.0}
    found = {"ms": parts, "floor_ms": {"attention": 500.0}, "total_ms": 1000.0, "profiled_ms": 1020.0}
    assert breakdown_lines({"step_ms": step_ms, "breakdown": found})[4:] == said


def test_real_tokens_come_from_the_runs_corpus(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number}: the quick brown fox jumps\n" * 20)
    source = [f"data.source={tmp_path / 'text'}", "data.vocab_size=300", "data.dedup_threshold=none"]
    words = [*SMALL, *source, "--steps", "2", "--drop", "1", "--tokens", "real"]
    row = bench(capsys, *words, "--out", str(tmp_path), "--runs-dir", str(tmp_path / "runs"))["row"]
    assert row["tokens"] == "real"
    assert list((tmp_path / "runs" / "corpora").iterdir())


@pytest.mark.quick
def test_settings_that_columns_tell_are_not_told_again():
    row = columns("seq_len=64", "model.moe.routing=balanced", "optim.lr=0.1", "model.attention.top_k=2")
    assert row["settings"] == ["optim.lr=0.1"]
    assert (row["routing"], row["attention"]["top_k"]) == ("balanced", 2)
    assert columns("model.attention=FullAttentionConfig")["attention"]["op"] == "full"


@pytest.mark.quick
def test_rows_differ_by_workload_and_settings_alone():
    keys = {row_key(columns(*words)) for words in ([], ["seq_len=64"], ["optim.lr=0.1"], ["samples_per_micro_batch=2"])}
    assert len(keys) == 4
    assert row_key({**columns(), "step_ms": 1.0, "commit": "a"}) == row_key({**columns(), "step_ms": 2.0})


@pytest.mark.quick
def test_a_row_is_compared_with_equal_settings_or_the_fastest_of_its_workload():
    def row(speed: float, *overrides: str, status: str = "ok"):
        return {**columns(*overrides), "status": status, "tokens_per_s": speed, "peak_gb": 2.0, "commit": "c"}

    new = row(90.0)
    rows = [row(60.0), row(80.0, "optim.lr=0.1"), row(500.0, "seq_len=64"), row(1.0, "seed=1", status="out of memory")]
    found = comparison(new, rows, "here")
    assert found is not None
    assert (found["speed"], found["memory"], found["settings"], found["from"]) == (1.5, 1.0, [], "here")
    found = comparison(new, rows[1:], "here")
    assert found is not None
    assert found["settings"] == ["optim.lr=0.1"]
    assert comparison(new, rows[2:], "here") is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("speed", "memory", "status", "told"),
    [
        (1.2, 1.0, "ok", "PASS"),
        (0.98, 1.02, "ok", "PASS"),
        (0.8, 1.5, "ok", "FAIL speed: 25.0 % more time than here; 3 % are allowed"),
        (1.2, 1.5, "ok", "FAIL memory: 50.0 % more memory"),
        (1.2, 1.0, "out of memory", "FAIL status: out of memory"),
    ],
)
def test_a_verdict_names_the_first_gate_that_does_not_hold(speed, memory, status, told):
    assert train_rows.verdict({"status": status}, {"speed": speed, "memory": memory, "from": "here"}, 3).startswith(
        told
    )


@pytest.mark.quick
def test_without_a_committed_row_there_is_no_pass():
    assert train_rows.verdict({"status": "ok"}, None, 3).startswith("FAIL committed")


@pytest.mark.quick
def test_without_a_history_the_file_beside_the_code_is_what_was_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_rows, "ROOT", tmp_path)
    rows, where = train_rows.committed_rows()
    assert rows == []
    assert "nothing" in where
    file = tmp_path / "bench" / "results" / train_rows.device_name() / "train.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"rows": [{"recipe": "debug"}]}))
    rows, where = train_rows.committed_rows()
    assert rows == [{"recipe": "debug"}]
    assert where.endswith("train.json")


@pytest.mark.quick
def test_a_run_is_lengthened_with_its_last_phase():
    run = load_recipe("debug")
    assert lengthened(run, 60) is run
    phased = dataclasses.replace(run, steps=4, phases=(Phase(2), Phase(4)))
    longer = lengthened(phased, 9)
    assert (longer.steps, longer.phases[-1].until_step, longer.phases[0].until_step) == (9, 9, 2)


@pytest.mark.quick
def test_spread_is_the_range_of_few_values_and_quartiles_of_many():
    assert spread([3.0, 1.0, 2.0]) == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(50.5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench", "train", "debug", "--steps", "3"], "leaves none to time after --drop 3; give at least --steps 4"),
        (["bench", "train", "debug", "--drop", "0"], "--drop 0 must be at least 1"),
        (["bench", "train", "debgu"], "did you mean debug"),
        (["bench", "train", "debug", "--limit", "-1"], "--limit=-1.0 must be 0 percent or more"),
        (["bench", "train", "debug", "--limit", "1", "--sweep", "issue"], "--limit judges a single row"),
        (["bench", "train", "debug", "seq_length=3"], "seq_len"),
        (["bench", "train", "debug", "--routing", "even"], "balanced"),
        (["bench", "trian", "debug"], "did you mean train"),
        (["profile", "debug", "--steps", "3"], "give at least 4"),
        (["profile", "debug", "--csv", "x.txt"], "must end in .csv"),
        (["profile", "debug", "--top", "0"], "--top 0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(words, told, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("pithwood: error: ")
    assert told in error
