"""Measuring and profiling training on a GPU: kernels find their parts, memory is torch's own count."""

from __future__ import annotations

import json

import pytest
import torch

from pithwood.cli import main
from pithwood.observe.step_parts import IDLE, PARTS

pytestmark = pytest.mark.gpu

SMALL = ["debug", "precision=bf16", "model.attention.block_size=32", "samples_per_step=4", "samples_per_micro_batch=2"]


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_kernel_finds_its_part_and_the_parts_add_up(recompute, capsys):
    assert main(["profile", *SMALL, f"recompute={recompute}", "--steps", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["parts"]) == [*PARTS, IDLE]
    assert sum(found["parts"].values()) == pytest.approx(found["total_ms"])
    assert found["total_ms"] >= found["step_ms"] * 0.999
    assert all(found["parts"][part] > 0 for part in PARTS)
    assert found["unattributed_share"] < 0.02


def test_a_row_has_memory_as_torch_counts_it(tmp_path, capsys):
    torch.cuda.reset_peak_memory_stats()
    words = ["--steps", "4", "--drop", "1", "--breakdown", "--out", str(tmp_path), "--json"]
    assert main(["bench", "train", *SMALL, *words]) == 0
    row = json.loads(capsys.readouterr().out)["row"]
    assert 0 < row["peak_gb"] <= row["peak_reserved_gb"]
    assert row["breakdown"]["total_ms"] >= row["step_ms"] * 0.999
    assert row["breakdown"]["peaks"]["flops_per_s"] > 1e14
