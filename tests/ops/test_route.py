"""Choice and weights of experts: kernels against the reference and a loop; ties, groups, bias, pairs of none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.ops.route import RoutingRule, expert_weights, router_logits, select_experts
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_MARKS

pytestmark = pytest.mark.usefixtures("poison")
TRITON = pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])

RULES: dict[str, tuple[int, dict[str, Any]]] = {
    # experts, fields of the rule
    "softmax": (8, {"top_k": 2}),
    "softmax_as_it_is": (128, {"top_k": 8, "renormalize": False, "scale": 16.0}),
    "sigmoid": (24, {"top_k": 3, "score": "sigmoid", "scale": 2.5}),
    "sigmoid_as_it_is": (5, {"top_k": 5, "score": "sigmoid", "renormalize": False}),
    "groups_max": (12, {"top_k": 3, "num_groups": 4, "groups_per_token": 2}),
    "groups_top2": (
        30,
        {"top_k": 4, "score": "sigmoid", "num_groups": 5, "groups_per_token": 3, "group_score": "top2_sum"},
    ),
    "one_expert": (1, {"top_k": 1}),
    "many": (512, {"top_k": 16}),
}


def logits_of(case: str, tokens: int = 37, std: float = 1.0) -> tuple[Tensor, RoutingRule]:
    num_experts, fields = RULES[case]
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(tokens, num_experts, generator=generator) * std).to(DEVICE), RoutingRule(**fields)


@TRITON
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", RULES)
def test_the_kernel_chooses_what_the_reference_chooses(case: str, biased: bool, impl: str) -> None:
    logits_TE, rule = logits_of(case)
    # a bias this low makes every score negative: what is closed must not win with a zero
    bias_E = torch.linspace(-3.0, -1.5, logits_TE.shape[1], device=DEVICE) if biased else None
    ids_Tk = select_experts(logits_TE, rule, bias_E, impl=impl)
    assert ids_Tk.dtype == torch.int64
    assert torch.equal(ids_Tk, select_experts(logits_TE, rule, bias_E, impl="ref"))


@TRITON
def test_ties_go_to_the_lower_expert_and_the_lower_group(impl: str) -> None:
    logits_TE = torch.zeros(3, 12, device=DEVICE)
    logits_TE[1, [3, 7, 8]] = 1.0
    logits_TE[2, 11] = 1.0
    ids_Tk = select_experts(logits_TE, RoutingRule(4), impl=impl)
    assert ids_Tk.tolist() == [[0, 1, 2, 3], [3, 7, 8, 0], [11, 0, 1, 2]]
    grouped = select_experts(logits_TE, RoutingRule(4, num_groups=4, groups_per_token=2), impl=impl)
    assert grouped.tolist() == [[0, 1, 2, 3], [3, 7, 8, 4], [11, 0, 1, 2]]


@TRITON
def test_ids_stay_in_range_and_distinct_whatever_the_logits(impl: str) -> None:
    logits_TE, rule = logits_of("groups_max", tokens=6)
    logits_TE[0] = float("nan")
    logits_TE[1, 3] = float("inf")
    logits_TE[2, :5] = float("-inf")
    logits_TE[3, 0] = float("nan")
    ids_Tk = select_experts(logits_TE, rule, impl=impl)
    assert ((ids_Tk >= 0) & (ids_Tk < 12)).all()
    assert all(len(set(ids)) == 3 for ids in ids_Tk.tolist())


@TRITON
@pytest.mark.parametrize("pulled", ["weight", "prob", "both"])
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("case", RULES)
def test_the_kernels_weights_and_gradients_are_the_references(case: str, none: bool, pulled: str, impl: str) -> None:
    logits_TE, rule = logits_of(case)
    ids_Tk = select_experts(logits_TE, rule, impl="ref")
    if none:
        ids_Tk[torch.rand(ids_Tk.shape, device=DEVICE) < 0.3] = -1
    pull_Tk = torch.randn(ids_Tk.shape, device=DEVICE)
    # as balance losses give it: one row for all tokens
    pull_TE = torch.randn(1, logits_TE.shape[1], device=DEVICE).expand(logits_TE.shape)
    results = []
    for which, dtype in ((impl, torch.float32), ("ref", torch.float64)):
        leaf = logits_TE.to(dtype).requires_grad_()
        weight_Tk, prob_TE = expert_weights(leaf, ids_Tk, rule, with_prob=pulled != "weight", impl=which)
        outs = [weight_Tk] if prob_TE is None else [weight_Tk, prob_TE]
        total = torch.zeros((), dtype=dtype, device=DEVICE)
        if pulled != "prob":
            total = total + (weight_Tk * pull_Tk).sum()
        if prob_TE is not None:
            total = total + (prob_TE * pull_TE).sum()
        (grad,) = torch.autograd.grad(total, leaf)
        results.append([*outs, grad])
    for found, want in zip(*results, strict=True):
        assert found.dtype == torch.float32
        if want.norm() < 1e-10:
            assert found.abs().max() < 1e-5
        else:
            assert_close(found, want)
    assert results[0][0][ids_Tk < 0].eq(0).all()


@TRITON
def test_no_tokens_and_nothing_pulled(impl: str) -> None:
    logits_TE = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    rule = RoutingRule(2)
    ids_Tk = select_experts(logits_TE, rule, impl=impl)
    weight_Tk, prob_TE = expert_weights(logits_TE, ids_Tk, rule, with_prob=True, impl=impl)
    assert ids_Tk.shape == weight_Tk.shape == (0, 2)
    assert prob_TE is not None
    assert torch.autograd.grad(weight_Tk.sum(), logits_TE)[0].shape == (0, 4)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=KERNEL_MARKS)])
def test_parts_add_up_to_the_last_bit(impl: str) -> None:
    from pithwood.ops.route.split import split_gradient, split_weight

    # fp16 stands for bf16, which the interpreter does not know: parts of 11 bits, as long as they are no subnormals
    weight_ED = 256 * (1 + torch.rand(6, 40, device=DEVICE))
    low, high, middle, again = split_weight(weight_ED, torch.float16).float().view(4, 6, 40)
    assert torch.equal(high, weight_ED.half().float())
    assert torch.equal(high, again)
    assert_close(high + middle, weight_ED, 1e-6)
    assert torch.equal(high.double() + middle + low, weight_ED.double())
    grad_TE = torch.randn(50, 6, device=DEVICE)
    high, again, low = split_gradient(grad_TE, torch.float16).float().view(50, 3, 6).unbind(1)
    assert torch.equal(high, grad_TE.half().float())
    assert torch.equal(high, again)
    assert_close(high + low, grad_TE, 1e-6)
    assert impl == "triton"


def test_bad_input_is_refused() -> None:
    logits_TE, rule = logits_of("softmax")
    with pytest.raises(ValueError, match=r"the router's weight \(3, 5\) \[E, D\]"):
        router_logits(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"impl='split' takes bf16 on CUDA.*use impl='ref'"):
        router_logits(torch.zeros(2, 4), torch.zeros(3, 4), impl="split")
    with pytest.raises(ValueError, match="allowed are 'ref', 'triton'"):
        select_experts(logits_TE, rule, impl="torch")
    with pytest.raises(ValueError, match="top_k=17, num_groups=1; at most 1024, 16 and 16"):
        select_experts(torch.zeros(2, 32, device=DEVICE), RoutingRule(17), impl="triton")
    with pytest.raises(ValueError, match="logits are fp32, got torch"):
        expert_weights(logits_TE.half(), torch.zeros(37, 2, dtype=torch.int64), rule, impl="triton")


@TRITON
def test_the_operators_are_known_to_the_compiler(impl: str) -> None:
    logits_TE, rule = logits_of("softmax")
    leaf = logits_TE.requires_grad_()

    def both(x: Tensor) -> Tensor:
        ids_Tk = select_experts(x, rule, impl=impl)
        weight_Tk, prob_TE = expert_weights(x, ids_Tk, rule, with_prob=True, impl=impl)
        assert prob_TE is not None
        return weight_Tk.square().sum() + prob_TE.square().sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    (grad,), (want,) = (torch.autograd.grad(run(leaf), leaf) for run in (compiled, both))
    assert_close(grad, want)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1000, 2048, 128), (4096, 64, 8)])
def test_split_products_are_as_exact_as_fp32(size: tuple[int, int, int]) -> None:
    tokens, dim, experts = size
    x_TD = torch.randn(tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight_ED = (torch.randn(experts, dim, device="cuda") * 0.02).requires_grad_()
    pull_TE = torch.randn(tokens, experts, device="cuda")
    logits_TE = router_logits(x_TD, weight_ED, impl="split")
    want = x_TD.double() @ weight_ED.double().t()
    # tensor cores add 16 products at a time, and cut the sum off where fp32 ends instead of rounding it
    assert_close(logits_TE, want, max(1e-6, dim / 16 * 2**-24))
    grads = torch.autograd.grad(logits_TE, (x_TD, weight_ED), pull_TE)
    wants = torch.autograd.grad(want, (x_TD, weight_ED), pull_TE.double())
    assert grads[0].dtype == torch.bfloat16
    assert_close(grads[0], wants[0], 2.5e-3)  # the rounding to bf16 alone
    assert_close(grads[1], wants[1], 1e-5)
