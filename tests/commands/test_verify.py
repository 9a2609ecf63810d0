"""`pithwood verify`: PASS for whole checkpoints, FAIL with the file for others, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pithwood.checkpoint.files import TensorEntry, hash_file, write_safetensors
from pithwood.checkpoint.ranges import Held
from pithwood.checkpoint.save import save_checkpoint
from pithwood.checkpoint.storage import MANIFEST, SUMS
from pithwood.cli import main
from pithwood.parallel.pieces import Piece

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    run = tmp_path / "small-1a2b3c4d"
    run.mkdir()
    (run / "config.json").write_text("{}")
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "count": torch.tensor(1)}
    for step in (10, 20):
        save_checkpoint(run, step, tensors, {})
    return run


def rewrite_sums(path: Path, *files: str) -> None:
    """Give altered files the hashes that they have now."""
    lines = dict(reversed(line.split("  ")) for line in (path / SUMS).read_text().splitlines())
    lines |= {name: hash_file(path / name) for name in files}
    (path / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items())))


def test_whole_checkpoints_pass(folder, capsys):
    assert main(["verify", "small", "--runs-dir", str(folder.parent)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 10: 3 tensors in 1 file, 0.04 kB, format 2: whole",
        "step 20: 3 tensors in 1 file, 0.04 kB, format 2: whole",
        "PASS: 2 checkpoints of small-1a2b3c4d whole",
    ]


def test_json_tells_the_same(folder, capsys):
    assert main(["verify", "small@20", "--runs-dir", str(folder.parent), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert result["unfinished"] == []
    path = str(folder / "checkpoints" / "step-00000020")
    assert result["checkpoints"] == [
        {"step": 20, "path": path, "format_version": 2, "tensors": 3, "files": 1, "bytes": 42, "problem": None}
    ]


def test_an_altered_byte_fails_and_the_file_is_named(folder, capsys):
    file = folder / "checkpoints" / "step-00000010" / "tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert "tensors-00000.safetensors: content does not match its SHA-256" in first
    assert second.endswith("whole")
    assert last == "FAIL: 1 of 2 checkpoints of small-1a2b3c4d not whole"
    assert main(["verify", f"{folder}@20"]) == 0


def test_elements_that_no_file_holds_fail(folder, capsys):
    path = folder / "checkpoints" / "step-00000020"
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["a"]["chunks"][0][1] = 4
    (path / MANIFEST).write_text(json.dumps(manifest))
    rewrite_sums(path, MANIFEST)
    assert main(["verify", f"{folder}@20"]) == 1
    assert "tensor 'a': elements 4:6 are missing" in capsys.readouterr().out


def test_a_file_that_holds_something_else_than_the_manifest_says_fails(folder, capsys):
    path = folder / "checkpoints" / "step-00000020"
    entries = [
        TensorEntry(name, tensor.shape, tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in {"a": torch.zeros(6), "b": torch.zeros(5), "count": torch.tensor(1)}.items()
    ]
    write_safetensors(path / "tensors-00000.safetensors", entries)
    rewrite_sums(path, "tensors-00000.safetensors")
    assert main(["verify", f"{folder}@20"]) == 1
    assert "entry b is 5 x F32, but 5 x BF16 in manifest.json" in capsys.readouterr().out


def test_a_save_that_was_cut_off_is_mentioned_and_fails_nothing(folder, capsys):
    (folder / "checkpoints" / ".tmp-step-00000030-1").mkdir()
    assert main(["verify", str(folder)]) == 0
    assert ".tmp-step-00000030-1: a save that is under way or was cut off" in capsys.readouterr().out


def test_a_piece_alone_makes_no_checkpoint(folder):
    with pytest.raises(ValueError, match="elements 3:6 are missing"):
        save_checkpoint(folder, 30, {"a": Held(torch.zeros(3), Piece((2, 3), 0, 3))}, {})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent", "no run 'absent'"),
        ("small@15", "no checkpoint at step '15'; there are [10, 20]"),
        ("empty", "has no checkpoint yet; train it to its first save"),
    ],
)
def test_what_is_not_there_is_refused(folder, reference, message, capsys):
    (folder.parent / "empty").mkdir()
    (folder.parent / "empty" / "config.json").write_text("{}")
    assert main(["verify", reference, "--runs-dir", str(folder.parent)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
