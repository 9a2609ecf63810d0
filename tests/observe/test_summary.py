"""The closing summary."""

from __future__ import annotations

import json
import math
import shlex
import signal
from pathlib import Path

import pytest

from pithwood.observe.summary import closing_lines, read_summary, write_summary

SUMMARY = {
    "recipe": "demo",
    "run_dir": "runs/demo-1a2b",
    "steps": 800,
    "tokens": 6_553_600,
    "seconds": 431.0,
    "validation_loss": 3.21,
    "validation_bits_per_byte": 1.75,
    "gzip_bits_per_byte": 2.5,
}


def test_summary_is_written_whole_and_read_back(tmp_path: Path):
    path = write_summary(tmp_path / "run", {**SUMMARY, "best": math.inf, "run_dir": tmp_path})
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["best"] == "inf"
    assert read_summary(tmp_path / "run") == {**SUMMARY, "best": math.inf, "run_dir": str(tmp_path)}
    write_summary(tmp_path / "run", {"recipe": "demo"})
    assert read_summary(tmp_path / "run") == {"recipe": "demo"}
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_closing_lines_tell_what_where_and_next():
    lines = closing_lines({**SUMMARY, "override": "model.attention.0.top_k=4", "prompt": "class Tree:"})
    assert lines[0] == ("validation: 1.750 bits per byte (loss 3.210), 30% below gzip -9 of the same bytes (2.500)")
    assert lines[1] == "run folder: runs/demo-1a2b (800 steps, 6.6M tokens, 7m11s)"
    assert lines[2] == "try next:"
    commands = [shlex.split(line.split("  ")[-1]) for line in lines[3:]]
    assert commands == [
        ["pithwood", "generate", "runs/demo-1a2b", "--prompt", "class Tree:"],
        ["pithwood", "train", "demo", "model.attention.0.top_k=4"],
        ["pithwood", "train", "demo_dense"],
    ]


def test_closing_lines_of_a_mixture_tell_of_its_parts():
    by_part = {f"validation_bits_per_byte/{name}": bits for name, bits in (("code", 1.5), ("prose", 2.25))}
    lines = closing_lines({**SUMMARY, **by_part, "epochs": {"code": 0.25, "prose": 3.0}})
    assert lines[1] == "  bits per byte by part: code 1.500 after 0.25 epochs, prose 2.250 after 3 epochs"
    assert lines[2].startswith("run folder: ")


def test_closing_lines_without_an_override_propose_more_steps():
    lines = closing_lines({**SUMMARY, "recipe": "debug"})
    assert lines[4].endswith("pithwood train debug steps=1600")
    assert lines[5].endswith("pithwood recipes")


@pytest.mark.parametrize(
    ("bits", "words"),
    [(3.0, "20% above gzip"), (2.505, "not below gzip"), (math.nan, "diverged"), (None, "no validation")],
)
def test_closing_lines_do_not_flatter(bits, words):
    assert words in closing_lines({**SUMMARY, "validation_bits_per_byte": bits})[0]


def test_an_interrupted_run_says_how_to_continue():
    lines = closing_lines({**SUMMARY, "interrupted": int(signal.SIGTERM), "command": "pithwood train demo seed=3"})
    assert lines[0] == "stopped by SIGTERM and saved; continue with: pithwood train demo seed=3"
    assert not any("try next" in line for line in lines)
    lines = closing_lines({**SUMMARY, "interrupted": int(signal.SIGTERM), "steps": 0})
    assert lines[0].startswith("stopped by SIGTERM before a step was taken; continue with: ")
