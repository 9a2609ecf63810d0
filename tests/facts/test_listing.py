"""The listing of runs: states, last numbers, and damage that must not break it."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pithwood.checkpoint.lock import RunLock
from pithwood.facts.listing import describe_run, disk_bytes, list_runs, looks_like_run
from pithwood.observe.events import read_events
from pithwood.observe.summary import read_summary


def test_a_finished_run_is_listed_with_its_last_numbers(trained):
    rows = {row["name"]: row for row in list_runs(trained.runs_dir)}
    assert set(rows) == {trained.moba.name, trained.dense.name}
    row, summary = rows[trained.moba.name], read_summary(trained.moba)
    assert (row["state"], row["recipe"], row["step"], row["steps"]) == ("finished", "small", 8, 8)
    assert row["tokens"] == summary["tokens"] == 8 * 4 * 64
    assert row["validation_bits_per_byte"] == summary["validation_bits_per_byte"]
    assert row["validation_loss"] == summary["validation_loss"]
    assert row["checkpoints"] == [4, 8]
    assert row["bytes"] == sum(path.stat().st_size for path in trained.moba.rglob("*") if path.is_file())
    assert row["started"] <= row["changed"]


def test_the_run_that_changed_last_stands_first(copied):
    os.utime(copied.moba / "events.jsonl", (2_000_000_000, 2_000_000_000))
    os.utime(copied.dense / "events.jsonl", (1_000_000_000, 1_000_000_000))
    assert [row["name"] for row in list_runs(copied.runs_dir)] == [copied.moba.name, copied.dense.name]


def test_a_locked_run_is_running_and_looking_leaves_the_lock_alone(copied):
    with RunLock(copied.moba):
        assert describe_run(copied.moba)["state"] == "running"
    assert describe_run(copied.moba)["state"] == "finished"
    with RunLock(copied.moba):  # nobody is left holding it
        pass


def test_a_run_short_of_its_steps_is_stopped(copied):
    (copied.moba / "summary.json").unlink()
    lines = (copied.moba / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (copied.moba / "events.jsonl").write_text("".join(kept) + '{"kind": "train", "step": 6, "lo')
    row = describe_run(copied.moba)
    assert (row["state"], row["step"], row["steps"]) == ("stopped", 5, 8)
    validated = next(e for e in read_events(copied.moba) if e["kind"] == "validation")
    assert row["validation_loss"] == validated["loss"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[1]", "is not the configuration of a run"),
        ("config.json", '{"run": {}}', "is not the configuration of a run"),
        ("events.jsonl", '{"kind": "run"\n{"kind": "train", "step": 1}\n', "events.jsonl line 1 is not an event"),
        ("events.jsonl", b"\x00\xff\xfe\n{}\n", "events.jsonl line 1 is not an event"),
        ("events.jsonl", '{"kind": "train", oops}\n{"a": 1}\n', "Expecting property name"),
        ("summary.json", "no json", "Expecting value"),
        ("summary.json", "[]", "has no attribute"),
    ],
)
def test_a_damaged_run_is_listed_as_broken_with_the_reason(copied, file, content, reason):
    path = copied.moba / file
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = {row["name"]: row for row in list_runs(copied.runs_dir)}
    assert rows[copied.moba.name]["state"] == "broken"
    assert reason in rows[copied.moba.name]["reason"]
    assert rows[copied.dense.name]["state"] == "finished"


@pytest.mark.quick
def test_other_folders_are_no_runs(tmp_path):
    for name in ("corpora", "empty", "foreign", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("x")
    assert list_runs(tmp_path) == []
    assert list_runs(tmp_path / "missing") == []
    assert not looks_like_run(tmp_path / "foreign")


def test_files_with_two_names_count_once(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    os.link(tmp_path / "a", tmp_path / "b")
    shutil.copy(tmp_path / "a", tmp_path / "c")
    assert disk_bytes(tmp_path) == 200
