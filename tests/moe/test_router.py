"""Routing against an independent loop, replay, the selection bias, and precision."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.moe import MoEConfig, Router
from tests.moe.helpers import context, filled
from tests.numerics import assert_close


def make_router(model_dim: int = 12, **fields: Any) -> Router:
    router = Router(MoEConfig(expert_dim=4, **fields), model_dim)
    filled(router)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, router.cfg.num_experts).flip(0))
    return router


def route_by_loop(x_TD: Tensor, router: Router) -> tuple[list[list[int]], list[list[float]]]:
    """Expert ids, best first, and weights of each token, in Python floats."""
    cfg, weight = router.cfg, router.weight.double()
    bias = [0.0] * cfg.num_experts
    if router.e_score_correction_bias is not None:
        bias = router.e_score_correction_bias.double().tolist()
    all_ids, all_weights = [], []
    for x in x_TD.double():
        logits = (weight @ x).tolist()
        if cfg.score == "softmax":
            norm = sum(math.exp(v) for v in logits)
            score = [math.exp(v) / norm for v in logits]
        else:
            score = [1 / (1 + math.exp(-v)) for v in logits]
        choice = [s + b for s, b in zip(score, bias, strict=True)]
        size = cfg.num_experts // cfg.num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(cfg.num_groups)]

        def rank(group: list[int], choice: list[float] = choice) -> float:
            best = sorted((choice[e] for e in group), reverse=True)
            return best[0] if cfg.group_score == "max" else best[0] + best[1]

        if cfg.num_groups > 1:
            groups = sorted(groups, key=rank, reverse=True)[: cfg.groups_per_token]
        allowed = [e for group in groups for e in group]
        ids = sorted(allowed, key=lambda e: choice[e], reverse=True)[: cfg.top_k]
        weights = [score[e] for e in ids]
        if cfg.renormalize:
            weights = [w / sum(weights) for w in weights]
        all_ids.append(ids)
        all_weights.append([w * cfg.scale for w in weights])
    return all_ids, all_weights


@pytest.mark.quick
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 8, "top_k": 2},
        {"num_experts": 8, "top_k": 3, "score": "sigmoid", "scale": 2.5},
        {"num_experts": 8, "top_k": 3, "score": "sigmoid", "bias_update_rate": 0.0},
        {"num_experts": 12, "top_k": 3, "num_groups": 4, "groups_per_token": 2},
        {
            "num_experts": 12,
            "top_k": 4,
            "num_groups": 4,
            "groups_per_token": 2,
            "group_score": "top2_sum",
            "score": "sigmoid",
            "bias_update_rate": 1e-3,
        },
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 4, "top_k": 4},
    ],
    ids=["softmax", "sigmoid", "bias", "groups_max", "groups_top2_bias", "one_expert", "all_experts"],
)
def test_ids_and_weights_agree_with_a_loop(fields: dict[str, Any], renormalize: bool) -> None:
    router = make_router(renormalize=renormalize, **fields)
    x_TD = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    ids_Tk, weight_Tk, _ = router.route(x_TD, context([40]))
    expected_ids, expected_weights = route_by_loop(x_TD, router)
    assert ids_Tk.tolist() == expected_ids
    assert weight_Tk.dtype == torch.float32
    assert_close(weight_Tk, torch.tensor(expected_weights))


def test_the_bias_moves_selection_but_not_weights() -> None:
    router = make_router(num_experts=6, top_k=2, score="sigmoid", renormalize=False, bias_update_rate=0.0)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0, 0, 0, 5, 5]))
    x_TD = torch.randn(10, 12)
    ids_Tk, weight_Tk, _ = router.route(x_TD, context([10]))
    assert (ids_Tk >= 4).all()
    assert_close(weight_Tk, router.logits(x_TD).sigmoid().gather(1, ids_Tk))


def test_closed_groups_stay_closed_when_all_open_scores_are_negative() -> None:
    fields: dict[str, Any] = {"score": "sigmoid", "group_score": "top2_sum", "bias_update_rate": 0.0}
    router = make_router(num_experts=8, top_k=3, num_groups=4, groups_per_token=2, **fields)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.fill_(-2.0)
    x_TD = torch.randn(30, 12)
    ids_Tk, _, _ = router.route(x_TD, context([30]))
    assert ids_Tk.tolist() == route_by_loop(x_TD, router)[0]


def test_balanced_routing_is_exact() -> None:
    router = make_router(num_experts=6, top_k=4, routing="balanced")
    ids_Tk, weight_Tk, _ = router.route(torch.randn(9, 12), context([9]))
    assert ids_Tk.tolist() == [[(t * 4 + j) % 6 for j in range(4)] for t in range(9)]
    assert router.counts_E.tolist() == [6] * 6
    assert weight_Tk.requires_grad
    assert_close(weight_Tk.sum(-1), torch.ones(9))


def test_replayed_ids_are_used_with_weights_and_gradients_of_the_live_router() -> None:
    router = make_router(num_experts=8, top_k=2)
    x_TD = torch.randn(20, 12)
    probe: dict[str, Any] = {}
    ids_Tk, _, _ = router.route(x_TD, context([20], probe=probe, layer=3))
    assert torch.equal(probe["layers.3.experts"], ids_Tk)

    other = make_router(num_experts=8, top_k=2)
    other.weight.data += 0.5 * torch.randn(8, 12)
    assert not torch.equal(other.route(x_TD, context([20], layer=3))[0], ids_Tk)
    replayed, replayed_weight, _ = other.route(x_TD, context([20], replay=probe, layer=3))
    assert torch.equal(replayed, ids_Tk)
    score = (x_TD @ other.weight.t()).softmax(-1).gather(1, ids_Tk)
    expected = score / score.sum(-1, keepdim=True)
    assert_close(replayed_weight, expected)
    pull = torch.randn(20, 2)
    (grad,) = torch.autograd.grad((replayed_weight * pull).sum(), other.weight)
    (expected_grad,) = torch.autograd.grad((expected * pull).sum(), other.weight)
    assert_close(grad, expected_grad)


def test_replayed_ids_of_a_wrong_shape_are_refused() -> None:
    router = make_router(num_experts=8, top_k=2)
    replay = {"layers.0.experts": torch.zeros(5, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"layer 0 have shape \(5, 3\); expected \(5, 2\)"):
        router.route(torch.randn(5, 12), context([5], replay=replay))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_none_ids_have_weight_zero_and_no_gradient(score: str) -> None:
    router = make_router(num_experts=4, top_k=2, score=score)
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    x_TD = torch.randn(3, 12, requires_grad=True)
    _, weight_Tk, _ = router.route(x_TD, context([3], replay={"layers.0.experts": ids}))
    assert weight_Tk[ids < 0].eq(0).all()
    assert_close(weight_Tk.sum(-1), torch.tensor([1.0, 1.0, 0.0]))
    (grad,) = torch.autograd.grad((weight_Tk * torch.randn(3, 2)).sum(), x_TD)
    assert torch.isfinite(grad).all()
    assert grad[2].eq(0).all()
    assert router.counts_E.tolist() == [1, 1, 1, 0]


def test_router_stays_fp32_under_bf16_activations() -> None:
    router = make_router(num_experts=16, top_k=2)
    x_TD = torch.randn(200, 12).bfloat16()
    ids_Tk, weight_Tk, _ = router.route(x_TD, context([200]))
    same_ids, same_weight, _ = router.route(x_TD.float(), context([200]))
    assert weight_Tk.dtype == torch.float32
    assert torch.equal(ids_Tk, same_ids)
    assert torch.equal(weight_Tk, same_weight)
    low = (x_TD @ router.weight.bfloat16().t()).softmax(-1).topk(2).indices
    assert not torch.equal(low, ids_Tk), "the shapes must be such that bf16 logits would decide otherwise"


def test_counts_add_up_over_micro_batches_and_only_in_training() -> None:
    router = make_router(num_experts=4, top_k=2)
    ids = [router.route(torch.randn(n, 12), context([n]))[0] for n in (7, 9)]
    expected = torch.bincount(torch.cat(ids).flatten(), minlength=4)
    assert torch.equal(router.counts_E, expected)
    router.eval().route(torch.randn(5, 12), context([5]))
    router.train().route(torch.randn(5, 12), context([5], mode="decode"))
    assert torch.equal(router.counts_E, expected)
    router.reset_step()
    assert router.counts_E.sum() == 0


def test_bias_update_is_rate_times_sign_of_the_load_error() -> None:
    router = make_router(num_experts=4, top_k=2, bias_update_rate=0.25)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.zero_()
    router.update_bias(torch.tensor([10, 0, 5, 5]))
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert "e_score_correction_bias" in router.state_dict()
    assert "counts_E" not in router.state_dict()
    without = make_router(num_experts=4, top_k=2)
    without.update_bias(torch.tensor([10, 0, 5, 5]))
    assert list(without.state_dict()) == ["weight"]


def test_bias_updates_make_a_skewed_load_uniform() -> None:
    router = make_router(num_experts=8, top_k=2, score="sigmoid", bias_update_rate=0.01)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.zero_()
    generator = torch.Generator().manual_seed(0)
    # A common offset makes every token prefer the same experts.
    offset = torch.randn(12, generator=generator) * 2
    skew = []
    with torch.no_grad():
        for _ in range(150):
            router.reset_step()
            router.route(torch.randn(256, 12, generator=generator) + offset, context([256]))
            counts = router.counts_E.double()
            skew.append(float(counts.max() / counts.mean()))
            router.update_bias(router.counts_E)
    assert skew[0] > 2.0
    assert sum(skew[-10:]) / 10 < 1.25
    assert all(b <= a + 0.5 for a, b in pairwise(skew[::30]))
