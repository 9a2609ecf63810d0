"""The loss of a linear head: every implementation against the definition, gradients, tokens that do not count."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import linear_nll as module
from pithwood.ops.linear_nll import linear_nll
from pithwood.ops.master import gradient_sink
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

pytestmark = pytest.mark.usefixtures("poison")


def make(tokens=37, vocab=29, dim=16, dtype=torch.float32, device="cpu", scale=1.0):
    """(x, W, targets, weights): some tokens without target, some without weight."""
    x = (torch.randn(tokens, dim, dtype=torch.float64) * scale).to(dtype).to(device).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(vocab, dim, dtype=wide, device=device).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device=device)
    counts = torch.rand(tokens, device=device) + 0.5
    target[3::11] = -1
    counts[5::7] = 0.0
    return x, weight, target, counts


def gradients(impl, args, upstream=0.25):
    """(value, gradients of x and W) of one implementation; what went to the sink is taken from there."""
    x, weight = (t.detach().clone().requires_grad_() for t in args[:2])
    value = linear_nll(x, weight, *args[2:], impl=impl)
    value.backward(torch.tensor(upstream, dtype=value.dtype, device=value.device))
    return value.detach(), x.grad, weight.grad


def compare(impl, args, tol=None):
    found, expected = gradients(impl, args), gradients("ref", args)
    limit = {torch.float16: 5e-3, torch.bfloat16: 2e-2}.get(args[0].dtype) if tol is None else tol
    for name, a, b in zip(("value", "dx", "dW"), found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert_close(a, b, limit, name)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_torch_is_the_definition(dtype):
    compare("torch", make(dtype=dtype))


@pytest.mark.quick
@pytest.mark.parametrize("rows", [1, 10, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_of_every_size_give_the_same(monkeypatch, dtype, rows):
    monkeypatch.setattr(module, "CPU_ROWS", rows)
    compare("torch", make(dtype=dtype))


@pytest.mark.quick
def test_gradients_of_each_input_alone_and_of_none():
    args = make()
    with torch.no_grad():
        value = linear_nll(*args)
    assert value.grad_fn is None
    for leaf in (0, 1):
        x, weight = (t.detach().requires_grad_(place == leaf) for place, t in enumerate(args[:2]))
        found = linear_nll(x, weight, *args[2:])
        assert torch.equal(found, value)
        found.backward()
        assert_close((x, weight)[leaf].grad, gradients("ref", args, upstream=1.0)[1 + leaf])


@pytest.mark.quick
def test_a_second_backward_pass_gives_the_same_again():
    x, weight, target, counts = make()
    value = linear_nll(x, weight, target, counts)
    first, again = (torch.autograd.grad(value, [x, weight], retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.quick
def test_chunks_on_a_gpu_keep_to_their_bytes():
    cuda = torch.device("cuda")
    assert module.chunk_rows(151_936, 2, cuda) == 2048
    assert module.chunk_rows(1 << 20, 2, cuda) == 1024
    assert module.chunk_rows(1 << 34, 2, cuda) == 1
    assert module.chunk_rows(1 << 34, 2, torch.device("cpu")) == module.CPU_ROWS


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_tokens_without_weight_or_target_contribute_exactly_zero(impl):
    x, weight, target, counts = make()
    idle = (target < 0) | (counts == 0)
    value, grad_x, grad_weight = gradients(impl, (x, weight, target, counts))
    assert not grad_x[idle].any()
    alone = gradients(impl, (x[~idle], weight, target[~idle], counts[~idle]))
    assert_close(value, alone[0])
    assert_close(grad_weight, alone[2])


@pytest.mark.quick
def test_shapes_that_do_not_fit_are_refused():
    x, weight, target, counts = make()
    with pytest.raises(ValueError, match=r"x \[T, D\] and W \[X, D\], got \(37, 16\), \(29, 15\)"):
        linear_nll(x, weight[:, :15], target, counts)
    with pytest.raises(ValueError, match=r"x has 37 tokens, but targets are \(36,\)"):
        linear_nll(x, weight, target[1:], counts)


class TestKernel:
    """On a GPU, or in the interpreter."""

    pytestmark = KERNEL_MARKS

    @pytest.mark.parametrize(("tokens", "vocab", "dim"), [(37, 29, 16), (1, 1, 8), (5, 300, 24), (0, 12, 8)])
    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    def test_value_and_gradients_are_those_of_the_definition(self, dtype, tokens, vocab, dim):
        compare("triton", make(tokens, vocab, dim, dtype, DEVICE))

    @pytest.mark.parametrize("rows", [1, 10, 37])
    def test_chunks_and_steps_of_every_size_give_the_same(self, monkeypatch, rows):
        from pithwood.ops.linear_nll import triton

        monkeypatch.setattr(module, "chunk_rows", lambda *args: rows)
        monkeypatch.setattr(triton, "LANES", 2)
        compare("triton", make(device=DEVICE))

    def test_tokens_without_weight_or_target_contribute_exactly_zero_whatever_they_hold(self):
        x, weight, target, counts = make(device=DEVICE)
        with torch.no_grad():
            x[(target < 0) | (counts == 0)] = float("nan")
        idle = x.isnan().any(1)
        value, grad_x, _ = gradients("triton", (x, weight, target, counts))
        assert not grad_x[idle].any()
        expected = gradients("ref", (x[~idle], weight, target[~idle], counts[~idle]))
        assert_close(value, expected[0])
        assert_close(grad_x[~idle], expected[1])

    def test_large_logits_do_not_overflow(self):
        args = make(scale=300.0, device=DEVICE)
        # what rounding moves a logit by, it moves the token's probability by, relatively
        largest = float((args[0] @ args[1].t()).abs().max())
        compare("triton", args, tol=largest * 2**-24)

    def test_the_heads_gradient_is_added_to_what_is_there(self):
        x, weight, target, counts = make(device=DEVICE)
        before = torch.randn_like(weight)
        weight.grad = before.clone()
        linear_nll(x, weight, target, counts, impl="triton").backward()
        _, _, expected = gradients("ref", (x, weight, target, counts), upstream=1.0)
        assert_close(weight.grad - before, expected, 1e-5)

    def test_a_head_that_is_no_leaf_gets_its_gradient_from_autograd(self):
        x, weight, target, counts = make(device=DEVICE)
        assert gradient_sink(weight * 2.0) is None
        found, expected = (
            torch.autograd.grad(linear_nll(x, weight * 2.0, target, counts, impl=impl), weight)[0]
            for impl in ("triton", "ref")
        )
        assert_close(found, expected)

    @pytest.mark.parametrize("leaf", [0, 1])
    def test_only_one_of_both_may_want_a_gradient(self, leaf):
        args = make(device=DEVICE)
        args[1 - leaf].requires_grad_(False)
        linear_nll(*args, impl="triton").backward()
        assert_close(args[leaf].grad, gradients("ref", args, upstream=1.0)[1 + leaf])
        assert args[1 - leaf].grad is None

    def test_without_gradients_the_value_is_the_same_and_nothing_more_is_made(self, monkeypatch):
        from pithwood.ops.linear_nll import triton

        args = make(device=DEVICE)
        expected = linear_nll(*args, impl="triton")
        monkeypatch.setattr(triton, "add_product", None)
        with torch.no_grad():
            assert torch.equal(linear_nll(*args, impl="triton"), expected)

    def test_gradients_repeat_to_the_last_digit(self):
        args = make(device=DEVICE)
        for one, other in zip(gradients("triton", args), gradients("triton", args), strict=True):
            assert torch.equal(one, other)
