"""`pithwood evaluate`: tables, JSON, what it keeps in the run folder, and refusals in one line."""

from __future__ import annotations

import json

import pytest

from pithwood.cli import main
from pithwood.observe.summary import read_summary


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def test_the_result_is_printed_as_json_and_kept_with_a_picture(copied, capsys):
    assert main(["evaluate", "small", "--runs-dir", str(copied.runs_dir), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == read_summary(copied.moba)["validation_loss"]
    kept = copied.moba / "evaluations" / "step-00000008-validation.json"
    assert result["file"] == str(kept)
    assert json.loads(kept.read_text())["loss"] == result["loss"]
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_tables_tell_loss_bits_and_positions(copied, capsys):
    words = ["evaluate", "small", "--runs-dir", str(copied.runs_dir), "--buckets", "4", "--no-save"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{read_summary(copied.moba)['validation_bits_per_byte']:.4f} bits per byte" in out
    spans = [line.split("  ")[0] for line in out.splitlines() if " to " in line]
    assert spans == ["0 to 15", "16 to 31", "32 to 47", "48 to 63"]
    assert not (copied.moba / "evaluations").exists()


def test_text_of_ones_own_is_evaluated(copied, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("document 1\nbada bidu\n" * 5)
    words = ["evaluate", "small", "--runs-dir", str(copied.runs_dir), "--text", str(tmp_path / "mine.txt"), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == (tmp_path / "mine.txt").stat().st_size
    assert "mine" in result["name"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a", "--split", "train"], "--text and --split exclude each other"),
        (["--text", "a", "--corpus", "b"], "--text and --corpus exclude each other"),
        (["--name", "x", "--no-save"], "--name names a kept result, and --no-save keeps none"),
        (["--name", "../x"], "--name '../x' becomes a file's name"),
        (["--step", "5"], "no checkpoint at step '5'"),
        (["--attention", "moba", "--split", "test"], "invalid choice: 'test'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(trained, words, message, capsys):
    assert main(["evaluate", "small", "--runs-dir", str(trained.runs_dir), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_a_taken_name_is_refused_before_anything_is_computed(copied, capsys):
    (copied.moba / "evaluations").mkdir()
    (copied.moba / "evaluations" / "mine.json").write_text("{}")
    assert main(["evaluate", "small", "--runs-dir", str(copied.runs_dir), "--name", "mine"]) == 2
    err = capsys.readouterr().err
    assert "exists; choose another --name" in err
    assert "samples of" not in err
