"""Muon against torch.optim.Muon and against a loop in fp64 written here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.ops.gram import gram, gram_polynomial
from pithwood.optim import muon
from pithwood.optim.config import MuonConfig
from pithwood.optim.groups import ParamRole
from pithwood.optim.muon import (
    QUINTIC,
    MuonRule,
    MuonSlice,
    chunk_slices,
    muon_update,
    orthogonalize,
    orthogonalize_scaled,
    resolve_ns_dtype,
)
from pithwood.optim.optimizer import Optimizer
from tests.numerics import assert_close, rel_error

SHAPES = {"square": (48, 48), "wide": (32, 80), "tall": (96, 40)}


def gradients(shape: tuple[int, ...], steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run_ours(
    weights: dict[str, Tensor], roles: dict[str, ParamRole], grads: dict[str, list[Tensor]], **options
) -> dict:
    params = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    cfg = MuonConfig(lr=0.02, weight_decay=0.1, clip_norm=None, **options)
    steps = len(next(iter(grads.values())))
    optimizer = Optimizer(cfg, params, roles, steps)
    for step in range(steps):
        for name, param in params.items():
            param.grad = grads[name][step].clone()
        optimizer.step(step)
    return {name: param.detach() for name, param in params.items()}


def muon_fp64(weight: Tensor, grads: list[Tensor], lr: float, decay: float, momentum: float, nesterov: bool) -> Tensor:
    """One matrix, written from the papers: no batching, no side chosen, fp64 throughout."""
    w, mean = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        mean = momentum * mean + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * mean if nesterov else mean
        x = u / u.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        w = (1 - lr * decay) * w - lr * 0.2 * math.sqrt(max(weight.shape)) * x
    return w


@pytest.mark.quick
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bf16_equals_torch_muon_over_five_steps(shape, nesterov):
    weight, grads = gradients(shape, 1, seed=0)[0], gradients(shape, 5)
    theirs = torch.nn.Parameter(weight.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        theirs.grad = grad.clone()
        reference.step()
    ours = run_ours({"w": weight}, {"w": ParamRole("matrix")}, {"w": grads}, ns_dtype="bf16", nesterov=nesterov)["w"]
    # Compare what the steps moved, not the weights, in which the initial values would hide an error. What is left is
    # the summation order of bf16 matmuls, one rounding of 2^-9 per product.
    decayed = weight * (1 - 0.02 * 0.1) ** 5
    assert_close(ours - decayed, theirs.detach() - decayed, tol=1e-2)


@pytest.mark.quick
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp32_equals_an_fp64_loop(shape, nesterov):
    weight, grads = gradients(shape, 1, seed=0)[0], gradients(shape, 5)
    ours = run_ours({"w": weight}, {"w": ParamRole("matrix")}, {"w": grads}, ns_dtype="fp32", nesterov=nesterov)["w"]
    expected = muon_fp64(weight, grads, 0.02, 0.1, 0.95, nesterov)
    assert_close(ours - weight, expected - weight, tol=1e-4)


@pytest.mark.quick
def test_stacked_experts_equal_each_expert_alone():
    weight, grads = gradients((5, 24, 40), 1, seed=0)[0], gradients((5, 24, 40), 3)
    stacked = run_ours({"w": weight}, {"w": ParamRole("experts")}, {"w": grads}, ns_dtype="fp32")["w"]
    for e in range(5):
        expected = muon_fp64(weight[e], [g[e] for g in grads], 0.02, 0.1, 0.95, True)
        assert_close(stacked[e] - weight[e], expected - weight[e], tol=1e-4, what=f"expert {e}")


@pytest.mark.quick
def test_gate_and_up_are_matrices_apart_by_matrix_shape():
    """A fused [E, 2F, D] weight viewed as (2E, F, D) moves as its halves do; as (E, 2F, D) it does not."""
    num_experts, width, model = 3, 16, 24
    weight, grads = (
        gradients((num_experts, 2 * width, model), 1, seed=0)[0],
        gradients((num_experts, 2 * width, model), 2),
    )
    role = ParamRole("experts", (2 * num_experts, width, model))
    apart = run_ours({"w": weight}, {"w": role}, {"w": grads}, ns_dtype="fp32")["w"]
    fused = run_ours({"w": weight}, {"w": ParamRole("experts")}, {"w": grads}, ns_dtype="fp32")["w"]
    for e in range(num_experts):
        for half in (slice(0, width), slice(width, 2 * width)):
            expected = muon_fp64(weight[e, half], [g[e, half] for g in grads], 0.02, 0.1, 0.95, True)
            assert_close(apart[e, half] - weight[e, half], expected - weight[e, half], tol=1e-4)
    assert (apart - fused).norm() > 0.1 * (apart - weight).norm()


def test_chunks_do_not_change_the_result(monkeypatch):
    """Many parameters cut into chunks of one matrix, of a few across parameters, and all at once."""
    shapes = {"a": (3, 16, 24), "b": (16, 24), "c": (5, 16, 24), "d": (24, 16)}
    weights = {name: gradients(shape, 1, seed=7)[0] for name, shape in shapes.items()}
    grads = {name: gradients(shape, 2, seed=8) for name, shape in shapes.items()}
    roles = {name: ParamRole("experts" if len(shape) == 3 else "matrix") for name, shape in shapes.items()}
    results = []
    for limit in (1, 4 * 16 * 24, 10**9):
        monkeypatch.setattr(muon, "CPU_CHUNK_ELEMENTS", limit)
        results.append(run_ours(weights, roles, grads, ns_dtype="fp32"))
    for name in shapes:
        assert_close(results[1][name], results[0][name], tol=1e-6, what=name)
        assert_close(results[2][name], results[0][name], tol=1e-6, what=name)


def test_chunks_hold_every_matrix_once_and_stay_within_the_limit(monkeypatch):
    monkeypatch.setattr(muon, "CPU_CHUNK_ELEMENTS", 18)
    slices = [
        MuonSlice(torch.full((m, 2, 3), float(i)), torch.zeros(m, 2, 3), torch.zeros(m, 2, 3), 0.1, 0.0)
        for i, m in enumerate((1, 7, 2, 4))
    ]
    slices.append(MuonSlice(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), 0.1, 0.0))
    chunks = chunk_slices(slices, torch.float32)
    for chunk in chunks:
        assert len({item.param.shape[1:] for item in chunk}) == 1
        assert sum(item.param.shape[0] for item in chunk) <= 3
    held = [item.param[m, 0, 0].item() for chunk in chunks for item in chunk for m in range(item.param.shape[0])]
    assert sorted(held) == [0.0] * 3 + [1.0] * 7 + [2.0] * 2 + [3.0] * 4


@pytest.mark.parametrize("shape", [(2, 40, 64), (2, 64, 40), (1, 1, 9), (3, 9, 1)])
def test_orthogonalize_moves_singular_values_near_one(shape):
    matrices = gradients(shape, 1)[0]
    values = torch.linalg.svdvals(orthogonalize(matrices, 5, torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_scaled_rounds_equal_rounds_of_scaled_matrices():
    for shape in ((2, 24, 40), (2, 40, 24)):
        update = gradients(shape, 1)[0]
        inverse_M = 1 / update.norm(dim=(1, 2))
        assert_close(orthogonalize_scaled(update.clone(), inverse_M, 5), orthogonalize(update, 5, torch.float32), 1e-5)


@pytest.mark.parametrize("kind", ["normal", "square", "low rank", "decaying"])
def test_bf16_kernels_round_no_worse_than_torchs_order(kind):
    """What the kernels compute, fp32 sums rounded to bf16 at their end, beside the order of torch.optim.Muon."""
    a, b, c = QUINTIC
    update = {
        "normal": lambda: gradients((1, 192, 512), 1)[0],
        "square": lambda: gradients((1, 256, 256), 1)[0],
        "low rank": lambda: torch.randn(1, 256, 32) @ torch.randn(1, 32, 512) + 0.1 * torch.randn(1, 256, 512),
        "decaying": lambda: (
            torch.linalg.qr(torch.randn(256, 256))[0]
            @ torch.diag(torch.logspace(0, -4, 256))
            @ torch.linalg.qr(torch.randn(512, 256))[0].T
        )[None],
    }[kind]()
    exact = update.double() / update.double().norm()
    plain = update.bfloat16()
    plain = plain / torch.linalg.vector_norm(plain)
    fast, scale = update.bfloat16(), 1 / update.bfloat16().float().norm().view(1)
    for number in range(5):
        gram_exact = exact @ exact.mT
        exact = a * exact + (b * gram_exact + c * gram_exact @ gram_exact) @ exact
        gram_plain = gram(plain, impl="ref")
        poly_plain = gram_polynomial(gram_plain, 0.0, b, c, impl="ref")
        plain = (a * plain.float() + poly_plain.float() @ plain.float()).bfloat16()
        scale_M = scale if number == 0 else None
        poly = gram_polynomial(gram(fast, scale_M=scale_M, impl="ref"), a, b, c, scale_M=scale_M, impl="ref")
        fast = (poly.float() @ fast.float()).bfloat16()
    assert rel_error(fast, exact) < 1.02 * rel_error(plain, exact)


def test_zero_gradient_gives_a_zero_update():
    out = orthogonalize(torch.zeros(2, 8, 12), 5, torch.float32)
    assert torch.equal(out, torch.zeros(2, 8, 12))


def test_nan_in_one_matrix_leaves_nothing_behind_when_not_ok():
    grad = gradients((2, 8, 12), 1)[0]
    grad[1, 3, 3] = float("nan")
    item = MuonSlice(torch.full((2, 8, 12), -0.0), grad, torch.full((2, 8, 12), -0.0), 0.1, 0.1)
    before = item.param.view(torch.int32).clone()
    muon_update([item], MuonRule(0.95, True, 5, torch.float32, torch.tensor(0.0), torch.tensor(False)))
    # Compare bits: -0.0 == 0.0, and adding a zero would have flipped the sign.
    assert torch.equal(item.param.view(torch.int32), before)
    assert torch.equal(item.momentum.view(torch.int32), before)


def test_ns_dtype_by_device():
    assert resolve_ns_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_ns_dtype("fp32", torch.device("cuda")) == torch.float32
    assert resolve_ns_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    wrong: Any = "fp16"
    with pytest.raises(ValueError, match=r"fp16.*auto, fp32, bf16"):
        resolve_ns_dtype(wrong, torch.device("cpu"))
