"""Balance losses by their formulas, against transformers, and over cuts into micro-batches; load statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import LayerContext
from pithwood.losses import LossLedger
from pithwood.moe.balance import balance_loss, count_experts, load_stats, z_loss
from pithwood.moe.router import Router
from pithwood.ops.packing import Packing
from tests.moe.helpers import context, make_layer
from tests.numerics import assert_close

LENGTHS = [5, 0, 1, 8, 0]


def probabilities(num_tokens: int = 14, num_experts: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).mul(2).softmax(-1)


def formula(prob: Tensor, ids: Tensor, counts: list[int] | None = None) -> float:
    """E * sum_e f_e P_e, in Python."""
    num_tokens, num_experts = prob.shape
    if counts is None:
        counts = [int((ids == e).sum()) for e in range(num_experts)]
    mean = [sum(float(prob[t, e]) for t in range(num_tokens)) / num_tokens for e in range(num_experts)]
    return num_experts * sum(c / sum(counts) * p for c, p in zip(counts, mean, strict=True))


@pytest.mark.quick
def test_micro_batch_loss_by_hand() -> None:
    prob = probabilities()
    ids = prob.topk(2).indices
    term = balance_loss(prob, ids, "micro_batch", 0.1)
    assert (term.name, term.count, term.coef) == ("moe_balance", 14, 0.1)
    assert float(term.sum) / 14 == pytest.approx(formula(prob, ids), rel=1e-12)


@pytest.mark.quick
def test_sequence_loss_by_hand_with_empty_documents() -> None:
    prob = probabilities()
    ids = prob.topk(2).indices
    term = balance_loss(prob, ids, "sequence", 0.1, Packing.from_lengths(LENGTHS))
    expected, start = 0.0, 0
    for length in LENGTHS:
        if length:
            part = slice(start, start + length)
            expected += length * formula(prob[part], ids[part])
        start += length
    assert float(term.sum) == pytest.approx(expected, rel=1e-12)


def test_global_batch_loss_uses_the_counts_of_the_step() -> None:
    prob = probabilities()
    ids = prob.topk(2).indices
    counts = [30, 1, 2, 3, 4, 5]
    term = balance_loss(prob, ids, "global_batch", 0.1, counts=torch.tensor(counts))
    assert float(term.sum) / 14 == pytest.approx(formula(prob, ids, counts), rel=1e-12)
    alone = balance_loss(prob, ids, "global_batch", 0.1)
    assert float(alone.sum) / 14 == pytest.approx(formula(prob, ids), rel=1e-12)


@pytest.mark.parametrize("balance", ["micro_batch", "sequence", "global_batch"])
def test_loss_is_one_when_balanced_and_e_over_k_when_collapsed(balance: Any) -> None:
    packing = Packing.from_lengths([6, 6])
    even = torch.full((12, 6), 1 / 6)
    ids = (torch.arange(24) % 6).view(12, 2)
    assert float(balance_loss(even, ids, balance, 1.0, packing).sum) / 12 == pytest.approx(1.0, rel=1e-6)
    collapsed = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(12, 6)
    ids = torch.tensor([[0, 1]]).expand(12, 2)
    assert float(balance_loss(collapsed, ids, balance, 1.0, packing).sum) / 12 == pytest.approx(3.0, rel=1e-6)


def test_none_ids_are_not_counted() -> None:
    ids = torch.tensor([[0, -1], [1, 2], [-1, -1], [2, 0]])
    assert count_experts(ids, 4).tolist() == [2, 1, 2, 0]
    prob = probabilities(4, 4)
    term = balance_loss(prob, ids, "micro_batch", 1.0)
    assert float(term.sum) / 4 == pytest.approx(formula(prob, ids, [2, 1, 2, 0]), rel=1e-12)
    by_doc = balance_loss(prob, ids, "sequence", 1.0, Packing.from_lengths([4]))
    assert float(by_doc.sum) == pytest.approx(float(term.sum), rel=1e-12)
    nobody = balance_loss(prob, torch.full((4, 2), -1), "micro_batch", 1.0)
    assert float(nobody.sum) == 0.0


@pytest.mark.parametrize("top_k", [1, 3])
def test_transformers_loss_is_top_k_times_ours(top_k: int) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="needs transformers")
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    theirs = qwen.load_balancing_loss_func((logits,), num_experts=8, top_k=top_k)
    prob = logits.softmax(-1)
    ours = balance_loss(prob, prob.topk(top_k).indices, "micro_batch", 1.0).sum / 50
    assert_close(theirs, ours * top_k)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    (our_grad,) = torch.autograd.grad(ours * top_k, logits)
    assert_close(their_grad, our_grad)
    # Over two layers theirs is one mean, ours a sum over layers.
    both = qwen.load_balancing_loss_func((logits, logits), num_experts=8, top_k=top_k)
    assert_close(both, 2 * ours * top_k / 2)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, -2.0]])
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist())
    term = z_loss(logits, 1e-3)
    assert float(term.sum) == pytest.approx(expected, rel=1e-6)
    assert (term.name, term.count) == ("moe_z", 2)


def router_gradient(router: Router, x_TD: Tensor, cuts: list[list[int]]) -> Tensor:
    """Gradient of the router's own loss terms over one step, cut into micro-batches of these document lengths."""
    router.weight.grad = None
    router.reset_step()
    ledger = LossLedger({"tokens": float(x_TD.shape[0])})
    start = 0
    for lengths in cuts:
        part = x_TD[start : start + sum(lengths)]
        start += sum(lengths)
        out = router.route(part, LayerContext(Packing.from_lengths(lengths), None, ledger=ledger))[2]
        (out * 0).sum().backward()
    assert start == x_TD.shape[0]
    assert router.weight.grad is not None
    return router.weight.grad.clone()


WHOLE, CUT = [[5, 3, 8, 4]], [[5], [3, 8], [4]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_sequence_gradient_does_not_depend_on_the_cut(score: str) -> None:
    layer = make_layer(num_experts=6, top_k=2, expert_dim=4, score=score, balance="sequence", balance_coef=0.5)
    x_TD = torch.randn(20, 12, dtype=torch.float64)
    whole, cut = router_gradient(layer.gate, x_TD, WHOLE), router_gradient(layer.gate, x_TD, CUT)
    assert whole.norm() > 1e-3
    assert_close(cut, whole)


def test_z_loss_gradient_does_not_depend_on_the_cut() -> None:
    layer = make_layer(num_experts=6, top_k=2, expert_dim=4, z_loss_coef=0.5)
    x_TD = torch.randn(20, 12, dtype=torch.float64)
    assert_close(router_gradient(layer.gate, x_TD, CUT), router_gradient(layer.gate, x_TD, WHOLE))


def test_global_batch_equals_micro_batch_for_one_micro_batch_and_accumulates_for_more() -> None:
    fields: dict[str, Any] = {"num_experts": 6, "top_k": 2, "expert_dim": 4, "balance_coef": 0.5}
    by_step = make_layer(**fields, balance="global_batch").gate
    by_micro = make_layer(**fields, balance="micro_batch").gate
    x_TD = torch.randn(20, 12, dtype=torch.float64)
    assert_close(router_gradient(by_step, x_TD, WHOLE), router_gradient(by_micro, x_TD, WHOLE))

    weight = by_step.weight.detach().clone().requires_grad_()
    loss, start, seen = torch.zeros((), dtype=torch.float64), 0, torch.zeros(6)
    for lengths in CUT:
        prob = (x_TD[start : start + sum(lengths)] @ weight.t()).softmax(-1)
        start += sum(lengths)
        seen = seen + torch.bincount(prob.topk(2).indices.flatten(), minlength=6)
        loss = loss + 0.5 * 6 * (prob.sum(0) * (seen / seen.sum())).sum() / 20
    (expected,) = torch.autograd.grad(loss, weight)
    assert_close(router_gradient(by_step, x_TD, CUT), expected, 1e-6)


def test_losses_enter_the_gradient_with_their_coefficient_and_do_not_change_values() -> None:
    fields: dict[str, Any] = {"num_experts": 6, "top_k": 2, "expert_dim": 4}
    plain = make_layer(**fields)
    lossy = make_layer(**fields, balance="micro_batch", balance_coef=0.3, z_loss_coef=0.2)
    x_TD = torch.randn(20, 12, dtype=torch.float64)
    grads = []
    for layer, tokens in ((plain, None), (lossy, 50)):
        out = layer(x_TD, context([20], tokens=tokens))
        grads.append((out, *torch.autograd.grad(out.square().sum(), layer.gate.weight)))
    assert torch.equal(grads[0][0], grads[1][0])
    weight = plain.gate.weight
    logits = x_TD @ weight.t()
    prob = logits.softmax(-1)
    load = torch.bincount(prob.topk(2).indices.flatten(), minlength=6).double() * 6 / 40
    terms = 0.3 * (prob * load).sum() / 50 + 0.2 * logits.logsumexp(-1).square().sum() / 50
    (extra,) = torch.autograd.grad(terms, weight)
    assert_close(grads[1][1], grads[0][1] + extra)


def test_sigmoid_probabilities_are_normalised() -> None:
    layer = make_layer(
        num_experts=6,
        top_k=2,
        expert_dim=4,
        score="sigmoid",
        balance="micro_batch",
        balance_coef=0.3,
        routing="balanced",
    )
    ctx = context([12], tokens=12)
    layer(torch.randn(12, 12, dtype=torch.float64), ctx)
    assert ctx.ledger is not None
    # With even counts the loss is the mean over tokens of sum_e p_te, 1 if and only if p is normalised.
    assert float(ctx.ledger.means()["moe_balance"]) == pytest.approx(1.0, rel=1e-6)


def test_load_stats() -> None:
    stats = load_stats(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]]))
    assert_close(stats.max_over_mean, torch.tensor([1.0, 4.0, 2.0, 0.0]))
    assert_close(stats.entropy, torch.tensor([1.0, 0.0, 0.5, 0.0]))
    one = load_stats(torch.tensor([7]))
    assert (float(one.max_over_mean), float(one.entropy)) == (1.0, 1.0)


def test_a_balance_without_what_it_needs_is_refused() -> None:
    prob = probabilities()
    with pytest.raises(ValueError, match="needs the packing"):
        balance_loss(prob, prob.topk(2).indices, "sequence", 1.0)
    with pytest.raises(ValueError, match="choose micro_batch"):
        balance_loss(prob, prob.topk(2).indices, "none", 1.0)
