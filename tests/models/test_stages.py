"""Compiled stages: the plain pass's losses, decisions and raw gradients, and one compilation for all equal layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from pithwood.attention.full import FullAttentionConfig
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.models.recompute import Recompute
from pithwood.models.stages import check_compiler
from pithwood.ops.packing import Packing
from pithwood.recipes import load_recipe
from pithwood.run import check_device_settings
from tests.models.test_recompute import CFG, Step, assert_same, run_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_step(cfg: Qwen3MoEConfig, recompute: Recompute | tuple[Recompute, ...] = "none") -> Step:
    def prepare(model: Qwen3MoE) -> None:
        # the graphs as they are traced, without a compiler for them
        model.compile_stages(whole=False, backend="aot_eager")

    return run_step(cfg, recompute, prepare=prepare)


@pytest.mark.parametrize(("recompute", "balance"), [("none", "sequence"), ("block", "global_batch")])
def test_losses_counts_decisions_and_gradients_are_those_of_the_plain_pass(recompute, balance):
    moe = dataclasses.replace(CFG.moe, balance=balance, num_shared_experts=1)
    cfg = dataclasses.replace(CFG, attention=FullAttentionConfig(), moe=moe)
    assert_same(compiled_step(cfg, recompute), run_step(cfg, "none"))
    assert counters["stats"]["unique_graphs"] > 0


def test_a_mixer_that_reads_offsets_stays_as_it_is_and_gives_the_same():
    assert_same(compiled_step(CFG), run_step(CFG, "none"))


def test_layers_of_a_kind_share_one_compilation():
    def graphs(num_layers: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        cfg = dataclasses.replace(CFG, attention=FullAttentionConfig(), num_layers=num_layers, dense_layers=())
        compiled_step(cfg)
        return counters["stats"]["unique_graphs"]

    assert graphs(2) == graphs(3)


@pytest.mark.quick
def test_evaluation_compiles_nothing():
    """Its last batch, and a prompt, have sizes of their own, and each would be compiled for."""
    model = Qwen3MoE(CFG)
    model.init_weights(0)
    model.compile_stages(whole=False, backend="aot_eager")
    with torch.no_grad():
        model.hidden(torch.arange(30), Packing.from_lengths([20, 10]))
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.quick
def test_a_cpu_without_a_compiler_is_refused_in_words(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    run = dataclasses.replace(load_recipe("debug"), compile=True)
    with pytest.raises(ValueError, match="compile=true needs a C\\+\\+ compiler on a CPU and none was found"):
        check_device_settings(run, CPU)
    check_compiler(torch.device("cuda"))
