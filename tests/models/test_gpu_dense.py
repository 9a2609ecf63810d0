"""The dense part of a step on a GPU: a model's gradients by the fast ops against fp64, and what must not happen."""

from __future__ import annotations

import copy

import pytest
import torch

from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.ops.master import keep_copies
from pithwood.ops.packing import Packing
from tests.numerics import rel_error

pytestmark = pytest.mark.gpu

LENGTHS = (200, 1, 75, 0, 236)
BF16 = torch.bfloat16


def build(tied: bool, bias: bool = False) -> Qwen3MoE:
    """Two layers without experts, fp32 on the CPU."""
    cfg = Qwen3MoEConfig(
        vocab_size=1000, model_dim=256, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, dense_layers=(0, 1),
        dense_dim=512, tie_embeddings=tied, attention_bias=bias, init_std=0.05,
    )  # fmt: skip
    model = Qwen3MoE(cfg)
    model.init_weights(0)
    return model


def batch(device="cpu"):
    """(tokens, targets, weights, packing); some tokens do not count."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 1000, (2, sum(LENGTHS)), generator=generator)
    weights = (torch.rand(sum(LENGTHS), generator=generator) > 0.2).float()
    return tokens.to(device), targets.to(device), weights.to(device), Packing.from_lengths(LENGTHS, device=device)


def step(model: Qwen3MoE, dtype: torch.dtype, parts) -> None:
    """Add one micro-batch's gradients."""
    tokens, targets, weights, packing = parts
    hidden = model.hidden(tokens, packing, dtype=dtype)
    (model.nll_sum(hidden, targets, weights) / weights.sum()).backward()


def gradients(model: Qwen3MoE) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, True)])
def test_gradients_are_as_near_to_fp64_as_plain_torchs_in_bf16(tied, bias, kept):
    exact, plain = build(tied, bias).double(), build(tied, bias)
    fast = copy.deepcopy(plain).cuda()
    step(exact, torch.float64, batch())
    step(plain, BF16, batch())
    if kept:
        keep_copies([p for p in fast.parameters() if p.dim() == 2], BF16)
    for times in (1, 2):
        step(fast, BF16, batch("cuda"))
        for name, want in gradients(exact).items():
            found = gradients(fast)[name]
            assert found.dtype == torch.float32
            error, allowed = rel_error(found / times, want), rel_error(gradients(plain)[name], want)
            assert error <= 1.5 * allowed + 1e-3, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


def test_the_host_never_waits():
    model, parts = build(False).cuda(), batch("cuda")
    step(model, BF16, parts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, BF16, parts)
        with torch.no_grad():
            model.logprob(model.hidden(parts[0], parts[3], dtype=BF16), parts[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_adds_the_same_gradients():
    model, parts = build(True).cuda(), batch("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, BF16, parts)
    torch.cuda.current_stream().wait_stream(side)
    twice = {name: grad.clone() for name, grad in gradients(model).items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, BF16, parts)
    graph.replay()
    for name, grad in gradients(model).items():
        assert rel_error(grad, 1.5 * twice[name]) <= 1e-2, name


def test_log_probabilities_without_gradient_are_those_with():
    model, (tokens, targets, _, packing) = build(False).cuda(), batch("cuda")
    hidden = model.hidden(tokens, packing, dtype=BF16)
    with torch.no_grad():
        found = model.logprob(hidden, targets)
    assert rel_error(found, model.logprob(hidden, targets)) <= 1e-5


def test_the_heads_memory_is_bounded_by_chunks(monkeypatch):
    from pithwood.ops import linear_nll as module

    monkeypatch.setattr(module, "GPU_ROWS", 256)
    x = torch.randn(4096, 64, device="cuda").to(BF16).requires_grad_()
    weight = (torch.randn(32_768, 64, device="cuda") * 0.1).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    keep_copies([weight], BF16)
    target, counts = torch.randint(0, 32_768, (4096,), device="cuda"), torch.ones(4096, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module.linear_nll(x, weight, target, counts).backward()
    bound = sum(module.workspace_bytes(4096, 32_768, 64, 2, x.device)) + x.nbytes + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before <= bound
