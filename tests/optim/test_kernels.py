"""The fused passes against the plain ones: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pithwood.optim import kernels_triton
from pithwood.optim.adamw import AdamWSlice, adamw_update
from pithwood.optim.kernels_triton import momentum_pass, norm_parts
from pithwood.optim.muon import MuonRule, MuonSlice, muon_update
from pithwood.optim.rounding import random_bits, round_to_bf16, rounding_key
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_MARKS

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]

SHAPES = [(3, 40, 64), (1, 72, 32), (2, 5, 7)]
KEY = rounding_key(1, "w", 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def muon_slice(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, copy: bool = True) -> MuonSlice:
    param, grad, momentum = (normal(*shape, seed=seed) for seed in (1, 2, 3))
    kept = torch.zeros(shape, dtype=torch.float16, device=DEVICE) if copy else None
    return MuonSlice(param, grad, momentum.to(dtype), 0.1, 0.2, kept, KEY)


def adamw_slice(size: int, dtype: torch.dtype = torch.float32, count: float = 3.0) -> AdamWSlice:
    param, grad, avg, sq = (normal(size, seed=seed) for seed in (1, 2, 3, 4))
    kept = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    counts = torch.tensor(count, device=DEVICE)
    return AdamWSlice(param, grad, avg.to(dtype), sq.square().to(dtype), counts, 0.1, 0.2, kept, KEY)


def run_muon(item: MuonSlice, impl: str, ok: bool = True, scale: float = 0.5, **options: Any) -> MuonSlice:
    settings: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "ns_dtype": torch.float32, **options}
    tensors = {"grad_scale": torch.tensor(scale, device=DEVICE), "ok": torch.tensor(ok, device=DEVICE)}
    muon_update([item], MuonRule(**settings, **tensors), impl=impl)
    return item


def run_adamw(item: AdamWSlice, impl: str, ok: bool = True) -> AdamWSlice:
    tensors = {"grad_scale": torch.tensor(0.5, device=DEVICE), "ok": torch.tensor(ok, device=DEVICE)}
    adamw_update([item], betas=(0.9, 0.999), eps=1e-8, **tensors, impl=impl)
    return item


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of which a small matrix has several, the last of them not full."""
    monkeypatch.setattr(kernels_triton, "BLOCK", 256)
    monkeypatch.setattr(kernels_triton, "MOMENTUM_ROUNDS", 2)
    monkeypatch.setattr(kernels_triton, "ADAMW_BLOCK", 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_muon_step_is_that_of_the_plain_path(shape, nesterov, scaled, monkeypatch):
    """With the norms that the momentum kernel adds up, and with rounds that normalise on their own."""
    monkeypatch.setattr("pithwood.optim.muon.symmetric_pays", lambda x: scaled)
    start = muon_slice(shape)
    plain, fused = (run_muon(muon_slice(shape), impl, nesterov=nesterov) for impl in ("torch", "triton"))
    assert_close(fused.momentum, plain.momentum, tol=1e-6)
    assert_close(fused.param - start.param, plain.param - start.param, tol=1e-4)
    for item in (plain, fused):
        assert item.copy is not None
        assert torch.equal(item.copy, item.param.half())


@pytest.mark.usefixtures("small_blocks")
def test_the_norms_are_those_of_the_update_as_written():
    item, update = muon_slice((3, 40, 30)), torch.empty(3, 40, 30, dtype=torch.float16, device=DEVICE)
    tensors = {"grad_scale": torch.tensor(0.5, device=DEVICE), "ok": torch.tensor(True, device=DEVICE)}
    squares_MP = torch.empty(3, norm_parts(40 * 30), device=DEVICE)
    settings = {"momentum": 0.9, "nesterov": False, "key": KEY, "first": 0}
    momentum_pass(item.grad, item.momentum, update, squares_MP, **settings, **tensors)
    assert squares_MP.shape[1] > 1
    assert_close(squares_MP.sum(1), update.double().square().sum((1, 2)), tol=1e-6)
    assert_close(update, item.momentum, tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_muon_step_that_is_not_accepted_changes_no_bit(dtype):
    for impl in ("torch", "triton"):
        item, start = muon_slice((2, 24, 40), dtype), muon_slice((2, 24, 40), dtype)
        item.grad[1, 3, 3] = float("nan")
        item.param[0, 0, 0] = start.param[0, 0, 0] = -0.0
        run_muon(item, impl, ok=False, scale=0.0)
        assert torch.equal(item.param.view(torch.int32), start.param.view(torch.int32))
        assert torch.equal(item.momentum.view(torch.uint8), start.momentum.view(torch.uint8))
        assert item.copy is not None
        assert torch.equal(item.copy, start.param.half())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 700, 5000])
def test_an_adamw_step_is_that_of_the_plain_path(size, dtype):
    start = adamw_slice(size)
    plain, fused = (run_adamw(adamw_slice(size, dtype), impl) for impl in ("torch", "triton"))
    assert fused.count.item() == plain.count.item() == 4.0
    assert_close(fused.param - start.param, plain.param - start.param, tol=1e-5)
    # The same chances: bf16 moments differ only where fp32 sums differ in the last bit around a digit's border.
    for a, b in ((fused.exp_avg, plain.exp_avg), (fused.exp_avg_sq, plain.exp_avg_sq)):
        assert_close(a, b, tol=1e-5 if dtype == torch.float32 else 1e-3)
    for item in (plain, fused):
        assert item.copy is not None
        assert torch.equal(item.copy, item.param.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adamw_step_that_is_not_accepted_changes_no_bit(dtype):
    for impl in ("torch", "triton"):
        item, start = adamw_slice(300, dtype), adamw_slice(300, dtype)
        item.grad[7] = float("nan")
        run_adamw(item, impl, ok=False)
        for name in ("param", "exp_avg", "exp_avg_sq", "count"):
            a, b = (getattr(x, name).view(-1).view(torch.uint8) for x in (item, start))
            assert torch.equal(a, b), (impl, name)
        assert item.copy is not None
        assert torch.equal(item.copy, start.param.half())


@pytest.mark.parametrize("first", [0, 2**31 - 5, 2**32 - 5, 2**40 + 1])
def test_kernels_round_by_the_same_chances(first):
    item, update = muon_slice((2, 24, 40), torch.bfloat16), torch.empty(2, 24, 40, device=DEVICE)
    old = item.momentum.float()
    tensors = {"grad_scale": torch.tensor(1.0, device=DEVICE), "ok": torch.tensor(True, device=DEVICE)}
    squares_MP = torch.empty(2, norm_parts(24 * 40), device=DEVICE)
    settings = {"momentum": 0.5, "nesterov": False, "key": KEY, "first": first}
    momentum_pass(item.grad, item.momentum, update, squares_MP, **settings, **tensors)
    mean = torch.lerp(old, item.grad, 0.5)
    expected = round_to_bf16(mean, random_bits(mean.numel(), KEY, first, mean.device))
    assert (item.momentum != expected).double().mean().item() < 1e-3
    assert_close(item.momentum, expected, tol=1e-4)


def test_stretches_of_a_parameter_round_as_the_whole(monkeypatch):
    whole = run_muon(muon_slice((5, 24, 40), torch.bfloat16), "triton")
    monkeypatch.setattr("pithwood.optim.muon.matrices_per_chunk", lambda *args: 2)
    cut = run_muon(muon_slice((5, 24, 40), torch.bfloat16), "triton")
    assert torch.equal(whole.momentum, cut.momentum)
    assert_close(cut.param, whole.param, tol=1e-6)
