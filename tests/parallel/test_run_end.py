"""What a run on a mesh leaves behind: as much as one in one process."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from pithwood.finish import finish_alone
from pithwood.memory import free_memory
from tests.parallel.test_run_faults import launch, run_folder
from tests.trained import Trained


@pytest.mark.slow
def test_a_run_on_a_mesh_ends_with_samples_and_the_picture_of_chosen_blocks(tmp_path):
    done = launch(tmp_path, settings=["steps=4"])
    assert done.code == 0, done.err
    folder = run_folder(tmp_path)
    files = json.loads((folder / "summary.json").read_text())["files"]
    assert files == ["loss.png", "blocks.png", "sample.txt", "events.jsonl", "config.json"]
    assert all((folder / name).stat().st_size > 0 for name in files)
    assert "no sample.txt" not in done.err
    found = re.findall(r"--- prompt: .*\n.+", (folder / "sample.txt").read_text())
    assert len(found) >= 2


def left_by_a_mesh(run: Trained) -> dict[str, Any]:
    """The summary of a finished run before its first process goes on alone; what that makes is not there."""
    (run.moba / "sample.txt").unlink()
    (run.moba / "blocks.png").unlink()
    summary = json.loads((run.moba / "summary.json").read_text())
    return summary | {"run_dir": str(run.moba), "files": ["loss.png", "events.jsonl", "config.json"]}


def test_they_are_those_of_a_run_in_one_process(trained, copied):
    before, told = left_by_a_mesh(copied), []
    summary = finish_alone(copied.run, before, copied.runs_dir, torch.device("cpu"), told.append)
    assert not told
    assert summary["files"] == ["loss.png", "blocks.png", "sample.txt", "events.jsonl", "config.json"]
    assert json.loads((copied.moba / "summary.json").read_text())["files"] == summary["files"]
    for name in ("sample.txt", "blocks.png"):
        assert (copied.moba / name).read_bytes() == (trained.moba / name).read_bytes()
    assert finish_alone(copied.run, summary, copied.runs_dir, torch.device("cpu"), told.append) is summary


def test_a_model_that_does_not_fit_into_one_process_is_told_of_in_a_line(copied):
    free = free_memory(torch.device("cpu"))
    assert free is not None
    before, told = left_by_a_mesh(copied) | {"parameters": free}, []
    assert finish_alone(copied.run, before, copied.runs_dir, torch.device("cpu"), told.append) == before
    assert not (copied.moba / "sample.txt").exists()
    (line,) = told
    assert f"{8 * free / 1e9:,.1f} GB of the host" in line
    assert "pithwood generate" in line
