"""Sweeps of `pithwood bench train`: their rows, their order, their budget."""

from __future__ import annotations

import json

import pytest

from pithwood.bench.train_sweep import run_sweep, sweep_rows
from pithwood.cli import main
from pithwood.config import apply_overrides
from pithwood.recipes import load_recipe


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def test_a_sweep_measures_its_rows_in_processes_of_their_own(tmp_path, capsys):
    words = ["optim.lr=0.01", "--sweep", "16", "--steps", "2", "--drop", "1", "--out", str(tmp_path), "--json"]
    assert main(["bench", "train", "debug", "samples_per_step=2", "samples_per_micro_batch=2", *words]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["exit"] for result in results] == [0, 0]
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert {(row["seq_len"], row["attention"]["op"]) for row in rows} == {(16, "full"), (16, "moba")}
    assert all(row["settings"] == ["optim.lr=0.01"] and row["sequences"] == 2 for row in rows)


def test_rows_without_time_are_skipped_and_said(capsys):
    told: list[str] = []
    results = run_sweep(sweep_rows("16", 2, 1), "debug", [], 0.0, told.append)
    assert [result["exit"] for result in results] == [None, None]
    assert all("skipped" in result["error"] for result in results)
    assert all("skipped" in line for line in told)


def test_a_row_that_outlasts_the_budget_is_stopped_and_one_that_fails_has_its_exit_code(tmp_path):
    out = ["--out", str(tmp_path)]
    (stopped,) = run_sweep(sweep_rows("16", 2, 1)[:1], "debug", out, 0.2, lambda line: None)
    assert "stopped" in stopped["error"]
    (failed,) = run_sweep(sweep_rows("16", 2, 1)[:1], "debug", ["optim.lr=-1", *out], 60.0, lambda line: None)
    assert failed["exit"] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.parametrize("sweep", ["issue", "lengths", "64,128"])
def test_rows_are_valid_runs_cheap_ones_first(sweep):
    rows = sweep_rows(sweep, 12, 3)
    assert [row.cost for row in rows] == sorted(row.cost for row in rows)
    for row in rows:
        run = apply_overrides(load_recipe("qwen3_30b_8l"), row.overrides)
        run.validate()
        assert row.steps - row.drop in (9, 3)
        assert f"seq_len={run.seq_len}" in row.words("qwen3_30b_8l", [])


@pytest.mark.quick
def test_a_dry_run_prints_the_commands(capsys):
    assert main(["bench", "train", "qwen3_30b_8l", "optim.lr=0.1", "--sweep", "issue", "--dry-run", "--json"]) == 0
    commands = json.loads(capsys.readouterr().out)
    assert len(commands) == 6
    assert all(command.endswith(" optim.lr=0.1") for command in commands)


@pytest.mark.quick
def test_rows_that_need_it_get_what_makes_them_fit(capsys):
    words = ["bench", "train", "qwen3_30b_8l", "--sweep", "4096,131072", "--fit", "h200", "--dry-run", "--json"]
    assert main(words) == 0
    commands = json.loads(capsys.readouterr().out)
    assert {"recompute" in command for command in commands if "seq_len=4096" in command} == {False}
    assert {"recompute=" in command for command in commands if "seq_len=131072" in command} == {True}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sweep", "everything"], "choose issue, lengths, or lengths such as 4096,8192"),
        (["--sweep", "issue", "--routing", "learned"], "are what the rows of a --sweep say themselves"),
        (["--sweep", "issue", "--budget-s", "0"], "--budget-s=0.0 must be above 0"),
        (["--sweep", "issue", "--fit", "a100"], "--fit a100 is not known; choose one of h200, h100"),
        (["--fit", "h200"], "--fit is for the rows of a --sweep"),
        (["--budget-s", "9"], "--budget-s is for the rows of a --sweep"),
        (["--sweep", "issue", "optim.lr=-1"], "lr=-1"),
    ],
)
def test_bad_input_is_refused_in_words(words, told, capsys):
    assert main(["bench", "train", "debug", *words]) == 2
    assert told in capsys.readouterr().err
