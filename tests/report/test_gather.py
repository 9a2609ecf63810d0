"""What a report gathers: spikes with their neighbours, block maps of bounded size, facts that `inspect` tells too."""

from __future__ import annotations

import math

import pytest
import torch

from pithwood.facts.run import run_facts
from pithwood.observe.plots import block_shares
from pithwood.report.gather import MOST_BLOCKS, MOST_MAPS, MOST_SPIKES, _block_maps, gather_run, spikes_of
from pithwood.run_folder import open_run, open_run_corpus


def spike(step: int) -> dict:
    return {"kind": "spike", "step": step, "reason": "loss", "value": 9.0, "first_step": step - 1, "last_step": step}


@pytest.mark.quick
def test_a_spike_comes_with_the_steps_around_it():
    batches = [[{"sample": 3, "documents": ["a.py", 7]}], [{"sample": 4, "documents": ["a.py"]}]]
    log = [spike(5), *({"kind": "spike_step", "step": step, "batches": batches} for step in (4, 5, 6))]
    (row,) = spikes_of(log)
    assert [around["step"] for around in row["steps"]] == [4, 5]
    assert row["steps"][0]["documents"] == ["a.py", "7", "a.py"]
    assert math.isnan(row["usual"])


@pytest.mark.quick
def test_the_latest_spikes_are_told():
    rows = spikes_of([spike(step) for step in range(1, MOST_SPIKES + 6)])
    assert [row["step"] for row in rows] == list(range(6, MOST_SPIKES + 6))


@pytest.mark.quick
def test_block_maps_stay_small_and_keep_their_diagonal():
    blocks, size = 150, 4
    own_T = torch.arange(blocks * size) // size
    ids = torch.stack([torch.zeros_like(own_T), own_T], dim=1)[:, None].int()
    ids[:size, 0, 0] = -1
    maps = _block_maps({f"layer {number}": (ids, size) for number in range(20)})
    assert [row["layer"] for row in maps] == [f"layer {n}" for n in (0, 1, 2, 3, 16, 17, 18, 19)]
    assert len(maps) == MOST_MAPS
    shares = maps[0]["shares"]
    assert (maps[0]["together"], len(shares)) == (3, 50)
    assert len(shares) <= MOST_BLOCKS
    assert all(len(row) == number + 1 for number, row in enumerate(shares))
    # everybody chose block 0 and his own block, and nothing else
    for number, row in enumerate(shares[1:], start=1):
        assert row == [1.0, *[0.0] * (number - 1), 1.0]
    assert block_shares(ids, size).shape == (150, 150)


def test_the_facts_are_those_of_inspect(trained):
    found = gather_run("small@4", trained.runs_dir, samples=2, device="cpu")
    opened = open_run("small@4", trained.runs_dir, device="cpu")
    facts = run_facts(opened, open_run_corpus(opened, trained.runs_dir), 2)
    assert found["facts"]["routing"]["experts"] == facts["routing"]["experts"]
    assert found["facts"]["run"]["step"] == 4
    assert found["curves"]["loss"]["steps"] == [1, 2, 3, 4]
    assert found["settings"]["model.attention.top_k"] == trained.run.model.attention.top_k
    assert [row["layer"] for row in found["maps"]] == ["layer 0", "layer 1"]
    assert all(row[-1] == pytest.approx(1.0) for drawn in found["maps"] for row in drawn["shares"])
