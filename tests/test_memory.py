"""What a machine allows, and whether a run fits into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pithwood.memory import cgroup_limit, check_memory, explained_memory, free_memory, memory_limit
from pithwood.recipes import load_recipe

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


def figures(gb: float) -> dict[str, float]:
    return {"weights_gradients_optimizer_gb": gb, "activations_gb": 0.0}


def test_a_run_that_cannot_fit_is_refused_with_what_to_lower():
    with pytest.raises(ValueError, match=r"needs about 1,000,000\.0 GB.*lower samples_per_micro_batch=4, seq_len=256"):
        check_memory(load_recipe("debug"), figures(1e6), CPU)


def test_a_run_that_fits_is_let_through_without_a_word():
    assert check_memory(load_recipe("debug"), figures(0.001), CPU) == []


def test_free_memory_is_within_the_limit():
    limit, owner = memory_limit(CPU)
    assert limit > 0
    assert "memory" in owner
    free = free_memory(CPU)
    assert free is None or free > 0


def test_the_smallest_limit_of_the_groups_above_counts(tmp_path: Path):
    membership, root = tmp_path / "membership", tmp_path / "groups"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "memory.max").write_text("4096\n")
    (root / "a" / "b" / "memory.max").write_text("max\n")
    membership.write_text("0::/a/b\n")
    assert cgroup_limit(membership, root) == 4096


def test_groups_of_the_older_tree_are_read_too(tmp_path: Path):
    membership, root = tmp_path / "membership", tmp_path / "groups"
    (root / "memory" / "a").mkdir(parents=True)
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (root / "memory" / "a" / "memory.limit_in_bytes").write_text("8192\n")
    membership.write_text("7:cpu,memory:/a\n3:pids:/b\n")
    assert cgroup_limit(membership, root) == 8192


def test_running_out_says_which_settings_to_lower(tmp_path: Path):
    told = pytest.raises(MemoryError, match=r"seq_len=256.*there is no checkpoint yet")
    with told, explained_memory(load_recipe("debug"), tmp_path):
        torch.empty(2**60, dtype=torch.uint8)
