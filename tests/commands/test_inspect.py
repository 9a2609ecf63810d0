"""`pithwood inspect`: tables that fit a terminal, bounded JSON, pictures, and refusals before any work."""

from __future__ import annotations

import json

import pytest

from pithwood.cli import main
from pithwood.facts.run import run_facts
from pithwood.run_folder import open_run, open_run_corpus


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def test_json_holds_the_facts_and_the_pictures(copied, capsys):
    words = ["inspect", "small", "--samples", "2", "--device", "cpu", "--runs-dir", str(copied.runs_dir), "--json"]
    assert main(words) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    opened = open_run(str(copied.moba), copied.runs_dir, device="cpu")
    facts = run_facts(opened, open_run_corpus(opened, copied.runs_dir), 2)
    assert result["parameters"] == facts["parameters"]
    assert result["cost"] == facts["cost"]
    assert result["routing"]["experts"] == facts["routing"]["experts"]
    assert result["routing"]["tokens"] == 2 * 64
    assert [sum(row["counts"]) for row in result["routing"]["experts"]] == [2 * 64 * 2] * 2
    assert result["curves"]["loss"]["steps"] == list(range(1, 9))
    for name in ("curves", "routing"):
        path = copied.moba / "inspect" / f"{name}.png"
        assert result["pictures"][name] == str(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_points_bound_the_curves(copied, capsys):
    words = ["inspect", "small", "--points", "3", "--no-pictures", "--runs-dir", str(copied.runs_dir), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    steps = result["curves"]["loss"]["steps"]
    assert (len(steps), steps[0], steps[-1]) == (3, 1, 8)
    assert result["pictures"] == {}
    assert not (copied.moba / "inspect").exists()


def test_tables_fit_a_terminal(copied, capsys):
    assert main(["inspect", "small@4", "--samples", "2", "--runs-dir", str(copied.runs_dir)]) == 0
    out = capsys.readouterr().out
    for title in ("parameters", "forward FLOPs per token", "expert load on 2", "block choices on 2", "curves"):
        assert f"\n{title}" in out
    assert f"{copied.moba.name} at step 4 of 8" in out
    tables = [line for line in out.splitlines() if not line.startswith("pictures")]
    assert max(map(len, tables)) <= 80


def test_a_run_without_routers_choices_is_inspected_too(copied, capsys):
    assert main(["inspect", "dense", "--samples", "1", "--runs-dir", str(copied.runs_dir)]) == 0
    out = capsys.readouterr().out
    assert "2 x FullAttention" in out
    assert "block choices" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples=0 must be at least 1"),
        (["--points", "1"], "--points=1 must be at least 2"),
        (["--pictures", "x", "--no-pictures"], "--pictures and --no-pictures exclude each other"),
        (["--step", "5"], "no checkpoint at step '5'"),
    ],
)
def test_what_cannot_be_is_refused(trained, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "small", "--runs-dir", str(trained.runs_dir), *words]) == 2
    assert message in capsys.readouterr().err


def test_pictures_that_cannot_be_written_are_refused_before_anything_is_computed(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["inspect", "small", "--runs-dir", str(trained.runs_dir), "--pictures", str(tmp_path / "file" / "x")]
    assert main(words) == 2
    assert "give --pictures DIR or --no-pictures" in capsys.readouterr().err
