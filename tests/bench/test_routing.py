"""bench/routing.py on a model of a few thousand parameters: its text, its numbers, what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bench.routing import PackageFolders
from pithwood.bench.inputs import load_qkv

ROOT = Path(__file__).parents[2]
TINY = (
    "model.model_dim=32 model.num_layers=2 model.num_heads=4 model.num_kv_heads=2 model.head_dim=8 "
    "model.moe.num_experts=4 model.moe.expert_dim=16 model.vocab_size=300 data.vocab_size=300 precision=fp32 threads=1 "
    "model.attention.block_size=8 model.attention.top_k=3 seq_len=256 samples_per_step=1 samples_per_micro_batch=1 "
    "data.source.max_bytes=60000 data.validation_fraction=0.2 sample_tokens=1"
)


@pytest.mark.quick
def test_a_folder_of_a_package_is_one_document(tmp_path: Path, monkeypatch):
    for name, content in {
        "a/x.py": b"1\n",
        "a/y.py": b"22\n",
        "a/b/z.py": b"\xff",
        "a/b/w.py": b"4\n",
        "top.py": b"5",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    found = {document.name: document.content for document in PackageFolders().documents()}
    assert found == {"a": b"1\n22\n", "a/b": b"4\n"}
    assert [document.name for document in PackageFolders(max_bytes=3).documents()] == ["a/b"]
    assert next(PackageFolders(document_bytes=2).documents()).content == b"1\n"
    with pytest.raises(ValueError, match="no Python packages with source under"):
        next(PackageFolders(max_bytes=1).documents())


@pytest.mark.slow
def test_it_trains_measures_every_layer_and_saves_one(tmp_path: Path):
    words = ["bench/routing.py", "--minutes", "0.001", "--samples", "2", "--layer", "1"]
    folders = ["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, *folders, *TINY.split()], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "routing.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert 1 <= row["union_64"] <= row["union_128"]
        assert 0.01 <= row["top_1_percent_share"] < 1
        assert row["steps"] == 20
    saved = load_qkv(tmp_path / "out" / "qkv.npz")
    assert saved.layer == 1
    assert saved.q.shape[1:] == (4, 8)
    assert saved.k.shape[1:] == (2, 8)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("layer  0 (8,3): union/(k-1) over 64 rows ")
    assert lines[-1] == str(tmp_path / "out" / "qkv.npz")
