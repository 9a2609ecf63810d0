"""Meshes: what each process has of a run, how groups talk, and how estimates change with both."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES, Reach
from pithwood.estimate.efficiency import REST_SHARE, efficiency
from pithwood.estimate.memory import ROOM, estimate_memory
from pithwood.estimate.pipeline import StageMs, pipeline_ms
from pithwood.estimate.spread import Spread
from pithwood.estimate.time import estimate_time
from pithwood.memory import keeps_copies, memory_by_kind
from pithwood.observe.step_parts import IDLE
from pithwood.parallel.config import MeshConfig
from pithwood.plan import plan
from pithwood.recipes import load_recipe
from pithwood.run import Run

pytestmark = pytest.mark.quick

H200 = DEVICES["h200"]


def run_of(*overrides: str, recipe: str = "qwen3_30b_8l") -> Run:
    return apply_overrides(load_recipe(recipe), overrides)


def memory(run: Run) -> dict[str, float]:
    return estimate_memory(run, H200)


def time(run: Run):
    return estimate_time(run, H200, efficiency([], run))


def test_one_device_holds_what_the_run_says_of_itself():
    run, cuda = run_of(), torch.device("cuda")
    assert memory(run) == memory_by_kind(run, cuda, copies=keeps_copies(run, cuda, H200.memory_bytes))
    small = run_of(recipe="debug")
    figures = plan(small)
    own = sum(memory_by_kind(small).values()) / 1e9
    assert own == pytest.approx(figures["weights_gradients_optimizer_gb"] + figures["activations_gb"])
    assert time(small).floors["head and loss"] > 0


PARAMS = {
    "dense": 8 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128 + 2 * 2048 + 128 * 2048),
    "experts": 8 * 128 * 3 * 2048 * 768,
}
"""Of the blocks of qwen3_30b_8l."""
ENDS = 2 * 151_936 * 2048 + 2048


def test_a_group_reaches_its_hosts_by_all_of_its_ports():
    near, far, thin = (Reach.of(H200, ranks) for ranks in (range(8), range(16), range(0, 16, 8)))
    assert [(reach.size, reach.hosts, reach.near) for reach in (near, far, thin)] == [(8, 1, 8), (16, 2, 8), (2, 2, 1)]
    gigabyte = 1e9
    assert near.gather_s(gigabyte) == pytest.approx(gigabyte * 7 / 8 / 360e9 + 7 * 5e-6)
    # half comes from the other host, through eight ports; inside the host it goes around meanwhile
    assert far.gather_s(gigabyte) == pytest.approx(max(gigabyte / 2 / 320e9, gigabyte * 15 / 16 / 360e9) + 15 * 5e-6)
    assert thin.gather_s(gigabyte) == pytest.approx(gigabyte / 2 / 40e9 + 5e-6)
    assert far.all_to_all_s(1e6) == pytest.approx(8e6 / 40e9 + 5e-6)
    assert near.all_to_all_s(1e6) == pytest.approx(7e6 / 360e9 + 5e-6)
    assert near.send_s(1e6) < thin.send_s(1e6)
    one = Reach.of(H200, [3])
    assert one.gather_s(1e9) == one.all_to_all_s(1e9) == one.send_s(1e9) == 0


def test_shards_divide_the_state_and_leave_the_activations():
    run = run_of("samples_per_micro_batch=1", "keep_weight_copies=always")
    one, eight = memory(run), memory(run_of("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=8"))
    for kind in ("weights", "weight_copies", "optimizer_state"):
        assert eight[kind] == pytest.approx(one[kind] / 8, rel=1e-3)
    assert eight["activations"] == one["activations"]


def test_gathered_weights_and_whole_gradients_stay_as_long_as_the_mesh_says():
    words = ("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=2")
    lasting, brief = memory(run_of(*words)), memory(run_of(*words, "mesh.gather=forward", "mesh.reduce=micro_batch"))
    dense, experts, pieces = PARAMS["dense"] + ENDS, PARAMS["experts"], (sum(PARAMS.values()) + ENDS) / 8
    embedding = ENDS / 2
    assert lasting["gathered_weights"] == pytest.approx(2 * (dense + experts / 2 + embedding), rel=1e-2)
    # a piece takes its whole gradient's place
    assert lasting["gradients"] == pytest.approx(4 * (dense + experts / 2))
    two = 2 * (PARAMS["dense"] + PARAMS["experts"] / 2) / 8
    assert brief["gathered_weights"] == pytest.approx(2 * two)
    assert brief["gradients"] == pytest.approx(4 * (two + ENDS + pieces))
    # nobody else has these experts: they are never gathered
    alone = memory(run_of("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=8"))
    assert alone["gathered_weights"] == pytest.approx(2 * (dense + embedding), rel=1e-2)


def test_rows_from_other_processes_take_memory_while_their_layers_wait_for_the_backward_pass():
    words = ("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=8", "model.moe.routing=learned")
    kept, again = memory(run_of(*words)), memory(run_of(*words, "recompute=block"))
    rows = Spread.of(run_of(*words)).rows_per_pair() * ROOM * 8 * 4096 * 2048 * 2
    assert kept["exchange"] == pytest.approx(rows * (8 + 4))
    assert again["exchange"] == pytest.approx(rows * 4)


def test_context_ranks_divide_the_activations_of_a_sequence():
    words = ("seq_len=131072", "samples_per_step=2", "samples_per_micro_batch=1")
    one, four = memory(run_of(*words)), memory(run_of(*words, "mesh.cp=4"))
    assert four["activations"] == pytest.approx(one["activations"] / 4, rel=0.05)
    assert four["weights"] == pytest.approx(one["weights"] / 4)


def test_the_fullest_moment_is_that_of_the_mesh_and_not_of_one_device():
    words = ("seq_len=131072", "samples_per_step=1", "samples_per_micro_batch=1", "mesh.cp=2")

    def kept(blocks: int) -> dict[str, float]:
        return memory(run_of(*words, f"recompute={','.join(['selective'] * blocks + ['block'] * (8 - blocks))}"))

    # with little kept that is the first block's backward pass, when all gradients are there; with much the end of the
    # only forward pass, when none is
    assert kept(1)["gradients"] > 0 == kept(7)["gradients"]
    peaks = [sum(kept(blocks).values()) for blocks in range(1, 8)]
    steps = [more - less for less, more in pairwise(peaks)]
    assert min(steps) >= 0
    assert steps[-1] == pytest.approx(steps[-2])


def test_a_pipeline_stage_holds_its_layers_and_an_end_of_the_model():
    one = memory(run_of("samples_per_micro_batch=1"))
    two = memory(run_of("samples_per_micro_batch=1", "mesh.pp=2"))
    assert two["weights"] / 4 == pytest.approx(sum(PARAMS.values()) / 2 + ENDS / 2)
    assert two["activations"] == one["activations"]
    uneven = memory(run_of("samples_per_micro_batch=1", "mesh.pp=2", "mesh.layers_per_stage=[6,2]"))
    assert uneven["weights"] / 4 == pytest.approx(sum(PARAMS.values()) * 6 / 8 + ENDS / 2)


@pytest.mark.parametrize(
    ("schedule", "in_flight"), [("1f1b", 4), ("interleaved", 4 + 3 / 2), ("zero_bubble_v", 4), ("dualpipe_v", 4.5)]
)
def test_schedules_differ_in_what_they_hold(schedule, in_flight):
    spread = Spread.of(run_of("samples_per_micro_batch=1", "mesh.pp=4", f"mesh.schedule={schedule}"))
    assert spread.in_flight == pytest.approx(in_flight)


def test_a_device_of_a_pipeline_waits_until_its_first_micro_batch_and_after_its_last():
    stages = [StageMs(10.0, 2.0, 0.0)] * 4
    # each pass is of a quarter of the layers, and three of each kind are waited for
    assert pipeline_ms(MeshConfig(pp=4), 16, stages, 0.0) == pytest.approx((16 + 3) * 12.0)
    assert pipeline_ms(MeshConfig(pp=4), 16, stages, 0.5) > (16 + 3) * 12.0
    halves = [StageMs(5.0, 1.0, 0.0)] * 8
    interleaved = pipeline_ms(MeshConfig(pp=4, schedule="interleaved"), 16, halves, 0.0)
    assert interleaved == pytest.approx((16 + 3 / 2) * 12.0)
    assert pipeline_ms(MeshConfig(pp=4, schedule="zero_bubble_v"), 16, halves, 0.0) < interleaved


def test_others_wait_for_the_stage_with_the_head_and_an_uneven_split_shortens_that():
    words = ("samples_per_micro_batch=1", "mesh.pp=2", "mesh.schedule=zero_bubble_v")
    even = time(run_of(*words))
    uneven = time(run_of(*words, "mesh.layers_per_stage=[3,2,2,1]"))
    assert uneven.step_ms < even.step_ms
    # both processes of the V do as much in the even split but for the head, which the first has
    whole = time(run_of("samples_per_micro_batch=1"))
    assert even.parts["head and loss"] == pytest.approx(whole.parts["head and loss"])
    assert even.parts["attention"] == pytest.approx(whole.parts["attention"] / 2)
    assert even.step_ms > whole.step_ms / 2


def test_more_devices_with_as_many_samples_each_take_as_long_and_what_they_send():
    balanced = "model.moe.routing=balanced"
    one = time(run_of("samples_per_micro_batch=2", balanced))
    run = run_of("samples_per_step=128", "samples_per_micro_batch=16", "mesh.dp_shard=8", "mesh.ep=8", balanced)
    eight = time(run)
    assert eight.parts["experts"] == pytest.approx(one.parts["experts"])
    assert eight.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 8)
    assert one.step_ms == pytest.approx(sum(one.parts.values()))
    # the eight experts of a token are neighbours and lie in one process: a row of 4 KB there and back, both ways,
    # seven eighths of them to other devices, in eight micro-batches of eight layers
    sent = 4 * 8 * 16 * 4096 * 2048 * 2 * 7 / 8 / 360e9 + 4 * 8 * 8 * 5e-6
    assert eight.communication["experts"] == pytest.approx(1e3 * sent)


def test_a_token_with_learned_experts_goes_to_most_processes_once():
    spread = Spread.of(run_of("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=8", "model.moe.routing=learned"))
    missed = 1.0
    for slot in range(8):
        missed *= (112 - slot) / (128 - slot)
    assert spread.rows_per_pair() == pytest.approx(1 - missed)


def test_groups_that_leave_the_host_talk_over_the_network():
    words = ("samples_per_step=256", "samples_per_micro_batch=32")
    near = time(run_of(*words, "mesh.dp_shard=8", "mesh.ep=8", "mesh.dp_replicate=2"))
    far = time(run_of(*words, "mesh.dp_shard=16", "mesh.ep=16"))
    assert far.communication["experts"] > 4 * near.communication["experts"]
    assert near.communication["replicas"] > 0
    assert far.communication["replicas"] == 0


def test_the_exchange_hides_behind_another_micro_batch_in_dualpipe_alone():
    words = ("samples_per_micro_batch=2", "mesh.pp=2", "mesh.dp_shard=2", "mesh.ep=2")
    plain, dual = time(run_of(*words)), time(run_of(*words, "mesh.schedule=dualpipe_v"))
    assert plain.communication["experts"] == plain.sent["experts"] > 0
    assert dual.communication["experts"] == 0
    assert dual.sent["experts"] == plain.sent["experts"]


def test_pairs_without_a_pipeline_hide_all_but_two_passes_and_hold_two_layers_more():
    words = ("samples_per_micro_batch=8", "mesh.dp_shard=2", "mesh.ep=2")
    plain, pairs = run_of(*words), run_of(*words, "mesh.overlap=pairs")
    sent = time(plain).communication["experts"]
    micro_batches = plain.samples_per_step // 8
    assert time(pairs).communication["experts"] == pytest.approx(sent / micro_batches)
    assert time(pairs).sent == time(plain).sent
    assert memory(pairs)["activations"] == pytest.approx(memory(plain)["activations"] * (1 + 2 / 8))
    rows = memory(plain)["exchange"] / (8 + 4)
    assert memory(pairs)["exchange"] == pytest.approx(rows * (8 + 2 + 4))
    anew = ("samples_per_micro_batch=8", "mesh.dp_shard=8", "mesh.ep=2", "mesh.gather=forward")
    one, two = memory(run_of(*anew)), memory(run_of(*anew, "mesh.overlap=pairs"))
    assert two["gathered_weights"] == pytest.approx(2 * one["gathered_weights"])


def test_sequences_over_devices_send_heads_where_they_divide():
    words = ("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1")
    heads, whole = time(run_of(*words, "mesh.cp=2")), time(run_of(*words, "mesh.cp=2", "mesh.context=gather"))
    assert heads.sent["sequence"] > 0
    # q, k, v and o of half the tokens to the other device, and their gradients
    sent = 8 * 4 * 2 * (2 * (32 + 4) * 128 * 2 * 16_384 / 2 / 360e9 + 5e-6)
    assert heads.sent["sequence"] == pytest.approx(1e3 * sent)
    assert whole.sent["sequence"] != heads.sent["sequence"]


def test_a_ring_hides_what_gathering_shows_and_holds_less():
    words = ("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1", "mesh.cp=8")
    ring, gather = run_of(*words), run_of(*words, "mesh.context=gather")
    tokens, keys, queries = 32_768 / 8, 2 * 4 * 128 * 2, 32 * 128 * 2
    # 7 turns of three quarters of another device's keys and values: forward, backward, and their gradients
    turns = 8 * 4 * 3 * 7 * (0.75 * keys * tokens / 360e9 + 5e-6)
    assert time(ring).sent["ring"] == pytest.approx(1e3 * turns)
    assert time(ring).communication["ring"] == 0
    # queries, keys and values to the zigzag, outputs back, and their gradients
    zigzag = 8 * 4 * 2 * ((2 * queries + keys) * tokens / 360e9 + 2 * 5e-6)
    assert time(ring).communication["sequence"] == pytest.approx(1e3 * zigzag)
    assert time(gather).sent["ring"] == 0
    assert time(gather).step_ms > time(ring).step_ms
    held = [estimate_memory(run, H200)["sequence"] for run in (ring, gather)]
    assert held[0] == 2 * keys * tokens + 4 * (32 + 2 * 4) * 128 * tokens
    assert held[1] == 7 * keys * tokens * 8


def test_context_ranks_divide_the_work_of_whole_sequences():
    words = ("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1")
    one, two = time(run_of(*words)), time(run_of(*words, "mesh.cp=2"))
    for part in ("attention", "experts", "head and loss"):
        assert two.floors[part] == pytest.approx(one.floors[part] / 2)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch():
    one, two = time(run_of("samples_per_micro_batch=2")), time(run_of("samples_per_micro_batch=2", "mesh.pp=2"))
    work = sum(two.parts[part] for part in two.parts if part not in (IDLE, "optimizer", "other"))
    # the process with the head waits for the other's first forward and last backward pass, which have none
    waits = two.parts[IDLE] - REST_SHARE * (work + two.parts["optimizer"])
    assert waits == pytest.approx((work - two.parts["head and loss"]) / 8, rel=0.03)
    assert two.parts["experts"] == pytest.approx(one.parts["experts"] / 2)
    assert two.parts["head and loss"] == pytest.approx(one.parts["head and loss"])
    assert two.communication["pipeline"] > 0


def test_state_on_the_host_bounds_an_update_by_its_way_there_and_back():
    on_host = "optim.offload_state=true"
    plain, away = time(run_of()), time(run_of(on_host))
    state = 4 * (PARAMS["experts"] + 8 * (2 * 2048 * 4096 + 2 * 2048 * 512)) + 8 * (
        ENDS + 8 * (2 * 128 + 2 * 2048 + 128 * 2048)
    )
    assert away.parts["optimizer"] == pytest.approx(1e3 * 2 * state / 62e9)
    assert away.parts["optimizer"] > plain.parts["optimizer"]
    assert {**away.parts, "optimizer": 0, IDLE: 0} == {**plain.parts, "optimizer": 0, IDLE: 0}
    shared = time(run_of(on_host, "mesh.dp_shard=8", "mesh.ep=8", "samples_per_micro_batch=16"))
    assert shared.parts["optimizer"] == pytest.approx(away.parts["optimizer"] / 8)
    fast = dataclasses.replace(H200, host_bytes_per_s=1e15)
    unbound = estimate_time(run_of(on_host), fast, efficiency([], run_of()))
    assert unbound.parts["optimizer"] == plain.parts["optimizer"]


def test_slower_memory_and_fewer_flops_take_longer():
    slow = dataclasses.replace(H200, peaks=DEVICES["h100"].peaks)
    run, known = run_of(), efficiency([], run_of())
    assert estimate_time(run, slow, known).step_ms > estimate_time(run, H200, known).step_ms


def test_replicas_hide_behind_what_scattering_leaves_of_the_last_backward_pass():
    words = ("samples_per_step=256", "samples_per_micro_batch=32", "mesh.dp_shard=8", "mesh.ep=8")
    alone, two = time(run_of(*words)), time(run_of(*words, "mesh.dp_replicate=2"))
    many = time(run_of("samples_per_step=4096", "samples_per_micro_batch=4096", *words[2:], "mesh.dp_replicate=2"))
    assert alone.sent["replicas"] == 0 < many.sent["replicas"] == two.sent["replicas"]
    compute = sum(ms for part, ms in two.parts.items() if part not in ("optimizer", "other", IDLE))
    room = 2 / 3 * compute / 8 - two.sent["gradients"]
    assert 0 < room < two.sent["replicas"]
    assert two.communication["replicas"] == pytest.approx(two.sent["replicas"] - room)
    assert many.communication["replicas"] == 0


@pytest.mark.parametrize(
    ("words", "kind", "more"),
    [
        (("samples_per_micro_batch=8", "mesh.dp_shard=4", "mesh.ep=4"), "experts", 5 / 4),
        (("mesh.cp=2", "mesh.context=heads"), "sequence", 3 / 2),
        (("mesh.cp=2", "mesh.context=gather"), "sequence", 3 / 2),
    ],
)
def test_recomputed_blocks_pay_for_what_travels_again(words, kind, more):
    once = time(run_of(*words))
    half = ",".join(["block"] * 4 + ["none"] * 4)
    # latencies are not in proportion to bytes
    for recompute, times in (("block", more), (half, (1 + more) / 2)):
        again = time(run_of(*words, f"recompute={recompute}"))
        assert again.sent[kind] == pytest.approx(times * once.sent[kind], rel=0.01)
