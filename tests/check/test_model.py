"""The model's gates: Qwen3-MoE passes them, and a model with one thing wrong fails at that thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pithwood.check.gates import passed, report, run_gates
from pithwood.check.model import model_gates

pytest.importorskip("transformers")

CASES = '''
from __future__ import annotations

import dataclasses

import torch

from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig

CFG = Qwen3MoEConfig(
    vocab_size=97, model_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    moe=MoEConfig(num_experts=4, top_k=2, expert_dim=24), rope_theta=10_000.0, init_std=0.08,
)


class Broken(Qwen3MoE):
    """Qwen3-MoE with one thing wrong."""

    def init_weights(self, seed, only=None):
        super().init_weights(seed, only)
        if FAULT == "uninitialised":
            self.lm_head.weight = torch.nn.Parameter(torch.empty_like(self.head_weight))

    def hidden(self, tokens_T, packing, **fields):
        h = super().hidden(tokens_T, packing, **fields)
        if FAULT == "logits":
            h = 1.001 * h
        if FAULT == "gradient":
            h = 2 * h - h.detach()
        if FAULT == "decode" and fields.get("cache") is not None:
            h = 1.01 * h
        return h

    def num_params(self):
        counts = super().num_params()
        return {**counts, "total": counts["total"] - 1} if FAULT == "count" else counts

    def hf_config(self):
        config = super().hf_config()
        if FAULT == "names":
            config["num_experts"] = 8
        if FAULT == "renormalize":
            config["norm_topk_prob"] = False
        return config

    def cost(self, packing, element_size=4):
        cost = super().cost(packing, element_size)
        return dataclasses.replace(cost, model_flops=cost.model_flops / 2) if FAULT == "cost" else cost


def broken():
    yield Broken(CFG)
    if FAULT != "alone":
        yield Broken(dataclasses.replace(CFG, num_kv_heads=4))
'''


def check(folder: Path, fault: str) -> list[str]:
    for name in ("pithwood/models/broken.py", "tests/models/test_broken.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "tests/models/cases.py").write_text(CASES + f"\n\nFAULT = {fault!r}\n")
    return report(run_gates(model_gates("broken", run_tests=False, root=folder))).splitlines()


def test_qwen3_moe_passes():
    results = run_gates(model_gates("qwen3_moe", run_tests=False))
    assert passed(results), report(results)
    assert [result.name for result in results][-3:] == ["gradients", "decode", "cost"]


@pytest.mark.parametrize(
    ("fault", "last_line"),
    [
        ("", "PASS"),
        ("alone", "FAIL file: broken() in tests/models/cases.py yields 1 models"),
        ("uninitialised", "FAIL weights: init_weights() leaves lm_head.weight uninitialised"),
        ("names", "FAIL names: "),
        ("count", "FAIL parameter count: num_params() says "),
        ("renormalize", "FAIL logits: the logits differs"),
        ("logits", "FAIL logits: the logits differs"),
        ("gradient", "FAIL gradients: the gradient of "),
        ("decode", "FAIL decode: the logits of decode step 0 differs"),
        ("cost", "FAIL cost: cost() counts "),
    ],
)
def test_one_thing_wrong_fails_at_its_gate(tmp_path, fault, last_line):
    assert check(tmp_path, fault)[-1].startswith(last_line)


@pytest.mark.quick
def test_a_model_that_does_not_exist_is_refused_with_what_there_is():
    line = report(run_gates(model_gates("qwen4")))
    assert line == "FAIL file: pithwood/models/qwen4.py does not exist; models are qwen3_moe"
