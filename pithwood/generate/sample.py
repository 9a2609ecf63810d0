"""Continue prompts: prefill them together, then draw one token per sequence and step.

Legend: N sequences still running, T packed tokens, X vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pithwood.generate.cache import Cache


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    attention: Literal["moba", "full"] | None = None,
    dtype: torch.dtype = torch.float32,
    num_tokens: int | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, without the prompt; a sequence that stops ends with eos_id.

    model           has forward_cached(tokens_T, packing, cache, mode) -> [T, D], logits([N, D]) -> [N, X] and
                    cache_fields() -> the fields of every layer
    prompts         token ids, at least one each; lengths may differ
    temperature     >= 0; 0 takes the most probable token
    top_k           >= 1, draw among so many most probable tokens; None among all
    top_p           in (0, 1], draw among the fewest most probable tokens (of top_k's) that together reach it; None all
    seed            same seed, same tokens. A sequence's draws depend on the seed, its prompt, and how many equal
                    prompts precede it, not on what else is in the batch
    attention       "full" or "moba" for the decode steps of mixers that can do both; None as their configuration says.
                    Prefill always runs as trained
    dtype           of the activations and the cache
    num_tokens      draw only ids below this: a head may have more rows than its tokenizer has tokens; None all
    raises          ValueError for anything outside these ranges

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3 (top_p).
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    outputs: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return outputs
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    cache = Cache(model.cache_fields(), len(prompts), longest, device, dtype, attention)
    uniform = _draws(prompts, max_new_tokens, seed) if temperature > 0 else None
    running = list(range(len(prompts)))
    new = [list(prompt) for prompt in prompts]
    for step in range(max_new_tokens):
        packing = cache.begin([len(tokens) for tokens in new])
        tokens_T = torch.tensor([t for tokens in new for t in tokens], dtype=torch.int64, device=device)
        hidden_TD = model.forward_cached(tokens_T, packing, cache, "prefill" if step == 0 else "decode")
        cache.advance()
        logits_NX = model.logits(hidden_TD[packing.cu_q[1:].long() - 1])[:, :num_tokens]
        uniform_N = None if uniform is None else uniform[running, step].to(device)
        drawn = sample(logits_NX, uniform_N, temperature, top_k, top_p).tolist()
        going = []
        for place, (n, token) in enumerate(zip(running, drawn, strict=True)):
            outputs[n].append(token)
            if token != eos_id:
                going.append(place)
        if not going:
            break
        cache.keep(going)
        new = [[drawn[place]] for place in going]
        running = [running[place] for place in going]
    return outputs


def sample(
    logits_NX: Tensor,
    uniform_N: Tensor | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """[N] int64 tokens drawn from the rows' filtered distributions by inverting their cumulative sums.

    logits_NX   [N, X] any float dtype, read as fp64 so that cumulative sums over large vocabularies stay exact enough
    uniform_N   [N] fp64 in [0, 1), one draw per row; None only with temperature 0, which takes the largest logit
    raises      ValueError if a row holds NaN or no finite logit: the model has diverged
    """
    if not bool((logits_NX.max(-1).values.isfinite()).all()):
        raise ValueError("logits hold NaN or infinity: nothing can be drawn; the weights are not usable")
    if temperature == 0:
        return logits_NX.argmax(-1)
    assert uniform_N is not None
    # the largest logit becomes 0 before the division, so that a tiny temperature cannot overflow
    logits_NX = logits_NX.double()
    logits_NX = (logits_NX - logits_NX.max(-1, keepdim=True).values) / temperature
    if top_k is None and top_p is None:
        return _invert(logits_NX.softmax(-1), uniform_N)
    ordered_NX, token_NX = logits_NX.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered_NX, token_NX = ordered_NX[:, :top_k], token_NX[:, :top_k]
    prob_NX = ordered_NX.softmax(-1)
    if top_p is not None:
        # a token stays if those before it have not reached top_p; the first always does
        before_NX = prob_NX.cumsum(-1) - prob_NX
        prob_NX = prob_NX.masked_fill(before_NX >= top_p, 0.0)
    return token_NX.gather(-1, _invert(prob_NX, uniform_N)[:, None])[:, 0]


def _invert(prob_NX: Tensor, uniform_N: Tensor) -> Tensor:
    """[N]: the index at which the cumulative sum first exceeds uniform * total; never one of zero probability."""
    cumulative_NX = prob_NX.cumsum(-1)
    target_N1 = (uniform_N * cumulative_NX[:, -1])[:, None]
    index_N = torch.searchsorted(cumulative_NX, target_N1, right=True)[:, 0]
    # u * total may round up to the total itself: then the last token that has any probability
    reached_N = torch.searchsorted(cumulative_NX, cumulative_NX[:, -1:].contiguous())[:, 0]
    return torch.minimum(index_N, reached_N)


def _draws(prompts: Sequence[Sequence[int]], num_draws: int, seed: int) -> Tensor:
    """[N, num_draws] fp64 uniforms on the CPU, a stream of its own for each sequence."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.blake2b(f"{seed}/{seen[key]}/{','.join(map(str, key))}".encode(), digest_size=7).digest()
        seen[key] += 1
        stream = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        rows.append(torch.rand(num_draws, generator=stream, dtype=torch.float64))
    return torch.stack(rows)


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    for n, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {n} is empty: give at least one token, such as the document separator")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 0")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be >= 0 and finite; 0 takes the most probable token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1; None draws among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; None draws among all tokens")
