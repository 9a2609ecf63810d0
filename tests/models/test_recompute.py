"""Blocks that are computed again in the backward pass: same losses, counts and raw gradients, less kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import Batch
from pithwood.losses import LossLedger
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.models.recompute import ActivationPlan, Recompute
from pithwood.moe.config import MoEConfig
from pithwood.objectives import NextToken
from pithwood.observe.norms import NormRecorder
from pithwood.ops.packing import Packing, Selection
from pithwood.passes import forward_backward
from tests.numerics import assert_close
from tests.toy_mixer import ToyRecurrenceConfig

MOBA = MoBAConfig(block_size=8, top_k=2)
CFG = Qwen3MoEConfig(
    vocab_size=97, model_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, attention=MOBA,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=24, balance="micro_batch", balance_coef=0.1, z_loss_coef=0.01),
    dense_layers=(1,), dense_dim=40, rope_theta=10_000.0, init_std=0.2,
)  # fmt: skip


def batches() -> list[Batch]:
    """Two micro-batches of uneven documents, one of them empty, with uneven loss weights."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ([13, 40, 0, 3, 40], [70, 26]):
        tokens = torch.randint(0, 97, (96,), generator=generator)
        weight = (torch.rand(96, generator=generator) > 0.4).float()
        columns = {"tokens": tokens, "targets": tokens.roll(-1), "loss_weight": weight}
        made.append(Batch(columns, Packing.from_lengths(lengths)))
    return made


@dataclasses.dataclass
class Step:
    """What one optimizer step leaves behind."""

    model: Qwen3MoE
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]
    counts: list[list[int]]
    decisions: dict[str, Any]


def run_step(
    cfg: Qwen3MoEConfig,
    recompute: Recompute | tuple[Recompute, ...],
    frozen: tuple[str, ...] = (),
    prepare: Callable[[Qwen3MoE], None] = lambda model: None,
) -> Step:
    model = Qwen3MoE(cfg)
    model.init_weights(0)
    each = (recompute,) * cfg.num_layers if isinstance(recompute, str) else recompute
    model.keep_activations(ActivationPlan(each))
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in frozen))
    prepare(model)
    made, objective, decisions = batches(), NextToken(), {}
    ledger = LossLedger({"tokens": 192.0, **objective.totals(made)})
    for batch in made:
        forward_backward(model, objective, batch, ledger, torch.float32, probe=decisions)
    return Step(
        model,
        {name: float(mean) for name, mean in ledger.means().items()},
        {name: param.grad for name, param in model.named_parameters() if param.grad is not None},
        [block.mlp.counts_E.tolist() for layer, block in enumerate(model.blocks) if layer not in cfg.dense_layers],
        decisions,
    )


def assert_same(actual: Step, expected: Step) -> None:
    assert actual.losses == expected.losses
    assert actual.counts == expected.counts
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, 1e-6, name)
    assert actual.decisions.keys() == expected.decisions.keys()


@pytest.mark.parametrize("recompute", ["block", "selective", ("block", "none", "selective")])
@pytest.mark.parametrize("attention", [MOBA, FullAttentionConfig()])
@pytest.mark.parametrize("balance", ["micro_batch", "sequence", "global_batch"])
def test_gradients_losses_and_counts_are_those_of_the_plain_pass(recompute, attention, balance):
    moe = dataclasses.replace(CFG.moe, balance=balance, num_shared_experts=1)
    cfg = dataclasses.replace(CFG, attention=attention, moe=moe)
    assert_same(run_step(cfg, recompute), run_step(cfg, "none"))


@pytest.mark.parametrize("chunks", [{}, {"chunk_recompute": False}, {"save_rows": False}])
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_chunks_of_experts_within_blocks_change_nothing(recompute, chunks):
    moe = dataclasses.replace(CFG.moe, chunk_tokens=40, num_shared_experts=1, **chunks)
    plain = run_step(dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, num_shared_experts=1)), "none")
    assert_same(run_step(dataclasses.replace(CFG, moe=moe), recompute), plain)


@pytest.mark.quick
def test_carry_between_layers_keeps_its_gradient():
    cfg = dataclasses.replace(CFG, attention=(ToyRecurrenceConfig(), ToyRecurrenceConfig(), MOBA))
    plain = run_step(cfg, "none")
    assert float(plain.gradients["model.layers.0.self_attn.gate"].norm()) > 0
    assert_same(run_step(cfg, "block"), plain)
    assert_same(run_step(cfg, ("none", "block", "none")), plain)


@pytest.mark.quick
def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    """A frozen embedding leaves the first block without an input that wants a gradient."""
    frozen = ("embed_tokens", "layers.0.mlp", "layers.2.self_attn")
    step = run_step(CFG, "block", frozen)
    assert_same(step, run_step(CFG, "none", frozen))
    assert not any(part in name for part in frozen for name in step.gradients)


def test_a_wholly_frozen_model_with_a_trained_head_recomputes_nothing():
    frozen = ("embed_tokens", "layers")
    assert_same(run_step(CFG, "block", frozen), run_step(CFG, "none", frozen))


def test_decisions_are_taken_once_and_replayed():
    """The second pass selects nothing: replayed decisions of another model decide both passes."""
    other = dataclasses.replace(CFG, init_std=0.4)
    model = Qwen3MoE(other)
    model.init_weights(1)
    foreign: dict[str, Any] = {}
    batch = batches()[0]
    model.hidden(batch.columns["tokens"], batch.packing, probe=foreign)

    def gradients(recompute: Recompute) -> dict[str, torch.Tensor]:
        own = Qwen3MoE(CFG)
        own.init_weights(0)
        own.keep_activations(ActivationPlan((recompute,) * 3))
        ledger = LossLedger({"tokens": 96.0, **NextToken().totals([batch])})
        forward_backward(own, NextToken(), batch, ledger, torch.float32, replay=foreign)
        return {name: param.grad for name, param in own.named_parameters() if param.grad is not None}

    plain, again = gradients("none"), gradients("block")
    for name, gradient in plain.items():
        assert_close(again[name], gradient, 1e-6, name)


def test_the_statistics_of_a_step_see_every_decision():
    found = run_step(CFG, "block").decisions
    assert isinstance(found["layers.0.blocks"], Selection)
    assert {f"layers.{layer}.experts" for layer in (0, 2)} <= found.keys()


def test_norms_of_the_residual_stream_are_still_measured():
    def norms(recompute: Recompute) -> dict[str, float]:
        model = Qwen3MoE(CFG)
        model.init_weights(0)
        model.keep_activations(ActivationPlan((recompute,) * 3))
        recorder = NormRecorder(dict(model.named_parameters()), model.blocks, steps=4)
        batch = batches()[0]
        ledger = LossLedger({"tokens": 96.0, **NextToken().totals([batch])})
        forward_backward(model, NextToken(), batch, ledger, torch.float32)
        recorder.before_update()
        recorder.after_update(1)
        return recorder.rows([1])[1]["activation_rms"]

    plain = norms("none")
    assert min(plain.values()) > 0
    assert norms("block") == pytest.approx(plain)


@pytest.mark.quick
def test_bf16_activations_give_the_same_bits():
    def gradients(recompute: Recompute) -> dict[str, torch.Tensor]:
        model = Qwen3MoE(CFG)
        model.init_weights(0)
        model.keep_activations(ActivationPlan((recompute,) * 3))
        batch = batches()[0]
        ledger = LossLedger({"tokens": 96.0, **NextToken().totals([batch])})
        forward_backward(model, NextToken(), batch, ledger, torch.bfloat16)
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    plain, again = gradients("none"), gradients("block")
    assert all(gradient.dtype == torch.float32 for gradient in again.values())
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def kept_bytes(recompute: Recompute, tokens: int = 512) -> tuple[int, float]:
    """Bytes that a forward pass leaves allocated besides its output, and what the model's cost says."""
    cfg = dataclasses.replace(CFG, vocab_size=17)
    model = Qwen3MoE(cfg)
    model.init_weights(0)
    model.keep_activations(ActivationPlan((recompute,) * cfg.num_layers))
    ids, packing = torch.randint(0, 17, (tokens,)), Packing.from_lengths([tokens // 2] * 2)
    # what a packing remembers is made once
    model.hidden(ids, packing, ledger=LossLedger({"tokens": float(tokens)}))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        hidden = model.hidden(ids, packing, ledger=LossLedger({"tokens": float(tokens)}))
    allocated = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    return allocated - hidden.nbytes, model.cost(packing).saved_bytes


def test_a_recomputed_block_keeps_its_input_alone():
    whole, predicted = kept_bytes("none")
    inputs, predicted_inputs = kept_bytes("block")
    assert inputs < whole / 7
    assert whole == pytest.approx(predicted, rel=0.15)
    assert inputs == pytest.approx(predicted_inputs, rel=0.25)


@pytest.mark.quick
def test_the_cost_knows_what_a_recomputed_block_keeps():
    model = Qwen3MoE(CFG)
    packing = Packing.from_lengths([256, 256])
    plain = model.cost(packing)
    model.keep_activations(ActivationPlan(("block",) * 3))
    again = model.cost(packing)
    assert again.saved_bytes < plain.saved_bytes / 4
    assert again.model_flops == plain.model_flops
    # while its backward pass runs the largest block is there whole
    assert again.workspace_bytes > max(model.block_cost(layer, packing).whole.saved_bytes for layer in range(3))
    model.keep_activations(ActivationPlan(("block",) * 3, offload=True))
    assert model.cost(packing).saved_bytes < again.saved_bytes


def test_evaluation_does_not_recompute():
    model = Qwen3MoE(CFG)
    model.init_weights(0)
    batch = batches()[0]
    with torch.no_grad():
        plain = model.hidden(batch.columns["tokens"], batch.packing)
        model.keep_activations(ActivationPlan(("block",) * 3))
        assert torch.equal(model.hidden(batch.columns["tokens"], batch.packing), plain)


def test_a_selective_block_keeps_neither_its_norms_outputs_nor_the_rows_of_its_experts():
    whole, predicted = kept_bytes("none")
    selective, predicted_selective = kept_bytes("selective")
    # two norms in each of three blocks; two of these have experts, two for each token
    assert whole - selective == (3 * 2 * 512 + 2 * 512 * 2) * 48 * 4
    assert predicted - predicted_selective == whole - selective
