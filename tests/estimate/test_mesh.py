"""Meshes: what they must divide, and how estimates change with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES, MeshSizes, check_mesh, mesh_from_text
from pithwood.estimate.efficiency import REST_SHARE, efficiency
from pithwood.estimate.memory import estimate_memory
from pithwood.estimate.time import estimate_time
from pithwood.memory import keeps_copies, memory_by_kind
from pithwood.observe.step_parts import IDLE
from pithwood.plan import plan
from pithwood.recipes import load_recipe
from pithwood.run import Run

pytestmark = pytest.mark.quick

H200 = DEVICES["h200"]


def run_of(*overrides: str, recipe: str = "qwen3_30b_8l") -> Run:
    return apply_overrides(load_recipe(recipe), overrides)


def memory(run: Run, **sizes: int) -> dict[str, float]:
    return estimate_memory(run, H200, MeshSizes(**sizes))


def time(run: Run, **sizes: int):
    return estimate_time(run, H200, MeshSizes(**sizes), efficiency([], run))


@pytest.mark.parametrize(
    ("sizes", "overrides", "told"),
    [
        ({"dp_shard": 4, "ep": 8}, [], "ep=8 must divide dp_shard * cp = 4"),
        ({"dp_shard": 16, "ep": 16}, ["model.moe.num_experts=120"], "ep=16 must divide model.moe.num_experts=120"),
        ({"pp": 3}, [], "pp=3 must divide model.num_layers=8"),
        ({"cp": 3}, [], "cp=3 must divide seq_len=4096"),
        ({"dp_shard": 8}, [], "samples_per_step=16 must be a multiple of dp_replicate * dp_shard = 8 times"),
    ],
)
def test_a_mesh_that_cannot_divide_the_run_is_refused(sizes, overrides, told):
    with pytest.raises(ValueError, match=told.replace("*", r"\*")):
        check_mesh(MeshSizes(**sizes), run_of(*overrides))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tp=2"], "tp=2 is no part of a mesh; write NAME=N with NAME among pp, dp_replicate"),
        (["pp"], "pp is no part"),
        (["pp=0"], "must be a whole number of at least 1"),
        (["pp=2", "pp=2"], "gives pp twice"),
    ],
)
def test_words_that_are_no_mesh_are_refused(words, told):
    with pytest.raises(ValueError, match=told):
        mesh_from_text(words)


def test_a_mesh_is_read_and_counts_its_devices():
    mesh = mesh_from_text(["pp=2", "dp_shard=4", "cp=2", "ep=8"])
    assert (mesh.world, mesh.data_ranks, mesh.shards) == (16, 4, 8)


def test_one_device_holds_what_the_run_says_of_itself():
    run, cuda = run_of(), torch.device("cuda")
    assert memory(run) == memory_by_kind(run, cuda, copies=keeps_copies(run, cuda, H200.memory_bytes))
    small = run_of(recipe="debug")
    figures = plan(small)
    own = sum(memory_by_kind(small).values()) / 1e9
    assert own == pytest.approx(figures["weights_gradients_optimizer_gb"] + figures["activations_gb"])
    assert time(small).floors["head and loss"] > 0


def test_shards_divide_the_state_and_leave_the_activations():
    run = run_of("samples_per_micro_batch=1", "keep_weight_copies=always")
    one, eight = memory(run), memory(run, dp_shard=8, ep=8)
    for kind in ("weights", "weight_copies", "optimizer_state"):
        assert eight[kind] == pytest.approx(one[kind] / 8)
    assert eight["activations"] == one["activations"]
    assert eight["gathered_weights"] < 2 * 2 * one["weights"] / 4 / 8


def test_context_ranks_divide_the_activations_of_a_sequence():
    run = run_of("seq_len=131072", "samples_per_step=1", "samples_per_micro_batch=1")
    one, four = memory(run), memory(run, cp=4)
    assert four["activations"] == pytest.approx(one["activations"] / 4, rel=0.05)
    assert four["weights"] == pytest.approx(one["weights"] / 4)


def test_a_pipeline_stage_holds_its_layers_and_an_end_of_the_model():
    run = run_of("samples_per_micro_batch=1")
    one, two = memory(run), memory(run, pp=2)
    params = one["weights"] / 4
    ends = 2 * 151_936 * 2048 + 2048
    assert two["weights"] / 4 == pytest.approx((params - ends) / 2 + ends / 2)
    assert two["activations"] == one["activations"]


def test_more_devices_with_as_many_samples_each_take_as_long_and_what_they_send():
    run, run_of_eight = run_of("samples_per_micro_batch=2"), run_of("samples_per_step=128", "samples_per_micro_batch=2")
    one, eight = time(run), time(run_of_eight, dp_shard=8, ep=8)
    assert eight.parts["experts"] == pytest.approx(one.parts["experts"])
    assert eight.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 8)
    assert one.step_ms == pytest.approx(sum(one.parts.values()))
    # forward and backward, there and back: 8 rows of 4 KB per token, seven eighths of them to other devices
    sent = 4 * 8 * 8 * 16 * 4096 * 2048 * 2 * 7 / 8
    assert eight.communication["experts"] == pytest.approx(1e3 * sent / H200.nvlink_bytes_per_s)


def test_groups_that_leave_the_host_talk_over_the_network():
    run = run_of("samples_per_step=256", "samples_per_micro_batch=2")
    near, far = time(run, dp_shard=8, ep=8, dp_replicate=2), time(run, dp_shard=16, ep=16)
    assert far.communication["experts"] > 8 * near.communication["experts"]
    assert near.communication["replicas"] > 0
    assert far.communication["replicas"] == 0


def test_a_pipeline_waits_for_its_first_and_last_micro_batch():
    run = run_of("samples_per_micro_batch=2")
    one, two = time(run), time(run, pp=2)
    work = sum(two.parts[part] for part in two.parts if part not in (IDLE, "optimizer", "other"))
    rest = two.parts[IDLE] - work / 8
    assert rest == pytest.approx(REST_SHARE * (work + two.parts["optimizer"]))
    assert two.parts["experts"] == pytest.approx(one.parts["experts"] / 2)
    assert two.parts["head and loss"] == pytest.approx(one.parts["head and loss"])
    assert two.communication["pipeline"] > 0


def test_slower_memory_and_fewer_flops_take_longer():
    slow = dataclasses.replace(H200, peaks=DEVICES["h100"].peaks)
    run, known = run_of(), efficiency([], run_of())
    assert estimate_time(run, slow, MeshSizes(), known).step_ms > estimate_time(run, H200, MeshSizes(), known).step_ms
