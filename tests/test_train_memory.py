"""The trainer's memory settings: the same digits, resumed too; copies that are never stale; refusals in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.config import config_hash
from pithwood.data.mixture import open_data
from pithwood.data.usage import training_batches
from pithwood.memory import keeps_copies, memory_by_kind, memory_line
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.observe.events import read_events
from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.plan import plan
from pithwood.recipes import load_recipe
from pithwood.run import LENGTH_AND_LOGGING, Phase, check_device_settings
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.test_train import losses, small_run

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param("block", "block", id="throughout", marks=pytest.mark.slow),
        pytest.param("none", ("block", "selective"), id="from the resume on"),
    ],
)
def test_a_run_killed_and_resumed_with_recomputation_repeats_the_plain_runs_digits(tmp_path, monkeypatch, first, then):
    run = small_run(tmp_path / "text")
    plain = losses(train(run, runs_dir=tmp_path / "plain", console=False))
    step = Trainer.train_step

    def fail_at_six(self, number, batches, statistics=False):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batches, statistics)

    monkeypatch.setattr(Trainer, "train_step", fail_at_six)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(run, recompute=first), runs_dir=tmp_path / "again", console=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    summary = train(dataclasses.replace(run, recompute=then), runs_dir=tmp_path / "again", console=False)
    assert [event for event in read_events(Path(summary["run_dir"]) / "events.jsonl") if event["kind"] == "resume"]
    assert losses(summary) == plain


@pytest.mark.quick
@pytest.mark.parametrize(
    "change", [{"recompute": "block"}, {"offload_activations": True}, {"keep_weight_copies": "never"}]
)
def test_settings_that_change_no_digit_keep_the_runs_folder(change):
    run = load_recipe("debug")
    changed = dataclasses.replace(run, **change)
    assert config_hash(changed, exclude=LENGTH_AND_LOGGING) == config_hash(run, exclude=LENGTH_AND_LOGGING)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recompute": ("block",)}, "recompute has 1 entries but model.num_layers=2"),
        ({"offload_activations": True}, "recompute='none' has none; set recompute=block"),
        ({"keep_weight_copies": "always"}, "precision=fp32 uses the weights as they are"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load_recipe("debug"), **change).validate()


@pytest.mark.quick
def test_offload_on_the_cpu_is_refused_in_words():
    run = dataclasses.replace(load_recipe("debug"), recompute="block", offload_activations=True)
    check_device_settings(run, CUDA)
    with pytest.raises(ValueError, match="on the CPU, where they are already"):
        check_device_settings(run, CPU)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_weight_copies_are_those_of_the_present_weights(tmp_path, ema_decay):
    """After the start, an update, a validation on averaged weights, and a change of phase."""
    base = small_run(tmp_path / "text")
    phases = (Phase(4), Phase(8, attention=FullAttentionConfig()))
    run = dataclasses.replace(
        base,
        precision="bf16",
        keep_weight_copies="always",
        optim=MuonConfig(lr=0.02, ema_decay=ema_decay),
        phases=phases,
    )
    corpus = open_data(run.data, tmp_path / "corpora", lambda line: None)
    source = training_batches(corpus, run.stages(), seed=0, steps=8)
    trainer = Trainer(run, CPU, corpus)

    def check() -> None:
        weights = trainer.model.product_weights()
        assert {name.rpartition(".")[2] for name in weights} >= {"weight", "gate_up_proj", "down_proj"}
        for name, weight in weights.items():
            copy, version = weight.kept_copy
            assert version == weight._version, name
            assert torch.equal(copy, weight.to(torch.bfloat16)), name

    check()
    trainer.train_step(0, source.step(0))
    check()
    trainer.validate(corpus, 4)
    check()
    trainer.enter_phase(4)
    check()


def test_weight_copies_change_no_digit(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), precision="bf16")
    plain = losses(train(run, runs_dir=tmp_path / "plain", console=False))
    kept = dataclasses.replace(run, keep_weight_copies="always")
    assert losses(train(kept, runs_dir=tmp_path / "kept", console=False)) == plain


@pytest.mark.quick
def test_memory_by_kind_counts_weights_gradients_and_the_optimizers_state():
    run = dataclasses.replace(load_recipe("debug"), optim=AdamWConfig(ema_decay=0.9))
    with torch.device("meta"):
        count = sum(param.numel() for param in Qwen3MoE(run.model).parameters())
    kinds = memory_by_kind(run, CPU)
    assert kinds["weights"] == kinds["weight_average"] == kinds["gradients"] == 4 * count
    # two moments, and a few scalars
    assert kinds["optimizer_state"] == pytest.approx(8 * count, rel=1e-3)
    assert kinds["weight_copies"] == 0
    frozen = dataclasses.replace(run, phases=(Phase(run.steps, trainable=("lm_head.*",)),))
    assert memory_by_kind(frozen, CPU)["gradients"] < 0.3 * kinds["gradients"]


@pytest.mark.quick
def test_the_costliest_phase_counts():
    run = load_recipe("debug")
    cheap = dataclasses.replace(run, phases=(Phase(run.steps, trainable=("lm_head.*",)),))
    both = dataclasses.replace(run, phases=(Phase(10, trainable=("lm_head.*",)), Phase(run.steps)))
    assert memory_by_kind(both, CPU) == memory_by_kind(run, CPU)
    assert sum(memory_by_kind(cheap, CPU).values()) < sum(memory_by_kind(run, CPU).values())


@pytest.mark.quick
def test_what_is_not_kept_is_not_counted():
    run = dataclasses.replace(load_recipe("lm_100m"), samples_per_micro_batch=16)

    def activations(**change) -> float:
        kinds = memory_by_kind(dataclasses.replace(run, **change), CUDA)
        return kinds["activations"]

    whole, inputs = activations(), activations(recompute="block")
    half = activations(recompute=("block",) * 6 + ("none",) * 6)
    assert activations(recompute="selective") < whole
    assert inputs < 0.1 * whole
    assert half == pytest.approx((whole + inputs) / 2, rel=0.02)
    assert activations(recompute="block", offload_activations=True) < 0.4 * inputs


@pytest.mark.quick
def test_in_a_single_micro_batch_gradients_come_as_activations_go():
    model = Qwen3MoEConfig(num_layers=8)
    run = dataclasses.replace(
        load_recipe("lm_100m"), model=model, seq_len=4096, samples_per_step=16, samples_per_micro_batch=16
    )
    several = dataclasses.replace(run, samples_per_step=32)
    alone, more = memory_by_kind(run, CUDA), memory_by_kind(several, CUDA)
    assert alone["gradients"] == 0
    assert alone["activations"] == more["activations"]
    # with recomputed blocks the peak is the last backward pass, when one block is there whole beside all gradients
    again = memory_by_kind(dataclasses.replace(run, recompute="block"), CUDA)
    assert again["gradients"] == more["gradients"]
    assert again["workspace"] > more["activations"] / 8


@pytest.mark.quick
def test_copies_are_kept_on_a_gpu_where_they_fit():
    run = dataclasses.replace(load_recipe("lm_100m"), model=Qwen3MoEConfig(num_layers=8), samples_per_micro_batch=1)
    size = sum(memory_by_kind(run, CUDA).values())
    assert keeps_copies(run, CUDA, size / 0.89)
    assert not keeps_copies(run, CUDA, size / 0.91)
    assert not keeps_copies(run, CPU, 1e15)
    assert not keeps_copies(dataclasses.replace(run, keep_weight_copies="never"), CUDA, 1e15)
    assert keeps_copies(dataclasses.replace(run, keep_weight_copies="always"), CUDA, 1.0)


@pytest.mark.quick
def test_the_start_says_what_is_kept():
    run = dataclasses.replace(load_recipe("debug"), recompute=("block", "none"), precision="bf16")
    line = memory_line(run, CUDA, copies=True)
    assert "activations kept in 1 of 2 blocks, block inputs kept alone in 1 of 2 blocks" in line
    assert "bf16 copies of the weights (" in line


@pytest.mark.quick
def test_the_plan_knows_recomputation(tmp_path: Path):
    run = small_run(tmp_path / "text")
    again = dataclasses.replace(run, recompute="block")
    assert json.dumps(plan(again))
    assert plan(again)["activations_gb"] < plan(run)["activations_gb"]
