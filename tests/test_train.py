"""The training step and the loop around it: true means, resuming, phases, skipped steps, averages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import Batch, BatchSource
from pithwood.data.prepare import CorpusConfig, prepare
from pithwood.data.sources import TextFolder
from pithwood.generate.run import generate_from_run
from pithwood.losses import LossLedger, LossTerm
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.objectives import NextToken
from pithwood.observe.events import read_events
from pithwood.ops.packing import Packing
from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.optim.schedule import WarmupStableDecay
from pithwood.passes import forward_backward
from pithwood.plan import plan
from pithwood.run import Phase, Run
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.numerics import assert_close


def small_corpus(folder: Path) -> TextFolder:
    """Forty documents of made-up words over a skewed vocabulary: enough pairs for a few hundred BPE tokens."""
    folder.mkdir(exist_ok=True)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    for number in range(40):
        path = folder / f"doc{number:02}.txt"
        if not path.exists():
            rng = random.Random(number)
            words = [
                syllables[int(60 * rng.random() ** 2)] + syllables[int(60 * rng.random() ** 3)] for _ in range(120)
            ]
            path.write_text(f"document {number}\n{' '.join(words)}\n")
    return TextFolder(str(folder), "*.txt")


def small_run(folder: Path) -> Run:
    """A model and corpus that take a hundredth of a second a step."""
    return Run(
        name="small",
        model=Qwen3MoEConfig(
            vocab_size=320, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            attention=MoBAConfig(block_size=8, top_k=2),
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=32, balance="micro_batch", balance_coef=0.01),
            rope_theta=10_000.0, init_std=0.05,
        ),
        data=CorpusConfig(source=small_corpus(folder), vocab_size=320, validation_fraction=0.1, dedup_threshold=None),
        optim=MuonConfig(lr=0.02, schedule=WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.2)),
        steps=8, seq_len=64, samples_per_step=4, samples_per_micro_batch=2, threads=1, device="cpu",
        log_every=2, validate_every=4, checkpoint_every=4, sample_prompts=("document ",), sample_tokens=6,
    )  # fmt: skip


def losses(summary: dict) -> list[tuple[int, float]]:
    events = read_events(Path(summary["run_dir"]) / "events.jsonl")
    return [(event["step"], event["loss"]) for event in events if event["kind"] == "train"]


@pytest.mark.quick
def test_a_run_learns_and_leaves_everything_it_promises(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), steps=30)
    summary = train(run, runs_dir=tmp_path / "runs", console=False)
    folder = Path(summary["run_dir"])
    for name in (
        "config.json",
        "events.jsonl",
        "loss.png",
        "blocks.png",
        "sample.txt",
        "summary.json",
        "tokenizer.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    curve = losses(summary)
    assert [step for step, _ in curve] == list(range(1, 31))
    assert curve[-1][1] < 0.75 * curve[0][1]
    event = next(e for e in reversed(read_events(folder)) if e["kind"] == "train")
    for name in ("bits_per_byte", "grad_norm", "lr", "tokens_per_s", "mfu", "peak_memory_gb",
                 "expert_load_max_over_mean",
                 "expert_load_entropy", "block_own_share", "step_s", "loss/moe_balance"):  # fmt: skip
        assert math.isfinite(event[name]), name
    assert "document " in (folder / "sample.txt").read_text()


def test_a_finished_run_is_not_trained_again_and_new_starts_over(tmp_path):
    run = small_run(tmp_path / "text")
    first = train(run, runs_dir=tmp_path / "runs", console=False)
    changed = (Path(first["run_dir"]) / "events.jsonl").stat().st_mtime_ns
    assert train(run, runs_dir=tmp_path / "runs", console=False) == first
    assert (Path(first["run_dir"]) / "events.jsonl").stat().st_mtime_ns == changed
    again = train(run, runs_dir=tmp_path / "runs", console=False, new=True)
    assert again["run_dir"] == first["run_dir"]
    assert losses(again) == losses(first)
    assert len(list((tmp_path / "runs").glob("small-*.old1"))) == 1


def test_an_interrupted_run_resumes_with_the_same_digits(tmp_path, monkeypatch):
    run = dataclasses.replace(
        small_run(tmp_path / "text"), checkpoint_every=3, optim=MuonConfig(lr=0.02, ema_decay=0.9)
    )
    whole = train(run, runs_dir=tmp_path / "a", console=False)
    step = Trainer.train_step

    def fail_at_six(self, number, *args, **kwargs):
        if number == 6:
            raise RuntimeError("power cut")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", fail_at_six)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, runs_dir=tmp_path / "b", console=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    resumed = train(run, runs_dir=tmp_path / "b", console=False)
    assert losses(resumed) == losses(whole)
    assert resumed["validation_loss"] == whole["validation_loss"]
    kinds = [event["kind"] for event in read_events(resumed["run_dir"])]
    assert kinds.count("resume") == 1


def test_branching_starts_from_another_runs_weights(tmp_path):
    run = small_run(tmp_path / "text")
    first = train(run, runs_dir=tmp_path / "runs", console=False)
    name = Path(first["run_dir"]).name
    other = dataclasses.replace(run, optim=MuonConfig(lr=0.001), steps=10)
    branch = train(other, runs_dir=tmp_path / "runs", console=False, branch_from=f"{name}@4")
    assert [step for step, _ in losses(branch)] == [5, 6, 7, 8, 9, 10]
    assert losses(branch)[0] == losses(first)[4]
    with pytest.raises(ValueError, match=r"no checkpoint at step '5'; there are \[4, 8\]"):
        train(other, runs_dir=tmp_path / "runs", console=False, branch_from=f"{name}@5")
    longer = dataclasses.replace(other, steps=12)
    with pytest.raises(ValueError, match=f"begun from {name}@4; drop --from"):
        train(longer, runs_dir=tmp_path / "runs", console=False, branch_from=f"{name}@8")
    resumed = train(longer, runs_dir=tmp_path / "runs", console=False)
    assert [step for step, _ in losses(resumed)][-1] == 12
    assert json.loads((Path(resumed["run_dir"]) / "config.json").read_text())["branched_from"] == f"{name}@4"
    with pytest.raises(ValueError, match="would move away"):
        train(run, runs_dir=tmp_path / "runs", console=False, new=True, branch_from=f"{name}@4")
    third = dataclasses.replace(run, optim=MuonConfig(lr=0.002), steps=8)
    with pytest.raises(ValueError, match="already has the 8 steps"):
        train(third, runs_dir=tmp_path / "runs", console=False, branch_from=f"{name}@8")
    with pytest.raises(ValueError, match="already past steps=11; raise steps to at least 12"):
        train(dataclasses.replace(other, steps=11), runs_dir=tmp_path / "runs", console=False)


def test_micro_batches_give_the_gradient_of_the_whole_step(tmp_path):
    """True token mean: however a step is cut, with uneven loss weights and a balance loss per document."""
    cfg = small_run(tmp_path / "text").model
    moe = dataclasses.replace(cfg.moe, balance="sequence", z_loss_coef=0.01)
    cfg = dataclasses.replace(cfg, moe=moe)
    generator = torch.Generator().manual_seed(0)
    lengths = [13, 64, 3, 48]
    tokens = torch.randint(0, 320, (128,), generator=generator)
    weight = (torch.rand(128, generator=generator) > 0.4).float()
    weight[:13] = 0.0

    def gradients(cuts: list[list[int]]) -> tuple[dict[str, torch.Tensor], float]:
        model = Qwen3MoE(cfg)
        model.init_weights(0)
        batches, at = [], 0
        for documents in cuts:
            size = sum(documents)
            span = slice(at, at + size)
            columns = {"tokens": tokens[span], "targets": tokens.roll(-1)[span], "loss_weight": weight[span]}
            batches.append(Batch(columns, Packing.from_lengths(documents)))
            at += size
        objective = NextToken()
        ledger = LossLedger({"tokens": 128.0, **objective.totals(batches)})
        for batch in batches:
            forward_backward(model, objective, batch, ledger, torch.float32)
        return {name: p.grad for name, p in model.named_parameters()}, float(ledger.means()["loss"])

    whole, loss = gradients([lengths])
    for cuts in ([[13], [64], [3, 48]], [[13, 64], [3], [48]]):
        parts, part_loss = gradients(cuts)
        assert part_loss == pytest.approx(loss, rel=1e-6)
        for name, grad in whole.items():
            assert_close(parts[name], grad, 1e-5, name)


def test_phases_switch_attention_freeze_and_come_back(tmp_path):
    base = small_run(tmp_path / "text")
    moba = MoBAConfig(block_size=8, top_k=2, key_conv=3)
    run = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, attention=moba),
        phases=(
            Phase(4),
            Phase(
                6,
                attention=FullAttentionConfig(),
                trainable=("*", "!model.embed_tokens.*"),
                lr_scales={"*self_attn*": 0.5},
            ),
            Phase(8),
        ),
        checkpoint_every=1, keep_checkpoints=8,
    )  # fmt: skip
    whole = train(run, runs_dir=tmp_path / "a", console=False)
    short = train(dataclasses.replace(run, steps=8), runs_dir=tmp_path / "b", console=False)
    assert losses(short) == losses(whole)

    from pithwood.checkpoint.load import load_checkpoint

    def tensors(step: int) -> dict[str, torch.Tensor]:
        return load_checkpoint(Path(whole["run_dir"]) / "checkpoints" / f"step-{step:08d}")[0]

    embed, conv = "model.model.embed_tokens.weight", "model.layers.0.self_attn.key_conv.weight"
    assert torch.equal(tensors(4)[embed], tensors(6)[embed])
    assert not torch.equal(tensors(6)[embed], tensors(7)[embed])
    assert torch.equal(tensors(4)[f"model.{conv}"], tensors(6)[f"parked.{conv}"])
    assert not torch.equal(tensors(4)[f"model.{conv}"], tensors(8)[f"model.{conv}"])
    switched = [event["step"] for event in read_events(whole["run_dir"]) if event["kind"] == "phase"]
    assert switched == [4, 6]


def test_resuming_inside_a_later_phase_repeats_the_digits(tmp_path, monkeypatch):
    base = small_run(tmp_path / "text")
    run = dataclasses.replace(
        base,
        phases=(
            Phase(2),
            Phase(5, attention=FullAttentionConfig()),
            Phase(8, attention=MoBAConfig(block_size=16, top_k=1)),
        ),
        checkpoint_every=1,
    )
    whole = train(run, runs_dir=tmp_path / "a", console=False)
    step = Trainer.train_step
    stops = iter([2, 4, 5, 6])

    def fail(self, number, *args, **kwargs):
        if number == fail.at:
            raise RuntimeError("power cut")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", fail)
    for at in stops:
        fail.at = at
        with pytest.raises(RuntimeError, match="power cut"):
            train(run, runs_dir=tmp_path / "b", console=False)
    fail.at = -1
    assert losses(train(run, runs_dir=tmp_path / "b", console=False)) == losses(whole)


def test_steps_that_are_not_finite_change_nothing_and_a_few_in_a_row_stop_the_run(tmp_path, monkeypatch):
    run = dataclasses.replace(small_run(tmp_path / "text"), log_every=1, checkpoint_every=2, max_skipped_steps=3)
    bad = {3, 5, 6, 7}
    totals = NextToken.totals
    calls = {"step": -1}

    def poisoned(self, batches):
        calls["step"] += 1
        counts = totals(self, batches)
        return {**counts, "loss": counts["loss"] * float("nan")} if calls["step"] in bad else counts

    monkeypatch.setattr(NextToken, "totals", poisoned)
    with pytest.raises(
        ValueError, match=r"3 steps in a row .* stopped at step 8 .* Last good checkpoint: .*step-00000006"
    ):
        train(run, runs_dir=tmp_path / "runs", console=False)
    folder = next((tmp_path / "runs").glob("small-*"))
    events = read_events(folder)
    skipped = [event["step"] for event in events if event["kind"] == "train" and event["skipped"]]
    assert skipped == [4, 6, 7, 8]
    assert [event["consecutive"] for event in events if event["kind"] == "skip"] == [1, 1, 2, 3]


def test_skipped_steps_are_reported_whatever_flushes_the_log(tmp_path, monkeypatch):
    run = dataclasses.replace(
        small_run(tmp_path / "text"), steps=12, log_every=8, checkpoint_every=6, validate_every=7, max_skipped_steps=3
    )
    totals, calls = NextToken.totals, {"step": -1}

    def poisoned(self, batches):
        calls["step"] += 1
        counts = totals(self, batches)
        return {**counts, "loss": counts["loss"] * float("nan")} if 1 <= calls["step"] <= 5 else counts

    monkeypatch.setattr(NextToken, "totals", poisoned)
    with pytest.raises(ValueError, match="3 steps in a row"):
        train(run, runs_dir=tmp_path / "runs", console=False)
    events = read_events(next((tmp_path / "runs").glob("small-*")))
    assert [event["step"] for event in events if event["kind"] == "skip"] == [2, 3, 4]


def test_a_frozen_router_keeps_its_selection_bias(tmp_path):
    base = small_run(tmp_path / "text")
    moe = dataclasses.replace(base.model.moe, bias_update_rate=0.01)
    run = dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe))
    corpus = prepare(run.data, tmp_path / "corpora")
    source = BatchSource(corpus, "train", seq_len=64, samples_per_batch=2, samples_per_step=4, seed=0)
    for trainable, moves in ((("*",), True), (("*self_attn*",), False)):
        phase = Phase(8, trainable=trainable)
        trainer = Trainer(dataclasses.replace(run, phases=(phase,)), torch.device("cpu"), corpus)
        trainer.train_step(0, [source.batch(0, micro) for micro in range(2)])
        bias = trainer.moe_layers()[0].gate.e_score_correction_bias
        assert bool(bias.any()) == moves


@dataclasses.dataclass(frozen=True)
class TwiceNextToken(NextToken):
    """An objective from outside the package, whose term has another name."""

    def terms(self, hidden_TD, head, batch):
        (term,) = super().terms(hidden_TD, head, batch)
        return [LossTerm("twice", term.sum, term.count, 2.0)]

    def totals(self, batches):
        return {"twice": super().totals(batches)["loss"]}


def test_an_objective_of_ones_own_trains(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), steps=4)
    plain = train(run, runs_dir=tmp_path / "runs", console=False)
    own = train(dataclasses.replace(run, objective=TwiceNextToken()), runs_dir=tmp_path / "runs", console=False)
    events = [event for event in read_events(own["run_dir"]) if event["kind"] == "train"]
    assert events[0]["loss/twice"] == losses(plain)[0][1]
    assert all("bits_per_byte" not in event for event in events)
    whole = [2 * event["loss/twice"] + 0.01 * event["loss/moe_balance"] for event in events]
    assert [event["loss"] for event in events] == pytest.approx(whole, rel=1e-6)


def test_runs_are_found_by_recipe_before_by_prefix(tmp_path):
    from pithwood.run_folder import find_run

    for name in ("demo-11111111", "demo-22222222", "demo_dense-33333333", "demo-22222222.old1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    os.utime(tmp_path / "demo-11111111" / "config.json", ns=(0, 0))
    assert find_run("demo", tmp_path).name == "demo-22222222"
    assert find_run("demo_d", tmp_path).name == "demo_dense-33333333"
    assert find_run("demo-22222222.old1", tmp_path).name == "demo-22222222.old1"
    with pytest.raises(ValueError, match="no run 'nope'"):
        find_run("nope", tmp_path)


def test_weights_averaged_over_phases_load_for_generation(tmp_path):
    base = small_run(tmp_path / "text")
    layers = (MoBAConfig(block_size=8, top_k=2, key_conv=3), MoBAConfig(block_size=8, top_k=2))
    run = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, attention=layers),
        optim=MuonConfig(lr=0.02, ema_decay=0.9),
        phases=(Phase(4), Phase(8, attention=FullAttentionConfig())),
    )
    summary = train(run, runs_dir=tmp_path / "runs", console=False)
    result = generate_from_run(summary["run_dir"], runs_dir=tmp_path / "runs", prompt="document ", max_tokens=4)
    assert result["step"] == 8
    assert result["tokens"] >= 1


def test_averaged_weights_are_what_is_validated_and_sampled(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), optim=AdamWConfig(lr=0.01, ema_decay=0.5, ema_warmup=False))
    corpus = prepare(run.data, tmp_path / "corpora")
    trainer = Trainer(run, torch.device("cpu"), corpus)
    source = BatchSource(corpus, "train", seq_len=64, samples_per_batch=2, samples_per_step=4, seed=0)
    name = "lm_head.weight"
    weights = [trainer.model.lm_head.weight.detach().clone()]
    for step in range(3):
        trainer.train_step(step, [source.batch(step, micro) for micro in range(2)])
        weights.append(trainer.model.lm_head.weight.detach().clone())
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    with trainer.averaged_weights():
        assert_close(trainer.model.lm_head.weight, average, 1e-6, name)
    assert torch.equal(trainer.model.lm_head.weight, weights[-1])


def test_bf16_follows_fp32_and_keeps_masters_in_fp32(tmp_path):
    run = dataclasses.replace(small_run(tmp_path / "text"), optim=AdamWConfig(lr=0.003), checkpoint_every=100)
    curves = []
    for precision in ("fp32", "bf16"):
        summary = train(dataclasses.replace(run, precision=precision), runs_dir=tmp_path / "runs", console=False)
        curves.append([loss for _, loss in losses(summary)])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    from pithwood.checkpoint.load import latest_checkpoint, load_checkpoint

    tensors, _ = load_checkpoint(latest_checkpoint(Path(summary["run_dir"])))
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.startswith("model."))


def test_plan_needs_no_memory_and_counts_the_model(tmp_path):
    from pithwood.recipes.lm import lm_100m

    run = lm_100m()
    result = plan(run)
    assert 80e6 < result["active_parameters"] < 160e6
    assert result["tokens_per_step"] == run.seq_len * run.samples_per_step
    small = plan(small_run(tmp_path / "text"))
    model = Qwen3MoE(small_run(tmp_path / "text").model)
    assert small["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_micro_batch": 3}, "samples_per_micro_batch=3 must divide samples_per_step=4; try one of"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"phases": (Phase(4),)}, "last phase ends at step 4 but steps=8"),
        ({"phases": (Phase(4), Phase(4))}, "rising until_step"),
        ({"phases": (Phase(4), Phase(8, trainable=("*self_atn*",)))}, "self_atn"),
        ({"phases": (Phase(4), Phase(8, attention=(FullAttentionConfig(),)))}, "attention has 1 entries"),
        ({"sample_tokens": -1}, "sample_tokens=-1 must be 0 or more"),
        ({"threads": -1}, "threads=-1 must be 0 or more"),
        ({"threads": 10**6}, "threads=1000000 is far more"),
        ({"name": "../elsewhere"}, "becomes a folder's name"),
        ({"device": "cuda"}, "device=cuda but torch sees no CUDA GPU"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    if "device" in change and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    run = dataclasses.replace(small_run(tmp_path / "text"), **change)
    with pytest.raises(ValueError, match=message):
        train(run, runs_dir=tmp_path / "runs", console=False)
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_is_one_line_not_a_traceback(tmp_path, capsys):
    from pithwood.cli import main

    (tmp_path / "file").write_text("not a folder")
    assert main(["train", "debug", "--runs-dir", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("pithwood: error: ")
    assert str(tmp_path / "file") in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_an_altered_corpus_is_noticed_before_training(tmp_path):
    run = small_run(tmp_path / "text")
    summary = train(run, runs_dir=tmp_path / "runs", console=False)
    shard = next((tmp_path / "runs" / "corpora").glob("*/train-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.bin is altered"):
        train(dataclasses.replace(run, steps=9), runs_dir=tmp_path / "runs", console=False)
    assert Path(summary["run_dir"]).exists()
