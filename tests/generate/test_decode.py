"""Prefill and decode through the cache against the whole forward pass, at every position."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.projections import HeadsMixer
from pithwood.attention.window import SlidingWindowConfig
from pithwood.generate.cache import Cache
from pithwood.ops.packing import Packing
from tests.generate.tiny_model import TinyModel, tokens
from tests.numerics import assert_close, rel_error
from tests.ops.devices import DEVICE, KERNEL_MARKS

MODELS: dict[str, list[MixerConfig]] = {
    "full": [FullAttentionConfig(), FullAttentionConfig(rope=False)],
    "window": [SlidingWindowConfig(window=5), SlidingWindowConfig(window=1)],
    "moba": [MoBAConfig(block_size=4, top_k=2), MoBAConfig(block_size=4, top_k=3, rope=False)],
    "moba_k1": [MoBAConfig(block_size=4, top_k=1), MoBAConfig(block_size=5, top_k=2, mean_dtype="fp32")],
    "moba_conv3": [MoBAConfig(block_size=4, top_k=2, key_conv=3), SlidingWindowConfig(window=3)],
    "moba_conv5": [MoBAConfig(block_size=3, top_k=3, key_conv=5), MoBAConfig(block_size=4, top_k=2)],
}


def run_in_steps(model: TinyModel, sequences: list[list[int]], steps: list[list[int]], **cache_args) -> list[Tensor]:
    """Hidden states of each sequence, in steps that add steps[i][n] tokens to sequence n; decode after the first."""
    cache = Cache(model.cache_fields(), len(sequences), 64, **cache_args)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    with torch.no_grad():
        for i, step in enumerate(steps):
            held = cache.lengths
            packing = cache.begin(step)
            new = [t for n, s in enumerate(sequences) for t in s[held[n] : held[n] + step[n]]]
            new_T = torch.tensor(new, device=packing.cu_q.device)
            hidden_TD = model.forward_cached(new_T, packing, cache, "prefill" if i == 0 else "decode")
            cache.advance()
            for n, part in enumerate(hidden_TD.split(step)):
                parts[n].append(part)
    return [torch.cat(part) for part in parts]


def whole(model: TinyModel, sequences: list[list[int]]) -> list[Tensor]:
    lengths = [len(s) for s in sequences]
    with torch.no_grad():
        hidden_TD = model.hidden(torch.tensor([t for s in sequences for t in s]), Packing.from_lengths(lengths))
    return list(hidden_TD.split(lengths))


@pytest.mark.quick
@pytest.mark.parametrize("prefill", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_then_decode_equals_the_whole_forward_at_each_position(name, prefill):
    model, sequences = TinyModel(MODELS[name]), tokens(17)
    steps = [[prefill]] * (prefill > 0) + [[1]] * (17 - prefill)
    (actual,) = run_in_steps(model, sequences, steps)
    (expected,) = whole(model, sequences)
    for position in range(17):
        assert_close(actual[position], expected[position], 1e-5, f"position {position}")


@pytest.mark.parametrize("prefill", [30, 31, 32, 47])
def test_decode_over_blocks_large_enough_to_gather_queries_to_them(prefill):
    model, sequences = TinyModel([MoBAConfig(block_size=16, top_k=2), MoBAConfig(block_size=17, top_k=2)]), tokens(53)
    (actual,) = run_in_steps(model, sequences, [[prefill]] + [[1]] * (53 - prefill))
    (expected,) = whole(model, sequences)
    for position in range(53):
        assert_close(actual[position], expected[position], 1e-5, f"position {position}")


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_different_lengths_decode_together(name):
    model, sequences = TinyModel(MODELS[name]), tokens(12, 20, 8, 9)
    steps = [[5, 13, 1, 4]] + [[1, 1, 1, 1]] * 5 + [[2, 0, 2, 0], [0, 2, 0, 0]]
    actual, expected = run_in_steps(model, sequences, steps), whole(model, sequences)
    assert [len(a) for a in actual] == [12, 20, 8, 9]
    for n in range(4):
        assert_close(actual[n], expected[n], 1e-5, f"sequence {n}")


@pytest.mark.parametrize(
    "decode", [pytest.param("moba", marks=[*KERNEL_MARKS, pytest.mark.slow]), pytest.param("full", marks=KERNEL_MARKS)]
)
def test_decode_by_kernel_where_the_cache_holds_the_keys_equals_decode_by_plain_torch(decode):
    model = TinyModel([MoBAConfig(block_size=16, top_k=2), FullAttentionConfig(), MoBAConfig(block_size=17, top_k=2)])
    sequences = tokens(45, 9, 34)
    steps = [[40, 0, 31], [1, 1, 1], [2, 0, 1], [0, 8, 0], [1, 0, 1], [1, 0, 0]]
    expected, prefilled = run_in_steps(model, sequences, steps, decode_attention=decode), whole(model, sequences)
    model.to(DEVICE)
    for mixer in model.mixers:
        assert isinstance(mixer, HeadsMixer)
        mixer.decode_impl = "triton"
    actual = run_in_steps(model, sequences, steps, decode_attention=decode, device=DEVICE)
    for n in range(3):
        assert_close(actual[n], expected[n], 1e-5, f"sequence {n}")
        if decode == "moba":
            assert_close(actual[n], prefilled[n], 1e-5, f"sequence {n} against the whole forward")


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks_equals_one_prefill(name):
    model, sequences = TinyModel(MODELS[name]), tokens(23, 9)
    steps = [[6, 3], [1, 0], [9, 1], [0, 5], [7, 0]]
    for actual, expected in zip(run_in_steps(model, sequences, steps), whole(model, sequences), strict=True):
        assert_close(actual, expected, 1e-5)


def _dense_over_same_cache(model: TinyModel, sequence: list[int], prefill: int) -> Tensor:
    """What full attention gives in each decode step on the K/V that MoBA's prefill left."""
    dense = TinyModel([FullAttentionConfig() for _ in model.mixers])
    for mixer, source in zip(dense.mixers, model.mixers, strict=True):
        mixer.load_state_dict(source.state_dict())
    dense.embedding = model.embedding
    cache = Cache(model.cache_fields(), 1, 64)
    dense_cache = Cache(dense.cache_fields(), 1, 64)
    parts = []
    with torch.no_grad():
        packing = cache.begin([prefill])
        model.forward_cached(torch.tensor(sequence[:prefill]), packing, cache, "prefill")
        dense_packing = dense_cache.begin([prefill])
        for i in range(len(model.mixers)):
            for name in ("k", "v"):
                dense_cache.layer(i, dense_packing).append(name, cache._storage[i][name][0, :prefill])
        dense_cache.advance()
        for token in sequence[prefill:]:
            packing = dense_cache.begin([1])
            parts.append(dense.forward_cached(torch.tensor([token]), packing, dense_cache, "decode"))
            dense_cache.advance()
    return torch.cat(parts)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["configured", "asked"])
def test_full_attention_decode_after_moba_prefill_is_dense_on_the_same_cache(how):
    decode: Literal["full", "moba"] = "full" if how == "configured" else "moba"
    model = TinyModel(
        [MoBAConfig(block_size=4, top_k=2, decode=decode), MoBAConfig(block_size=4, top_k=2, decode=decode)]
    )
    (sequence,) = tokens(24)
    steps = [[13]] + [[1]] * 11
    (actual,) = run_in_steps(model, [sequence], steps, decode_attention="full" if how == "asked" else None)
    (sparse,) = whole(model, [sequence])
    assert_close(actual[:13], sparse[:13], 1e-5)
    assert_close(actual[13:], _dense_over_same_cache(model, sequence, 13), 1e-5)
    assert rel_error(actual[13:], sparse[13:]) > 1e-3


def test_attention_can_be_switched_between_steps_of_one_cache():
    """Block means are kept while full attention decodes, so MoBA can go on from there."""
    model, (sequence,) = TinyModel([MoBAConfig(block_size=4, top_k=2)]), tokens(24)
    cache = Cache(model.cache_fields(), 1, 64)
    parts = []
    with torch.no_grad():
        for i, token in enumerate(sequence):
            cache.decode_attention = "full" if 6 <= i < 18 else "moba"
            parts.append(model.forward_cached(torch.tensor([token]), cache.begin([1]), cache, "decode"))
            cache.advance()
    (sparse,) = whole(model, [sequence])
    # one layer: its keys do not depend on how earlier steps attended
    assert_close(torch.cat(parts)[:6], sparse[:6], 1e-5)
    assert_close(torch.cat(parts)[18:], sparse[18:], 1e-5)
    assert rel_error(torch.cat(parts)[9:18], sparse[9:18]) > 1e-3


def test_blocks_chosen_while_decoding_are_those_of_the_whole_forward():
    model, (sequence,) = TinyModel([MoBAConfig(block_size=3, top_k=3)]), tokens(20)
    probe: dict = {}
    model.hidden(torch.tensor(sequence), Packing.from_lengths([20]), probe=probe)
    ids = probe["layers.0.blocks"].ids
    cache = Cache(model.cache_fields(), 1, 64)
    with torch.no_grad():
        for i, token in enumerate(sequence):
            step: dict = {}
            model.hidden(torch.tensor([token]), cache.begin([1]), cache, "decode", probe=step)
            cache.advance()
            found = step["layers.0.blocks"].ids[0]
            assert sorted(found[found >= 0].tolist()) == sorted(ids[i][ids[i] >= 0].tolist())


def test_bf16_cache_stays_near_the_fp32_forward():
    model, sequences = TinyModel([FullAttentionConfig(), SlidingWindowConfig(window=4)]), tokens(14)
    (actual,) = run_in_steps(model, sequences, [[6]] + [[1]] * 8, dtype=torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    assert_close(actual, whole(model, sequences)[0], 3e-2)


@pytest.mark.parametrize("name", ["full", "moba", "window"])
def test_truncate_and_go_on_equals_never_having_had_the_rest(name):
    model, (first, other) = TinyModel(MODELS[name]), tokens(22, 22)
    mixed = first[:9] + other[9:]
    cache = Cache(model.cache_fields(), 1, 64)
    with torch.no_grad():
        for sequence, start, stop in [(first, 0, 14), (first, 14, 19)]:
            packing = cache.begin([stop - start])
            model.forward_cached(torch.tensor(sequence[start:stop]), packing, cache, "prefill")
            cache.advance()
        cache.truncate(0, 9)
        rest = model.forward_cached(torch.tensor(mixed[9:]), cache.begin([13]), cache, "prefill")
    assert_close(rest, whole(model, [mixed])[0][9:], 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_forked_sequences_go_their_own_ways(name):
    model, (stem, a, b) = TinyModel(MODELS[name]), tokens(10, 6, 6)
    cache = Cache(model.cache_fields(), 2, 64)
    with torch.no_grad():
        model.forward_cached(torch.tensor(b[:3] + stem), cache.begin([3, 10]), cache, "prefill")
        cache.advance()
        assert cache.fork(1, 1) == [2]
        hidden_TD = model.forward_cached(torch.tensor(b[3:] + a + b), cache.begin([3, 6, 6]), cache, "prefill")
        cache.advance()
    parts = hidden_TD.split([3, 6, 6])
    assert_close(parts[0], whole(model, [b])[0][3:], 1e-5)
    assert_close(parts[1], whole(model, [stem + a])[0][10:], 1e-5)
    assert_close(parts[2], whole(model, [stem + b])[0][10:], 1e-5)
    assert cache.lengths == [6, 16, 16]
