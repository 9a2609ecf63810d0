"""The least work of a step, part by part, against closed forms."""

from __future__ import annotations

import dataclasses

import pytest

from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES
from pithwood.estimate.work import (
    ATTENTION_TRAINING,
    TRAINING,
    Peaks,
    Piece,
    Stages,
    attention_op,
    floors_ms,
    meta_model,
    repeated,
    state_bytes,
    step_flops,
    step_work,
)
from pithwood.observe.step_parts import PARTS
from pithwood.optim.config import AdamWConfig
from pithwood.recipes import load_recipe
from pithwood.run import Run
from tests.toy_mixer import ToyRecurrenceConfig

pytestmark = pytest.mark.quick


def run_of(*overrides: str, recipe: str = "qwen3_30b_8l") -> Run:
    return apply_overrides(load_recipe(recipe), overrides)


def flops(run: Run, part: str, what: str | None = None) -> float:
    return sum(piece.flops for piece in step_work(run)[part] if what in (None, piece.what))


def traffic(run: Run, part: str) -> float:
    return sum(piece.bytes for piece in step_work(run)[part])


def test_the_parts_of_a_step_come_to_closed_forms():
    run, tokens = run_of(), 16 * 4096
    assert flops(run, "experts") == 3 * 6 * 2048 * 768 * 8 * tokens * 8
    assert flops(run, "head and loss") == 3 * 2 * tokens * 2048 * 151_936
    assert flops(run, "dense") == 3 * 2 * tokens * 8 * 2048 * 128 * (2 * 32 + 2 * 4)
    assert flops(run, "attention") == 3.5 * 8 * 16 * 4 * 32 * 128 * (4096 * 4097 / 2)
    assert list(step_work(run)) == list(PARTS)


@pytest.mark.parametrize("attention", ["FullAttentionConfig", "MoBAConfig", "SlidingWindowConfig"])
def test_products_are_those_that_mfu_counts(attention):
    run = run_of(f"model.attention={attention}", "seq_len=8192", "samples_per_step=2", "samples_per_micro_batch=1")
    counted = sum(flops(run, part) for part in ("experts", "head and loss", "dense", "router and dispatch"))
    counted += flops(run, "attention", "attention") * TRAINING / ATTENTION_TRAINING
    assert counted == pytest.approx(step_flops(run), rel=1e-9)


def test_newton_schulz_takes_the_symmetric_half_of_two_products():
    run = run_of("model.num_layers=1", "optim.ns_steps=1")
    matrices = [(768, 2048)] * 3 * 128 + [(2048, 4096)] * 2 + [(512, 2048)] * 2
    assert flops(run, "optimizer") == sum(3 * r * r * c + r**3 for r, c in matrices)
    adamw = dataclasses.replace(run, optim=AdamWConfig())
    assert flops(adamw, "optimizer") == 0
    assert traffic(adamw, "optimizer") > 32 * 8e8


def test_the_state_of_an_update_is_momentum_and_two_moments():
    run = run_of("model.num_layers=1")
    matrices = 3 * 128 * 768 * 2048 + 2 * 2048 * 4096 + 2 * 512 * 2048
    others = 2 * 151_936 * 2048 + 128 * 2048 + 3 * 2048 + 2 * 128
    everything = Stages(frozenset([0]), True, True)
    assert state_bytes(run, meta_model(run), everything) == 4 * matrices + 8 * others
    narrow = run_of("model.num_layers=1", "optim.momentum_dtype=bf16")
    assert state_bytes(narrow, meta_model(run), everything) == 2 * matrices + 8 * others
    adamw = dataclasses.replace(run, optim=AdamWConfig(adam_state_dtype="bf16"))
    assert state_bytes(adamw, meta_model(run), everything) == 4 * (matrices + others)


def test_more_micro_batches_move_the_weights_more_often():
    few, many = run_of("samples_per_micro_batch=16"), run_of("samples_per_micro_batch=4")
    params = 8 * 3 * 128 * 2048 * 768
    assert traffic(many, "experts") - traffic(few, "experts") == pytest.approx(params * 3 * (4 + 8))
    assert flops(many, "experts") == flops(few, "experts")


def test_a_mixer_of_ones_own_is_counted_by_its_cost():
    run = run_of(recipe="debug")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention=ToyRecurrenceConfig()))
    assert flops(run, "attention") > 0
    assert attention_op(run.model.attention) == "ToyRecurrenceConfig"


def test_dense_layers_and_shared_experts_have_work():
    dense = run_of("model.dense_layers=0,1,2,3,4,5,6,7")
    assert flops(dense, "experts") == 0
    assert flops(dense, "dense", "dense layer") == 3 * 6 * 16 * 4096 * 2048 * 6144 * 8
    shared = run_of("model.moe.num_shared_experts=1")
    assert flops(shared, "experts") == flops(run_of(), "experts") * 9 / 8


def test_a_floor_is_the_longer_of_products_and_traffic():
    peaks = Peaks(flops_per_s=100.0, bytes_per_s=10.0)
    assert Piece("", flops=200.0, bytes=10.0).floor_s(peaks) == 2.0
    assert Piece("", flops=100.0, bytes=30.0).floor_s(peaks) == 3.0
    assert floors_ms({"dense": [Piece("", 200.0), Piece("", 0.0, 10.0)]}, peaks) == {"dense": 3000.0}


def test_fp32_products_go_by_their_own_peak_where_a_device_has_one():
    piece = Piece("", flops=200.0, bytes=10.0, fp32=True)
    assert piece.floor_s(Peaks(100.0, 10.0, fp32_flops_per_s=20.0)) == 10.0
    assert piece.floor_s(Peaks(100.0, 10.0)) == 2.0
    assert Piece("", flops=200.0).floor_s(Peaks(100.0, 10.0, fp32_flops_per_s=20.0)) == 2.0


def test_precision_decides_the_peak_of_passes_and_ns_dtype_that_of_newton_schulz():
    def in_fp32(*words: str) -> dict[str, set[bool]]:
        return {part: {p.fp32 for p in pieces if p.flops} for part, pieces in step_work(run_of(*words)).items()}

    passes = ("attention", "experts", "router and dispatch", "dense", "head and loss")
    for words, of_passes, of_update in (
        ((), False, False),
        (("precision=fp32",), True, False),
        (("optim.ns_dtype=fp32",), False, True),
    ):
        found = in_fp32(*words)
        assert {part: found[part] for part in passes} == {part: {of_passes} for part in passes}
        assert found["optimizer"] == {of_update}


def test_fp32_takes_an_h200_longer_by_its_peaks():
    half, whole = (floors_ms(step_work(run_of(*words)), DEVICES["h200"].peaks) for words in ((), ("precision=fp32",)))
    for part in ("attention", "experts", "head and loss"):
        assert whole[part] / half[part] == pytest.approx(790 / 67, rel=0.05), part


def test_recomputed_blocks_go_forward_once_more_but_for_what_makes_their_value_alone():
    half = run_of("recompute=none,none,none,none,block,block,block,block")
    assert set(repeated(run_of()).values()) == {1}
    # of the experts' forward pass gate and up, two thirds
    assert repeated(half)["experts"] == pytest.approx((3 + 1 / 3) / 3)
    whole = repeated(run_of("recompute=block"))
    assert whole == pytest.approx(
        {"attention": 4.5 / 3.5, "experts": (3 + 2 / 3) / 3, "router and dispatch": 1.25, "dense": 4 / 3}
    )
    assert repeated(run_of("recompute=block", "compile=true"))["experts"] == pytest.approx(4 / 3)


def test_chunks_of_experts_go_forward_once_more_within_recomputed_blocks_too():
    chunks, blocks = "model.moe.chunk_tokens=4096", "recompute=block"
    once = pytest.approx((3 + 2 / 3) / 3)
    assert repeated(run_of(chunks))["experts"] == once
    assert repeated(run_of(chunks, blocks)) == repeated(run_of(blocks))
    assert repeated(run_of(chunks, "model.moe.chunk_recompute=false"))["experts"] == 1
    # all tokens of a process at once are no chunk
    assert repeated(run_of("model.moe.chunk_tokens=65536"))["experts"] == 1
    assert repeated(run_of("model.moe.chunk_tokens=32768", "mesh.cp=2"))["experts"] == 1
    # shared experts are repeated with their block alone, and whole
    shared = "model.moe.num_shared_experts=8"
    assert repeated(run_of(chunks, shared))["experts"] == pytest.approx((3 + 1 / 3) / 3)
    assert repeated(run_of(blocks, shared))["experts"] == pytest.approx((3 + 1 / 3 + 1 / 2) / 3)


def test_attention_is_named_as_in_results_files():
    assert attention_op(run_of().model.attention) == "full"
    assert attention_op(run_of("model.attention=MoBAConfig").model.attention) == "moba"
    mixed = (run_of().model.attention, run_of("model.attention=MoBAConfig").model.attention)
    assert attention_op(mixed) == "mixed"


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_v"])
def test_the_stages_of_a_pipeline_do_the_work_of_the_whole_model(schedule):
    words = ("model.dense_layers=1", "model.dense_dim=512", "mesh.pp=2", "mesh.dp_shard=2")
    run = run_of(*words, f"mesh.schedule={schedule}")
    whole = floors_ms(step_work(run), Peaks())
    stages = [Stages.of(run, rank) for rank in range(4)]
    assert stages[0] == stages[1] != stages[2] == stages[3]
    assert (stages[0].first, stages[2].first) == (True, False)
    assert (stages[0].last, stages[2].last) == (schedule != "1f1b", schedule == "1f1b")
    parts = [floors_ms(step_work(run, stages=stages[rank]), Peaks()) for rank in (0, 2)]
    for part, ms in whole.items():
        assert parts[0][part] + parts[1][part] == pytest.approx(ms), part
        assert ms == 0 or part == "head and loss" or min(each[part] for each in parts) > 0
    assert [each["head and loss"] > 0 for each in parts] == [stage.last for stage in stages[::2]], "the head is on one"


def test_what_a_stage_repeats_is_that_of_its_own_layers():
    run = run_of("recompute=block,block,block,block,none,none,none,none", "mesh.pp=2")
    assert [repeated(run, Stages.of(run, rank))["experts"] for rank in (0, 1)] == pytest.approx([11 / 9, 1])
