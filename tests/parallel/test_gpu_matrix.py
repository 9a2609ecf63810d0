"""On meshes of two GPUs, in bf16 and through NCCL, three steps are those of one GPU, up to what bf16 rounds.

As in `test_matrix.py`, which holds every mesh to 1e-5 in fp32; the layers are wide enough here for the kernels of GPUs.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.parallel.mesh import Mesh
from pithwood.run import Run
from tests.parallel.spread import assert_same, steps_on, tiny_run
from tests.parallel.test_matrix import KINDS, MESHES, samples_per_micro_batch
from tests.processes import run_on

pytestmark = pytest.mark.multi_gpu

TWO = [name for name, cfg in MESHES.items() if cfg.size == 2]
DEVICE = "cuda"
MOBA = MoBAConfig(block_size=64, top_k=2)
GRADIENT, LOSS, LOG, WEIGHT = 3e-2, 1e-3, 2e-2, 1e-1
"""Relative errors: of raw gradients and the loss, with one GPU's decisions replayed; of what three steps log, and of
the last weights, where rounding chooses some experts and blocks otherwise (most in key convolutions, which are small).
"""


def run_of(attention: str, balance: str, **changes: Any) -> Run:
    mixers = {"full": FullAttentionConfig(), "moba": MOBA, "mixed": (MOBA, FullAttentionConfig(key_conv=3)) * 2}
    moe: dict[str, Any] = {"balance": balance, "num_shared_experts": 1, "z_loss_coef": 0.01, "expert_dim": 128}
    run = tiny_run({"attention": mixers[attention]}, moe, seq_len=512, precision="bf16", **changes)
    sizes = {"model_dim": 256, "head_dim": 64, "dense_dim": 128, "init_std": 0.02}
    optim = replace(run.optim, ns_dtype="auto")  # bf16, as people train on GPUs
    return replace(run, model=replace(run.model, **sizes), optim=optim, device=DEVICE)


@functools.cache
def alone(attention: str, balance: str, update: str, samples: int) -> dict[str, Any]:
    return steps_on(Mesh.single(DEVICE), run_of(attention, balance, samples_per_micro_batch=samples), 3, update)


@pytest.mark.parametrize("update", ["run", "sgd"])
@pytest.mark.parametrize(("attention", "balance"), KINDS)
@pytest.mark.parametrize("name", TWO)
def test_three_steps_are_those_of_one_gpu(name, attention, balance, update):
    cfg = MESHES[name]
    samples = samples_per_micro_batch(cfg)
    wanted = alone(attention, balance, update, samples)
    run = run_of(attention, balance, samples_per_micro_batch=samples, mesh=cfg)
    spread = run_on(cfg, steps_on, run, 3, update, wanted["decisions"], device=DEVICE, seconds=300)
    assert_same(spread, wanted, "initial")
    assert_same(spread, wanted, "gradients", bound=GRADIENT)
    assert_same(spread, wanted, "last", bound=WEIGHT)
    for result in spread:
        assert result["losses"] == pytest.approx(wanted["losses"], rel=LOSS)
        for log, expected in zip(result["logs"], wanted["logs"], strict=True):
            for key, value in expected.items():
                if not key.startswith("block_"):
                    assert log[key] == pytest.approx(value, rel=LOG), key
