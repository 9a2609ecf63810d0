"""Sampling: distributions, filters, determinism, stopping, and batches that do not disturb each other."""

from __future__ import annotations

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.generate.sample import generate, sample
from pithwood.ops.packing import Packing
from tests.generate.tiny_model import VOCAB, TinyModel, tokens


def _model() -> TinyModel:
    return TinyModel([MoBAConfig(block_size=4, top_k=2, key_conv=3), FullAttentionConfig()])


def _uniform(count: int) -> torch.Tensor:
    """Evenly spaced draws: frequencies then equal probabilities to 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _frequencies(logits: torch.Tensor, **filters) -> torch.Tensor:
    drawn = sample(logits.expand(20_000, -1), _uniform(20_000), **filters)
    return torch.bincount(drawn, minlength=len(logits)).double() / 20_000


LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, float("-inf"), 0.7, 2.0])


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_draws_follow_the_softmax(temperature):
    expected = (LOGITS.double() / temperature).softmax(-1)
    torch.testing.assert_close(_frequencies(LOGITS, temperature=temperature), expected, atol=2e-4, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 100])
def test_top_k_keeps_the_k_most_probable_and_their_ratios(top_k):
    kept = LOGITS.argsort(descending=True, stable=True)[:top_k]
    expected = torch.zeros(7, dtype=torch.float64)
    expected[kept] = LOGITS.double()[kept].softmax(-1)
    torch.testing.assert_close(_frequencies(LOGITS, top_k=top_k), expected, atol=2e-4, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.05, [0]), (0.49, [0]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = probability[kept] / probability[kept].sum()
    torch.testing.assert_close(_frequencies(probability.log(), top_p=top_p), expected, atol=2e-4, rtol=0)


@pytest.mark.quick
def test_top_p_counts_within_top_k():
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    # within the best two they are 4/7 and 3/7: 0.55 is reached by the first alone
    frequencies = _frequencies(probability.log(), top_k=2, top_p=0.55)
    assert frequencies.tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.quick
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(filters):
    logits = torch.tensor([[float("-inf"), 1.0, 0.0, float("-inf")]])
    for u in (0.0, 1.0 - 2**-53, 1.0):
        token = int(sample(logits, torch.tensor([u], dtype=torch.float64), **filters))
        assert token in (1, 2)


@pytest.mark.quick
def test_cold_and_tiny_temperatures_take_the_most_probable():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0]])
    assert sample(logits, None, temperature=0).tolist() == [1, 0]
    drawn = sample(logits[:1], torch.tensor([0.999], dtype=torch.float64), temperature=1e-300)
    assert drawn.tolist() == [1]


def test_unusable_logits_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            sample(torch.tensor([[0.0, bad]]), _uniform(1))


@pytest.mark.quick
def test_greedy_generation_equals_the_argmax_of_the_whole_forward():
    model, (prompt,) = _model(), tokens(7)
    (new,) = generate(model, [prompt], 12, temperature=0)
    sequence = list(prompt)
    for token in new:
        hidden_TD = model.hidden(torch.tensor(sequence), Packing.from_lengths([len(sequence)]))
        assert token == int(model.logits(hidden_TD[-1:]).argmax())
        sequence.append(token)
    assert len(new) == 12


@pytest.mark.quick
def test_same_seed_same_tokens_and_another_seed_others():
    model, prompts = _model(), tokens(5, 9)
    first = generate(model, prompts, 10, temperature=1.5, top_k=20, seed=3)
    assert first == generate(model, prompts, 10, temperature=1.5, top_k=20, seed=3)
    assert first != generate(model, prompts, 10, temperature=1.5, top_k=20, seed=4)


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(temperature):
    model, prompts = _model(), tokens(5, 1, 14, 8)
    together = generate(model, prompts, 9, temperature=temperature, top_p=0.9, seed=1)
    assert together == [generate(model, [p], 9, temperature=temperature, top_p=0.9, seed=1)[0] for p in prompts]
    backwards = generate(model, prompts[::-1], 9, temperature=temperature, top_p=0.9, seed=1)
    assert backwards == together[::-1]


def test_equal_prompts_in_a_batch_are_drawn_independently():
    model, (prompt,) = _model(), tokens(6)
    several = generate(model, [prompt] * 4, 10, temperature=10.0)
    assert len({tuple(new) for new in several}) == 4


def test_sequences_stop_at_eos_on_their_own():
    model, prompts = _model(), tokens(5, 3, 9)
    free = generate(model, prompts, 14, temperature=8.0, seed=2)
    eos = next(token for token in free[1] if token not in free[2])
    stopped = generate(model, prompts, 14, temperature=8.0, seed=2, eos_id=eos)
    for whole, cut in zip(free, stopped, strict=True):
        end = whole.index(eos) + 1 if eos in whole else 14
        assert cut == whole[:end]
    # the last sequence goes on with draws of its own after the middle one has left the batch
    assert len(stopped[1]) < len(stopped[2]) == 14


def test_decode_attention_is_chosen_by_call():
    model, prompts = TinyModel([MoBAConfig(block_size=2, top_k=1), MoBAConfig(block_size=2, top_k=1)]), tokens(12)
    as_configured = generate(model, prompts, 16, temperature=0)
    assert as_configured == generate(model, prompts, 16, temperature=0, attention="moba")
    assert as_configured != generate(model, prompts, 16, temperature=0, attention="full")


def test_nothing_to_do_gives_nothing():
    assert generate(_model(), [], 5) == []
    assert generate(_model(), [[1], [2, 3]], 0) == [[], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be >= 1; None draws among all"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"attention": "dense"}, "attention='dense' is not known"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(_model(), **{"prompts": [[1]], "max_new_tokens": 3, **arguments})


def test_tokens_are_in_the_vocabulary():
    (new,) = generate(_model(), tokens(4), 30, temperature=10.0)
    assert all(0 <= token < VOCAB for token in new)
