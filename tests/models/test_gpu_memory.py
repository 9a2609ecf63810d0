"""Recomputation, offload and weight copies on a GPU: the plain step's losses and gradients, no wait for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import Batch
from pithwood.losses import LossLedger
from pithwood.models import offload
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.models.recompute import ActivationPlan, Recompute
from pithwood.moe.config import MoEConfig
from pithwood.objectives import NextToken
from pithwood.ops.master import keep_copies
from pithwood.ops.packing import Packing
from pithwood.passes import forward_backward
from tests.numerics import rel_error

pytestmark = pytest.mark.gpu

TOKENS = 4096
CFG = Qwen3MoEConfig(
    vocab_size=1024, model_dim=256, num_layers=5, num_heads=8, num_kv_heads=2, head_dim=64,
    attention=MoBAConfig(block_size=64, top_k=3),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=128, balance="global_batch", balance_coef=0.1),
    rope_theta=10_000.0,
)  # fmt: skip


def make_model(plan: ActivationPlan | None = None, copies: bool = False, cfg: Qwen3MoEConfig = CFG) -> Qwen3MoE:
    with torch.device("cuda"):
        model = Qwen3MoE(cfg)
    model.init_weights(0)
    if plan is not None:
        model.keep_activations(plan)
    if copies:
        keep_copies(model.product_weights().values(), torch.bfloat16)
    return model


def make_batches() -> tuple[list[Batch], LossLedger]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths in ([1000, 96, 3000], [4096]):
        tokens = torch.randint(0, 1024, (TOKENS,), generator=generator)
        columns = {"tokens": tokens, "targets": tokens.roll(-1), "loss_weight": torch.ones(TOKENS)}
        batches.append(Batch(columns, Packing.from_lengths(lengths)).to(torch.device("cuda")))
    return batches, LossLedger({"tokens": 2.0 * TOKENS, **NextToken().totals(batches)})


def step(
    model: Qwen3MoE,
    batches: list[Batch],
    ledger: LossLedger,
    decisions: dict[int, dict[str, Any]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    for number, batch in enumerate(batches):
        replay = None if decisions is None else decisions[number]
        forward_backward(model, NextToken(), batch, ledger, dtype, replay=replay)


def decisions_of(model: Qwen3MoE, batches: list[Batch]) -> dict[int, dict[str, Any]]:
    """What the plain model decides: replayed, so that gradients can be compared tensor by tensor."""
    found: dict[int, dict[str, Any]] = {}
    for number, batch in enumerate(batches):
        found[number] = {}
        with torch.no_grad():
            model.hidden(batch.columns["tokens"], batch.packing, dtype=torch.bfloat16, probe=found[number])
    for block in model.blocks:
        block.mlp.reset_step()
    return found


@pytest.mark.usefixtures("poison")  # sums have one order then: what computes the same has the same digits
@pytest.mark.parametrize("small", [1, 1 << 20])
@pytest.mark.parametrize("kind", ["again", "selective", "block", "offload", "copies", "all"])
def test_loss_and_gradients_are_those_of_the_plain_step(monkeypatch, kind, small):
    monkeypatch.setattr(offload, "SMALL_BYTES", small)
    batches, ledger = make_batches()
    plain = make_model()
    decisions = decisions_of(plain, batches)
    step(plain, batches, ledger, decisions)
    recompute: Recompute = "selective" if kind == "selective" else "block"
    plan = ActivationPlan((recompute,) * 5, offload=kind in ("offload", "all"))
    model = make_model(None if kind in ("again", "copies") else plan, copies=kind in ("copies", "all"))
    _, own = make_batches()
    step(model, batches, own, decisions)
    assert float(own.means()["loss"]) == pytest.approx(float(ledger.means()["loss"]), rel=1e-6)
    gradients = dict(model.named_parameters())
    for name, param in plain.named_parameters():
        assert rel_error(gradients[name].grad, param.grad) < 1e-5, name
    for one, other in zip(model.blocks, plain.blocks, strict=True):
        assert torch.equal(one.mlp.counts_E, other.mlp.counts_E)


@pytest.mark.parametrize("kind", ["chunks", "chunks and all", "compiled"])
def test_what_rounds_otherwise_is_as_near_to_fp32_as_the_plain_step(monkeypatch, kind):
    monkeypatch.setattr(offload, "SMALL_BYTES", 1)
    cfg = replace(CFG, num_layers=2)
    batches, _ = make_batches()
    del batches[1 if kind == "compiled" else 2 :]
    exact = make_model(cfg=cfg)
    decisions = decisions_of(exact, batches)
    gradients = {}
    for name in ("exact", "plain", kind):
        plan = ActivationPlan(("block",) * 2, offload=True) if "all" in name else None
        moe = replace(CFG.moe, chunk_tokens=1000 if "chunks" in name else 0)
        model = make_model(plan, "all" in name, replace(cfg, moe=moe))
        if name == "compiled":
            model.compile_stages(whole=True)
        _, ledger = make_batches()
        step(model, batches, ledger, decisions, torch.float32 if name == "exact" else torch.bfloat16)
        gradients[name] = {name: param.grad for name, param in model.named_parameters()}
    for name, want in gradients["exact"].items():
        error, allowed = (rel_error(gradients[run][name], want) for run in (kind, "plain"))
        assert error <= 1.5 * allowed + 1e-3, f"{name}: {error:.2e}, plain {allowed:.2e}"


@pytest.mark.parametrize("kind", ["block", "offload", "offload and chunks"])
def test_a_step_does_not_wait_for_the_device(monkeypatch, kind):
    monkeypatch.setattr(offload, "SMALL_BYTES", 1)
    cfg = replace(CFG, moe=replace(CFG.moe, chunk_tokens=1000 if "chunks" in kind else 0))
    model = make_model(ActivationPlan(("block",) * 5, offload="offload" in kind), copies=True, cfg=cfg)
    batches, ledger = make_batches()
    # kernels compile, and pinned buffers are made, in the first step
    step(model, batches, ledger)
    batches, ledger = make_batches()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batches, ledger)
        keep_copies(model.product_weights().values(), torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pinned_buffers_are_used_again(monkeypatch):
    monkeypatch.setattr(offload, "SMALL_BYTES", 1)
    plan = ActivationPlan(("block",) * 5, offload=True)
    model = make_model(plan)

    def buffers() -> int:
        batches, ledger = make_batches()
        step(model, batches, ledger)
        return sum(len(free) for free in plan.stash._free.values())

    first = buffers()
    assert first > 0
    assert buffers() == first


def test_a_second_backward_pass_through_offloaded_activations_is_refused():
    plan = ActivationPlan(("block",) * 5, offload=True)
    model = make_model(plan)
    batch = make_batches()[0][0]
    hidden = model.hidden(batch.columns["tokens"], batch.packing, dtype=torch.bfloat16)
    hidden.float().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        hidden.float().sum().backward()


def test_chunks_within_recomputed_blocks_need_one_chunks_rows_at_a_time():
    def peak(chunk_tokens: int) -> int:
        cfg = replace(CFG, num_layers=2, moe=replace(CFG.moe, top_k=8, expert_dim=1024, chunk_tokens=chunk_tokens))
        model = make_model(ActivationPlan(("block",) * 2), copies=True, cfg=cfg)
        batch = make_batches()[0][1]
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        hidden = model.hidden(batch.columns["tokens"], batch.packing, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden.float().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    # gate and up of all tokens alone, and of an eighth of them with their gradients, the hidden rows and both ends
    whole = TOKENS * 8 * 2 * 1024 * 2
    assert peak(0) > 2 * whole
    assert peak(512) < whole


def test_recomputation_and_offload_lower_the_memory_kept():
    def kept(plan: ActivationPlan) -> int:
        model = make_model(plan)
        batch = make_batches()[0][0]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        hidden = model.hidden(batch.columns["tokens"], batch.packing, dtype=torch.bfloat16)
        after = torch.cuda.memory_allocated()
        hidden.float().sum().backward()
        return after - before

    whole = kept(ActivationPlan.keep_all(5))
    inputs = kept(ActivationPlan(("block",) * 5))
    offloaded = kept(ActivationPlan(("block",) * 5, offload=True))
    assert inputs < whole / 3
    # of five inputs one or two are on the device, with the outputs and the decisions of all
    assert offloaded < inputs - 2 * TOKENS * 256 * 2
