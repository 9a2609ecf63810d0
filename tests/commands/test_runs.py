"""`pithwood runs`: what it lists, compares, trains on and deletes, and above all what it leaves alone."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest

from pithwood.checkpoint.lock import RunLock
from pithwood.cli import main
from pithwood.observe.events import read_events
from tests.command_lines import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def refused(capsys, *words: str) -> str:
    """The one line that a refused command prints."""
    assert main(["runs", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pithwood: error: ")
    assert err.count("\n") == 1
    return err


def result_of(capsys, *words: str) -> dict:
    assert main(["runs", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_in_words_and_as_json(trained, capsys):
    result = result_of(capsys, "--runs-dir", str(trained.runs_dir))
    assert result["total"] == 2
    assert {row["name"] for row in result["runs"]} == {trained.moba.name, trained.dense.name}
    assert main(["runs", "list", "--runs-dir", str(trained.runs_dir)]) == 0
    out = capsys.readouterr().out
    assert f"{trained.moba.name}" in out
    assert "8/8" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_long_list_is_cut_and_says_so(trained, capsys):
    assert len(result_of(capsys, "--runs-dir", str(trained.runs_dir), "--limit", "1")["runs"]) == 1
    assert main(["runs", "--runs-dir", str(trained.runs_dir), "list", "--limit", "1"]) == 0
    assert "1 more; --limit 0 lists all" in capsys.readouterr().out
    assert "--limit=-1 must be 0 (all) or more" in refused(capsys, "--limit", "-1")


@pytest.mark.quick
def test_no_runs_are_no_error(tmp_path, capsys):
    assert main(["runs", "--runs-dir", str(tmp_path / "none")]) == 0
    assert "start one with" in capsys.readouterr().out


def test_a_broken_run_is_listed_with_the_reason(copied, capsys):
    (copied.moba / "events.jsonl").write_bytes(b"\x00garbage\n{}\n")
    assert main(["runs", "--runs-dir", str(copied.runs_dir)]) == 0
    assert f"{copied.moba.name} is broken: events.jsonl line 1 is not an event" in capsys.readouterr().out


def test_two_runs_are_compared_in_words_as_json_and_as_a_picture(trained, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    words = ["compare", "small", "dense", "--runs-dir", str(trained.runs_dir)]
    result = result_of(capsys, *words, "--picture", str(picture))
    assert result["runs"] == [trained.moba.name, trained.dense.name]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(result["curves"][0]) == {"loss", "bits_per_byte", "validation/loss", "validation/bits_per_byte"}
    assert main(["runs", *words]) == 0
    out = capsys.readouterr().out
    assert "optim.lr" in out
    last = result["metrics"][-1]["values"][1]["validation_loss"]
    assert f"{last:.3f}" in out


def test_a_comparison_needs_two_different_runs(trained, capsys):
    place = ["--runs-dir", str(trained.runs_dir)]
    assert "takes two runs or more" in refused(capsys, "compare", "small", *place)
    assert "a run is named twice" in refused(capsys, "compare", "small", trained.moba.name, *place)
    assert "no run 'smoll'" in refused(capsys, "compare", "small", "smoll", *place)


def test_a_branch_trains_a_new_run_from_the_checkpoint_with_the_changes(copied, capsys):
    place = ["--runs-dir", str(copied.runs_dir)]
    summary = result_of(capsys, "branch", "small@4", "optim.lr=0.005", "steps=6", *place)
    folder = Path(summary["run_dir"])
    assert folder not in (copied.moba, copied.dense)
    config = json.loads((folder / "config.json").read_text())
    assert (config["run"]["optim"]["lr"], config["run"]["steps"]) == (0.005, 6)
    assert config["branched_from"] == f"{copied.moba.name}@4"
    assert [event["step"] for event in read_events(folder) if event["kind"] == "train"] == [5, 6]


def test_a_branch_is_compared_with_its_origin_from_where_it_begins(copied, capsys):
    place = ["--runs-dir", str(copied.runs_dir)]
    branch = Path(result_of(capsys, "branch", "small@4", "optim.lr=0.005", *place)["run_dir"]).name
    result = result_of(capsys, "compare", copied.moba.name, branch, *place)
    assert result["logged_from"] == [256, 5 * 256]
    first, last = (at["values"] for at in (result["metrics"][0], result["metrics"][-1]))
    assert first[1]["train_loss"] == "nan"
    assert 0 < last[1]["train_loss"] < 10
    assert main(["runs", "compare", copied.moba.name, branch, *place]) == 0
    assert f"{branch} was logged from 1.3k tokens on" in capsys.readouterr().out


def test_a_branch_that_is_its_origin_or_has_nothing_to_train_is_refused(trained, capsys):
    place = ["--runs-dir", str(trained.runs_dir)]
    assert "must differ from its origin" in refused(capsys, "branch", "small@4", "steps=20", *place)
    assert "steps=8 leaves nothing to train from step 8" in refused(capsys, "branch", "small", "seed=1", *place)
    assert "did you mean seed" in refused(capsys, "branch", "small", "sed=1", *place)
    assert "no checkpoint at step '5'" in refused(capsys, "branch", "small@5", "seed=1", *place)
    assert len(list(trained.runs_dir.iterdir())) == 3  # two runs and the corpora


def test_extending_trains_the_same_run_on(copied, capsys):
    summary = result_of(capsys, "extend", "small", "steps=10", "--runs-dir", str(copied.runs_dir))
    assert (Path(summary["run_dir"]), summary["steps"]) == (copied.moba, 10)
    steps = [event["step"] for event in read_events(copied.moba) if event["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_extending_refuses_what_would_be_another_run_or_no_work(trained, capsys):
    place = ["--runs-dir", str(trained.runs_dir)]
    assert "is finished with 8 steps; give more: steps=16" in refused(capsys, "extend", "small", *place)
    assert "steps=7 is less than the 8" in refused(capsys, "extend", "small", "steps=7", *place)
    line = refused(capsys, "extend", "small", "steps=9", "seed=1", *place)
    assert "only length and logging of a run can change" in line
    assert f"pithwood runs branch {trained.moba.name} steps=9 seed=1" in line


def test_a_renamed_run_is_not_extended_into_another_folder(copied, capsys):
    copied.moba.rename(copied.runs_dir / "mine")
    assert "does not have the name" in refused(capsys, "extend", "mine", "steps=9", "--runs-dir", str(copied.runs_dir))


def test_a_dry_run_shows_settings_and_cost_and_trains_nothing(trained, capsys):
    place = ["--runs-dir", str(trained.runs_dir)]
    result = result_of(capsys, "extend", "small", "steps=9", "--dry-run", *place)
    assert result["config"]["steps"] == 9
    assert result["plan"]
    assert result_of(capsys, "branch", "small@4", "seed=5", "--dry-run", *place)["config"]["seed"] == 5
    assert len(list(trained.runs_dir.iterdir())) == 3


def test_deleting_with_yes_removes_exactly_the_named_run(copied, capsys):
    size = sum(path.stat().st_size for path in copied.moba.rglob("*") if path.is_file())
    result = result_of(capsys, "delete", copied.moba.name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert result == {"deleted": [str(copied.moba)], "bytes": size}
    assert sorted(path.name for path in copied.runs_dir.iterdir()) == sorted([copied.dense.name, "corpora"])


def test_without_yes_and_without_a_terminal_nothing_is_deleted(copied, capsys, monkeypatch):
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        line = refused(capsys, "delete", copied.moba.name, "--runs-dir", str(copied.runs_dir))
    assert "add --yes" in line
    assert copied.moba.is_dir()


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_the_answer_decides(server: Server, copied, answer, gone):
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    words = ["runs", "delete", copied.moba.name, "--runs-dir", str(copied.runs_dir)]
    done = server.call(words, ROOT, stdin=os.ttyname(theirs))
    os.close(theirs)
    os.close(ours)
    assert "delete for good? [y/N]" in done.err
    assert f"{copied.moba.name}: finished, 2 checkpoints" in done.err
    assert copied.moba.exists() != gone
    assert done.code == (0 if gone else 2)


def test_if_one_of_several_cannot_be_deleted_none_is(copied, capsys):
    words = ["delete", copied.moba.name, "missing", "--yes", "--runs-dir", str(copied.runs_dir)]
    assert "no run 'missing'" in refused(capsys, *words)
    assert copied.moba.is_dir()


def test_a_run_in_use_is_not_deleted(copied, capsys):
    with RunLock(copied.moba):
        line = refused(capsys, "delete", copied.moba.name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert f"is in use by process {os.getpid()}" in line
    assert (copied.moba / "config.json").is_file()


def test_only_whole_names_are_deleted(copied, capsys):
    for name in ("small", copied.moba.name[:-1], ""):
        assert "no run" in refused(capsys, "delete", name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert copied.moba.is_dir()


def test_what_is_not_a_run_folder_is_not_deleted(copied, tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text('{"model_type": "llama"}')
    for name in ("corpora", ".", str(notes), str(copied.moba / "checkpoints"), str(copied.moba / "config.json")):
        line = refused(capsys, "delete", name, "--yes", "--runs-dir", str(copied.runs_dir))
        assert "is not a run folder" in line
    assert (notes / "config.json").is_file()
    assert (copied.runs_dir / "corpora").is_dir()


def test_a_run_that_never_began_is_listed_and_can_be_deleted(copied, capsys):
    begun = copied.runs_dir / "small-12345678"
    begun.mkdir()
    (begun / ".lock").write_text("process 1 on host\n")
    assert main(["runs", "--runs-dir", str(copied.runs_dir)]) == 0
    assert "small-12345678 is broken: it ended before its first step and holds nothing" in capsys.readouterr().out
    result = result_of(capsys, "delete", begun.name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert result["deleted"] == [str(begun)]
    assert not begun.exists()


@pytest.mark.parametrize(("lock", "more"), [("process 1 on host\n", ["notes.txt"]), ("another program's\n", [])])
def test_a_lock_alone_makes_no_run_of_a_folder(copied, capsys, lock, more):
    folder = copied.runs_dir / "mine"
    folder.mkdir()
    (folder / ".lock").write_text(lock)
    for name in more:
        (folder / name).touch()
    assert "is not a run folder" in refused(capsys, "delete", folder.name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert folder.is_dir()


def test_a_link_a_folder_of_runs_and_the_current_folder_are_not_deleted(copied, tmp_path, capsys, monkeypatch):
    place = ["--yes", "--runs-dir", str(copied.runs_dir)]
    link = tmp_path / "link"
    link.symlink_to(copied.moba)
    assert "is a symbolic link" in refused(capsys, "delete", str(link), *place)
    shutil.copytree(copied.dense, copied.moba / "copy")
    assert "holds other runs (copy)" in refused(capsys, "delete", copied.moba.name, *place)
    monkeypatch.chdir(copied.dense / "checkpoints")
    assert "is or holds the current folder" in refused(capsys, "delete", copied.dense.name, *place)
    assert copied.dense.is_dir()
    assert copied.moba.is_dir()


def test_a_damaged_run_can_be_deleted(copied, capsys):
    (copied.moba / "config.json").write_text("{")
    result_of(capsys, "delete", copied.moba.name, "--yes", "--runs-dir", str(copied.runs_dir))
    assert not copied.moba.exists()
