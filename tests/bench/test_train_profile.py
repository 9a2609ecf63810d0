"""`pithwood profile` on a CPU: parts, kernels, files."""

from __future__ import annotations

import csv
import gzip
import json
import re

import pytest

from pithwood.cli import main
from pithwood.observe.step_parts import IDLE, PARTS

SMALL = ["seq_len=64", "samples_per_step=2", "samples_per_micro_batch=1", "--steps", "4"]


def test_parts_add_up_to_the_step_and_kernels_to_the_parts(tmp_path, capsys):
    words = ["--csv", str(tmp_path / "k.csv"), "--trace", str(tmp_path / "t.json.gz"), "--top", "3", "--json"]
    assert main(["profile", "debug", *SMALL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["parts"]) == [*PARTS, IDLE]
    assert sum(found["parts"].values()) == pytest.approx(found["total_ms"])
    assert min(found["parts"].values()) >= 0
    assert found["unattributed_share"] < 0.01
    assert len(found["kernels"]) == 3
    rows = list(csv.DictReader((tmp_path / "k.csv").open()))
    assert len(rows) == found["kinds"] > 3
    for part in PARTS:
        assert sum(float(row["ms"]) for row in rows if row["part"] == part) == pytest.approx(found["parts"][part])
    for word, part in (("_Experts", "experts"), ("KeyMajor", "attention"), ("RmsNorm", "dense"),
                       ("_LinearN|_LinearL", "head and loss"), ("baddbmm", "optimizer")):  # fmt: skip
        assert {row["part"] for row in rows if re.search(word, row["name"])} == {part}, word
    assert all(found["parts"][part] > 0 for part in PARTS)
    assert json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]


def test_the_table_is_bounded_and_says_what_is_left_out(capsys):
    assert main(["profile", "debug", *SMALL, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "ms", "a", "step", "share"]
    assert [line.split("  ")[0].strip() for line in lines[1:9]] == [*PARTS, IDLE]
    assert len(lines) < 18
    assert any("more kinds of op" in line for line in lines)
    assert "could not be attributed" in lines[-1]
