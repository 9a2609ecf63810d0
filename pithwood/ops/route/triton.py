"""Choice and weights of experts on a GPU: one launch each way, scores stay in registers.

A program owns TOKENS tokens with the scores of all experts. Choosing is a maximum taken top_k times, over numbers that
hold a score and, below it, the expert: ties are broken by the expert's number, and the maximum alone says who it was.

Legend: T packed tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TILE_ELEMENTS = 2048
"""Scores that a program holds: TOKENS x experts, 16 a thread in four warps."""
WARPS = 4


@operator("select_experts")
def select_experts(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, sigmoid: bool, groups: int, open_groups: int, top2_sum: bool
) -> Tensor:
    """[T, k] int64 ids, as `select_experts_ref` but for ties."""
    logits_TE = logits_TE.contiguous()
    ids_Tk = torch.empty(logits_TE.shape[0], top_k, dtype=torch.int64, device=logits_TE.device)
    if ids_Tk.numel():
        grid, sizes = _launch(logits_TE)
        _select_experts[grid](
            logits_TE, logits_TE if bias_E is None else bias_E, ids_Tk, logits_TE.shape[0],
            SIGMOID=sigmoid, BIASED=bias_E is not None, K=top_k, GROUPS=groups, OPEN=open_groups, TOP2=top2_sum,
            GROUPS_PAD=triton.next_power_of_2(groups), **sizes,
        )  # fmt: skip
    return ids_Tk


@operator("expert_weights")
def expert_weights(
    logits_TE: Tensor, ids_Tk: Tensor, sigmoid: bool, renormalize: bool, scale: float, with_prob: bool
) -> tuple[Tensor, Tensor]:
    """(weight [T, k], probabilities [T, E], empty if not asked for), as `expert_weights_ref`."""
    logits_TE, ids_Tk = logits_TE.contiguous(), ids_Tk.contiguous()
    weight_Tk = torch.empty(ids_Tk.shape, dtype=torch.float32, device=logits_TE.device)
    prob_TE = torch.empty_like(logits_TE) if with_prob else logits_TE.new_empty(0)
    if logits_TE.shape[0]:
        grid, sizes = _launch(logits_TE)
        _weigh_experts[grid](
            logits_TE, ids_Tk, weight_Tk, prob_TE, logits_TE.shape[0], scale,
            SIGMOID=sigmoid, RENORMALIZE=renormalize, WITH_PROB=with_prob,
            K=ids_Tk.shape[1], K_PAD=triton.next_power_of_2(ids_Tk.shape[1]), **sizes,
        )  # fmt: skip
    return weight_Tk, prob_TE


@operator("expert_weights_backward")
def expert_weights_backward(
    grad_Tk: Tensor | None, grad_TE: Tensor | None, logits_TE: Tensor, ids_Tk: Tensor,
    sigmoid: bool, renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    """[T, E] gradient of the logits from those of the weights and of the probabilities; the latter may be expanded."""
    logits_TE, ids_Tk = logits_TE.contiguous(), ids_Tk.contiguous()
    grad_logits_TE = torch.empty_like(logits_TE)
    if logits_TE.shape[0]:
        grid, sizes = _launch(logits_TE)
        strides = (0, 0) if grad_TE is None else grad_TE.stride()
        _weigh_experts_backward[grid](
            logits_TE, ids_Tk, logits_TE if grad_Tk is None else grad_Tk.contiguous(),
            logits_TE if grad_TE is None else grad_TE, *strides, grad_logits_TE, logits_TE.shape[0], scale,
            SIGMOID=sigmoid, RENORMALIZE=renormalize, OF_WEIGHT=grad_Tk is not None, OF_PROB=grad_TE is not None,
            K=ids_Tk.shape[1], K_PAD=triton.next_power_of_2(ids_Tk.shape[1]), **sizes,
        )  # fmt: skip
    return grad_logits_TE


@select_experts.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, sigmoid: bool, groups: int, open_groups: int, top2_sum: bool
) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape[0], top_k, dtype=torch.int64)


@expert_weights.register_fake
def _(
    logits_TE: Tensor, ids_Tk: Tensor, sigmoid: bool, renormalize: bool, scale: float, with_prob: bool
) -> tuple[Tensor, Tensor]:
    return logits_TE.new_empty(ids_Tk.shape), logits_TE.new_empty(logits_TE.shape if with_prob else (0,))


@expert_weights_backward.register_fake
def _(
    grad_Tk: Tensor | None, grad_TE: Tensor | None, logits_TE: Tensor, ids_Tk: Tensor,
    sigmoid: bool, renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    return logits_TE.new_empty(logits_TE.shape)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, ids_Tk, *ctx.rule, ctx.with_prob = inputs
    ctx.save_for_backward(logits_TE, ids_Tk)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_Tk: Tensor | None, grad_TE: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_TE = grad_TE if ctx.with_prob else None
    none = None, None, None, None, None
    if grad_Tk is None and grad_TE is None:
        return None, *none
    return expert_weights_backward(grad_Tk, grad_TE, *ctx.saved_tensors, *ctx.rule), *none


expert_weights.register_autograd(_backward, setup_context=_save_logits)


def _launch(logits_TE: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    num_tokens, num_experts = logits_TE.shape
    experts = triton.next_power_of_2(num_experts)
    tokens = max(TILE_ELEMENTS // experts, 1)
    sizes = {"E": num_experts, "E_PAD": experts, "TOKENS": tokens, "num_warps": WARPS}
    return (triton.cdiv(num_tokens, tokens),), sizes


@triton.jit
def _load_logits(logits_ptr, token, num_tokens, E: tl.constexpr, E_PAD: tl.constexpr):
    expert = tl.arange(0, E_PAD)[None, :]
    at = logits_ptr + token.to(tl.int64)[:, None] * E + expert
    # The values of padding never win; those of missing tokens are finite and never stored.
    logits = tl.load(at, mask=(token < num_tokens)[:, None] & (expert < E), other=0.0)
    return tl.where(expert < E, logits, float("-inf"))


@triton.jit
def _softmax(logits):
    weight = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def _rank_keys(score, PLACES: tl.constexpr):
    """int64 numbers in the order of (score, lower place first): the score's bits, then PLACES - 1 - place."""
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return order * 4294967296 + (PLACES - 1 - tl.arange(0, PLACES))[None, :].to(tl.int64)


@triton.jit
def _place(key, PLACES: tl.constexpr):
    return PLACES - 1 - (key & 0xFFFFFFFF)


@triton.jit
def _select_experts(
    logits_ptr, bias_ptr, ids_ptr, num_tokens,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, OPEN: tl.constexpr,
    TOP2: tl.constexpr, GROUPS_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)
    logits = _load_logits(logits_ptr, token, num_tokens, E, E_PAD)
    score = tl.sigmoid(logits) if SIGMOID else _softmax(logits)
    if BIASED:
        score += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)[None, :]
    LOWEST: tl.constexpr = -9223372036854775808
    if OPEN < GROUPS:
        group_of = (expert // (E // GROUPS))[None, :]
        group = tl.arange(0, GROUPS_PAD)[None, :]
        value = tl.full([TOKENS, GROUPS_PAD], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            inside = tl.where((group_of == g) & (expert < E)[None, :], score, float("-inf"))
            best = tl.max(inside, 1)
            if TOP2:
                # the second best: without the first of those that are equal to the best
                first = tl.min(tl.where(inside == best[:, None], expert[None, :], E_PAD), 1)
                best += tl.max(tl.where(expert[None, :] == first[:, None], float("-inf"), inside), 1)
            value = tl.where(group == g, best[:, None], value)
        group_key = tl.where(group < GROUPS, _rank_keys(value, GROUPS_PAD), LOWEST)
        is_open = tl.zeros([TOKENS, E_PAD], tl.int32)
        for _ in tl.static_range(OPEN):
            top = tl.max(group_key, 1)
            group_key = tl.where(group_key == top[:, None], LOWEST, group_key)
            is_open += (group_of == _place(top, GROUPS_PAD)[:, None]).to(tl.int32)
        score = tl.where(is_open > 0, score, float("-inf"))
    key = tl.where((expert < E)[None, :], _rank_keys(score, E_PAD), LOWEST)
    for slot in tl.static_range(K):
        top = tl.max(key, 1)
        key = tl.where(key == top[:, None], LOWEST, key)
        tl.store(ids_ptr + token.to(tl.int64) * K + slot, _place(top, E_PAD), mask=token < num_tokens)


@triton.jit
def _chosen(score, ids_ptr, token, num_tokens, K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr):
    """[TOKENS, K_PAD] scores at the ids, 0 for none."""
    slot_at = tl.arange(0, K_PAD)[None, :]
    expert = tl.arange(0, E_PAD)[None, :]
    raw = tl.zeros([score.shape[0], K_PAD], tl.float32)
    for slot in tl.static_range(K):
        at = tl.load(ids_ptr + token.to(tl.int64) * K + slot, mask=token < num_tokens, other=-1).to(tl.int32)
        value = tl.sum(tl.where(expert == at[:, None], score, 0.0), 1)
        raw = tl.where(slot_at == slot, value[:, None], raw)
    return raw


@triton.jit
def _weigh_experts(
    logits_ptr, ids_ptr, weight_ptr, prob_ptr, num_tokens, scale,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, WITH_PROB: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)[None, :]
    logits = _load_logits(logits_ptr, token, num_tokens, E, E_PAD)
    score = tl.sigmoid(logits) if SIGMOID else _softmax(logits)
    real = (token < num_tokens)[:, None]
    raw = _chosen(score, ids_ptr, token, num_tokens, K, K_PAD, E_PAD)
    if RENORMALIZE:
        total = tl.sum(raw, 1)[:, None]
        raw = raw / tl.where(total == 0.0, 1.0, total)
    slot = tl.arange(0, K_PAD)[None, :]
    tl.store(weight_ptr + token.to(tl.int64)[:, None] * K + slot, raw * scale, mask=real & (slot < K))
    if WITH_PROB:
        prob = score / tl.sum(score, 1)[:, None] if SIGMOID else score
        tl.store(prob_ptr + token.to(tl.int64)[:, None] * E + expert, prob, mask=real & (expert < E))


@triton.jit
def _weigh_experts_backward(
    logits_ptr, ids_ptr, grad_weight_ptr, grad_prob_ptr, stride_t, stride_e, grad_logits_ptr, num_tokens, scale,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_PROB: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Scores anew, then the gradient of each score (from weights at its slots, and from its probability)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)[None, :]
    logits = _load_logits(logits_ptr, token, num_tokens, E, E_PAD)
    score = tl.sigmoid(logits) if SIGMOID else _softmax(logits)
    row = token.to(tl.int64)[:, None]
    real = (token < num_tokens)[:, None] & (expert < E)
    grad_score = tl.zeros([TOKENS, E_PAD], tl.float32)
    if OF_PROB:
        grad_score = tl.load(grad_prob_ptr + row * stride_t + expert * stride_e, mask=real, other=0.0)
        if SIGMOID:
            total = tl.sum(score, 1)[:, None]
            grad_score = (grad_score - tl.sum(grad_score * score, 1)[:, None] / total) / total
    if OF_WEIGHT:
        slot_at = tl.arange(0, K_PAD)[None, :]
        here = (token < num_tokens)[:, None] & (slot_at < K)
        grad = tl.load(grad_weight_ptr + row * K + slot_at, mask=here, other=0.0) * scale  # [TOKENS, K_PAD]
        if RENORMALIZE:
            raw = _chosen(score, ids_ptr, token, num_tokens, K, K_PAD, E_PAD)
            total = tl.sum(raw, 1)[:, None]
            total = tl.where(total == 0.0, 1.0, total)
            grad = (grad - tl.sum(grad * raw, 1)[:, None] / total) / total
        for slot in tl.static_range(K):
            at = tl.load(ids_ptr + token.to(tl.int64) * K + slot, mask=token < num_tokens, other=-1).to(tl.int32)
            value = tl.sum(tl.where(slot_at == slot, grad, 0.0), 1)
            grad_score += tl.where(expert == at[:, None], value[:, None], 0.0)
    if SIGMOID:
        grad_logits = grad_score * score * (1 - score)
    else:
        grad_logits = score * (grad_score - tl.sum(grad_score * score, 1)[:, None])
    tl.store(grad_logits_ptr + row * E + expert, grad_logits, mask=real)
