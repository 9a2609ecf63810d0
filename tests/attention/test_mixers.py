"""The mixers against attention written out with masks, their shared names, replay, leaks, refusals and costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pithwood.attention.base import MixerConfig, check_context_parallel
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.projections import visible_pairs
from pithwood.attention.window import SlidingWindowConfig
from pithwood.ops.packing import Packing, Selection
from pithwood.parallel.context import ContextGroup
from pithwood.parallel.mesh import Group
from tests.attention.builders import (
    SHAPE,
    causal_mask,
    context,
    hidden,
    make_mixer,
    masked_attention,
    moba_mask,
    run_with_grads,
    window_mask,
)
from tests.numerics import assert_close, rel_error

LENGTHS = [21, 1, 0, 40, 16]
MIXERS: list[MixerConfig] = [
    FullAttentionConfig(),
    FullAttentionConfig(key_conv=3),
    SlidingWindowConfig(window=5),
    SlidingWindowConfig(window=5, key_conv=5),
    MoBAConfig(block_size=4, top_k=3),
    MoBAConfig(block_size=4, top_k=3, key_conv=3),
    MoBAConfig(block_size=16, top_k=2),
    MoBAConfig(block_size=8, top_k=2, route_per="kv_group", mean_dtype="fp32", tie="earlier"),
]


def _ids(config: MixerConfig) -> str:
    return f"{type(config).__name__}-{getattr(config, 'key_conv', '')}"


@pytest.mark.quick
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    ("config", "mask"),
    [
        (FullAttentionConfig(), causal_mask),
        (SlidingWindowConfig(window=5), window_mask(5)),
        (SlidingWindowConfig(window=1), window_mask(1)),
        (MoBAConfig(block_size=4, top_k=3, mean_dtype="fp32"), moba_mask(4, 3)),
        (MoBAConfig(block_size=4, top_k=3, mean_dtype="centered"), moba_mask(4, 3)),
        (MoBAConfig(block_size=5, top_k=1, topk_includes_current=False), moba_mask(5, 2)),
        (MoBAConfig(block_size=3, top_k=1), moba_mask(3, 1)),
        (MoBAConfig(block_size=16, top_k=2), moba_mask(16, 2)),
    ],
)
def test_mixer_equals_its_definition_with_gradients(config, mask, rope):
    config = replace(config, rope=rope, softmax_scale=0.3)
    mixer = make_mixer(config, dtype=torch.float64)
    x_TD = hidden(sum(LENGTHS), dtype=torch.float64)
    y_TD, grads = run_with_grads(mixer, x_TD, context(Packing.from_lengths(LENGTHS)))

    x_TD.requires_grad_()
    mixer.zero_grad()
    expected_TD = masked_attention(mixer, x_TD, LENGTHS, mask)
    expected_TD.backward(hidden(len(x_TD), seed=99, dtype=torch.float64))
    assert_close(y_TD, expected_TD, 1e-9)
    assert x_TD.grad is not None
    assert_close(grads["x"], x_TD.grad, 1e-9, "x")
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        assert_close(grads[name], parameter.grad, 1e-9, name)


@pytest.mark.quick
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_moba_that_reaches_every_block_is_full_attention(num_kv_heads):
    shape = replace(SHAPE, num_kv_heads=num_kv_heads)
    packing = Packing.from_lengths(LENGTHS)
    x_TD = hidden(sum(LENGTHS))
    full = make_mixer(FullAttentionConfig(), shape=shape)
    moba = make_mixer(MoBAConfig(block_size=8, top_k=5), shape=shape)
    y_full, grads_full = run_with_grads(full, x_TD, context(packing))
    y_moba, grads_moba = run_with_grads(moba, x_TD, context(packing))
    assert_close(y_moba, y_full, 1e-6)
    for name, grad in grads_full.items():
        assert_close(grads_moba[name], grad, 2e-6, name)


def test_sparse_attention_differs_from_full():
    """Guards the test above: fewer blocks must change the output."""
    packing, x_TD = Packing.from_lengths([40]), hidden(40)
    full = make_mixer(FullAttentionConfig())(x_TD, context(packing)).y_TD
    sparse = make_mixer(MoBAConfig(block_size=4, top_k=3))(x_TD, context(packing)).y_TD
    assert rel_error(sparse, full) > 1e-2
    assert_close(sparse[:12], full[:12], 1e-5)


@pytest.mark.quick
def test_parameter_names_and_shapes_are_those_of_full_attention():
    for qk_norm, bias in [(True, False), (False, True)]:
        shape = replace(SHAPE, qk_norm=qk_norm, bias=bias)
        states = [
            {name: tuple(p.shape) for name, p in config.build(shape).state_dict().items()}
            for config in (FullAttentionConfig(), SlidingWindowConfig(), MoBAConfig())
        ]
        assert states[0] == states[1] == states[2]
        expected = {"q_proj.weight": (32, 24), "k_proj.weight": (16, 24), "v_proj.weight": (16, 24)}
        assert expected.items() <= states[0].items()
        assert states[0]["o_proj.weight"] == (24, 32)
        assert ("q_norm.weight" in states[0]) == qk_norm
        assert ("o_proj.bias" in states[0]) == bias


@pytest.mark.parametrize(
    "config", [FullAttentionConfig(key_conv=3), SlidingWindowConfig(key_conv=3), MoBAConfig(key_conv=3)], ids=_ids
)
def test_initial_values_that_a_mixer_sets_itself(config):
    assert config.init_std("key_conv.weight", 0.02) == 0.0
    assert config.init_std("q_norm.weight", 0.02) is None
    assert config.init_std("q_proj.bias", 0.02) == 0.0
    assert config.init_std("q_proj.weight", 0.02) == 0.02
    assert torch.equal(dict(config.build(SHAPE).named_parameters())["k_norm.weight"], torch.ones(8))
    assert config.build(SHAPE).optimizer_shapes() == {"key_conv.weight": None}


@pytest.mark.quick
@pytest.mark.parametrize("config", MIXERS, ids=_ids)
def test_a_changed_document_moves_no_other(config):
    packing = Packing.from_lengths(LENGTHS)
    mixer = make_mixer(config)
    x_TD = hidden(sum(LENGTHS))
    probe: dict = {}
    before = mixer(x_TD, context(packing, probe=probe)).y_TD
    changed = x_TD.clone()
    changed[22:62] = hidden(40, seed=5)
    free = mixer(changed, context(packing)).y_TD
    assert_close(free[:22], before[:22], 1e-6)
    assert_close(free[62:], before[62:], 1e-6)
    assert rel_error(free[22:62], before[22:62]) > 0.1
    replayed = mixer(changed, context(packing, replay=probe)).y_TD
    assert_close(replayed[:22], before[:22], 1e-6)
    assert_close(replayed[62:], before[62:], 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("config", MIXERS, ids=_ids)
def test_a_later_token_moves_no_earlier_one(config):
    packing, mixer, x_TD = Packing.from_lengths([33]), make_mixer(config), hidden(33)
    before = mixer(x_TD, context(packing)).y_TD
    changed = x_TD.clone()
    changed[19] = hidden(1, seed=5)[0]
    after = mixer(changed, context(packing)).y_TD
    assert_close(after[:19], before[:19], 1e-6)
    assert rel_error(after[19], before[19]) > 1e-3


def test_probe_collects_the_blocks_and_replay_uses_them():
    packing, x_TD = Packing.from_lengths([40]), hidden(40)
    mixer = make_mixer(MoBAConfig(block_size=4, top_k=3))
    probe: dict = {}
    y_TD, grads = run_with_grads(mixer, x_TD, context(packing, layer=7, probe=probe))
    blocks = probe["layers.7.blocks"]
    assert isinstance(blocks, Selection)
    assert blocks.ids.shape == (40, 4, 3)
    assert int(blocks.count.min()) == 1
    assert torch.equal(blocks.count, (blocks.ids >= 0).sum(-1).int())
    again, grads_again = run_with_grads(mixer, x_TD, context(packing, layer=7, replay=probe))
    assert torch.equal(again, y_TD)
    assert all(torch.equal(grads_again[name], grad) for name, grad in grads.items())

    own = torch.where(torch.arange(3) == 0, (torch.arange(40) // 4)[:, None], -1).int()[:, None, :].contiguous()
    only_own = Selection(own, torch.ones(40, 1, dtype=torch.int32), 4)
    local = mixer(x_TD, context(packing, layer=7, replay={"layers.7.blocks": only_own})).y_TD
    assert_close(local, make_mixer(MoBAConfig(block_size=4, top_k=1))(x_TD, context(packing)).y_TD, 1e-6)


def test_bf16_activations_with_fp32_weights_keep_fp32_gradients():
    packing, mixer = Packing.from_lengths(LENGTHS), make_mixer(MoBAConfig(block_size=8, top_k=2, key_conv=3))
    probe: dict = {}
    y_wide, grads_wide = run_with_grads(mixer, hidden(sum(LENGTHS)), context(packing, probe=probe))
    y_TD, grads = run_with_grads(mixer, hidden(sum(LENGTHS), dtype=torch.bfloat16), context(packing, replay=probe))
    assert y_TD.dtype == torch.bfloat16
    assert_close(y_TD, y_wide, 3e-2)
    for name, parameter in mixer.named_parameters():
        assert grads[name].dtype == parameter.dtype == torch.float32
        assert_close(grads[name], grads_wide[name], 6e-2, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoBAConfig(block_size=0), "block_size=0 must be >= 1"),
        (lambda: MoBAConfig(top_k=0), "top_k=0 must be >= 1"),
        (lambda: _moba(tie="last"), r"tie='last' is not known; choose one of \['later', 'earlier'\]"),
        (lambda: _full(key_conv=4), r"key_conv=4 is not known; choose one of \[0, 3, 5\]"),
        (lambda: _moba(key_conv=1), r"key_conv=1 is not known; choose one of \[0, 3, 5\]"),
        (lambda: _moba(decode="dense"), "decode='dense'"),
        (lambda: SlidingWindowConfig(window=0), "window=0 must be >= 1"),
        (lambda: FullAttentionConfig(softmax_scale=0.0), "softmax_scale=0.0 must be > 0"),
        (lambda: FullAttentionConfig().build(replace(SHAPE, num_kv_heads=3)), r"num_kv_heads=3 .* \[1, 2, 4\]"),
        (lambda: FullAttentionConfig().build(replace(SHAPE, head_dim=7)), "head_dim=7 must be even"),
    ],
)
def test_bad_configurations_are_refused_in_their_own_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _moba(**fields: Any) -> MoBAConfig:
    return MoBAConfig(**fields)


def _full(**fields: Any) -> FullAttentionConfig:
    return FullAttentionConfig(**fields)


def test_contexts_that_do_not_fit_are_refused():
    mixer, x_TD = make_mixer(FullAttentionConfig()), hidden(8)
    packing = Packing.from_lengths([8])
    with pytest.raises(ValueError, match="rope=True but the model gives no rotary angles"):
        mixer(x_TD, replace(context(packing), rope=None))
    with pytest.raises(ValueError, match="causal=False"):
        mixer(x_TD, context(Packing.from_lengths([8], causal=False)))
    cp = ContextGroup.of(Group((0, 1), 0), Packing.from_lengths([16]))
    with pytest.raises(ValueError, match=r"generate with mesh\.cp=1"):
        mixer(x_TD, context(packing, cp=cp, cache=object()))
    mixer.context_parallel = False
    with pytest.raises(ValueError, match=r"does not run under context parallelism: set mesh\.cp=1"):
        mixer(x_TD, context(packing, cp=cp))
    with pytest.raises(ValueError, match="no cache"):
        mixer(x_TD, context(Packing.from_lengths([8], [12])))


def test_mixers_that_do_not_look_beyond_their_process_are_refused_where_tokens_are_divided():
    full, other = make_mixer(FullAttentionConfig()), make_mixer(SlidingWindowConfig())
    check_context_parallel([full, other], 2)
    other.context_parallel = False
    check_context_parallel([full, other], 1)
    with pytest.raises(ValueError, match=r"SlidingWindow cannot run with mesh\.cp=2: set mesh\.cp=1"):
        check_context_parallel([full, other], 2)


def _brute_pairs(lengths, keys, window=None, tile=1):
    total = 0
    for length, key in zip(lengths, keys, strict=True):
        position = torch.arange(length)[:, None] + key - length
        u = torch.arange(key)[None, :]
        seen = u <= position
        if window is not None:
            seen &= u > position - window
        if tile > 1:
            rows = torch.zeros(-(-length // tile) * tile, -(-key // tile) * tile)
            rows[:length, :key] = seen.float()
            squares = rows.view(-(-length // tile), tile, -(-key // tile), tile).amax((1, 3))
            total += int(squares.sum()) * tile * tile
        else:
            total += int(seen.sum())
    return total


@pytest.mark.quick
@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_visible_pairs_are_counted_exactly(window, tile):
    for lengths, keys in [(LENGTHS, LENGTHS), ([1, 5, 0, 9], [30, 5, 7, 12]), ([6], [3])]:
        packing = Packing.from_lengths(lengths, keys)
        assert visible_pairs(packing, window, tile) == _brute_pairs(lengths, keys, window, tile)


def test_model_flops_of_moba_count_what_the_selection_lets_through():
    config, packing = MoBAConfig(block_size=4, top_k=3), Packing.from_lengths(LENGTHS)
    mixer = make_mixer(config)
    x_TD = hidden(sum(LENGTHS), dtype=torch.float32)
    probe: dict = {}
    mixer(x_TD, context(packing, probe=probe))
    ids = probe["layers.0.blocks"].ids.long()
    position = packing.position_T[:, None, None]
    seen = (torch.minimum(position + 1, (ids + 1) * 4) - ids * 4).masked_fill(ids < 0, 0)
    cost = mixer.cost(packing)
    projections = 2 * len(x_TD) * sum(p.numel() for n, p in mixer.named_parameters() if n.endswith("_proj.weight"))
    assert cost.model_flops == projections + 4 * 8 * int(seen.sum())
    assert cost.executed_flops > cost.model_flops
    assert cost.saved_bytes > 0


def test_moba_that_reaches_everything_costs_what_full_attention_costs():
    packing = Packing.from_lengths(LENGTHS)
    full = FullAttentionConfig().build(SHAPE).cost(packing)
    moba = MoBAConfig(block_size=8, top_k=5).build(SHAPE).cost(packing)
    window = SlidingWindowConfig(window=40).build(SHAPE).cost(packing)
    assert full.model_flops == moba.model_flops == window.model_flops
    assert SlidingWindowConfig(window=4).build(SHAPE).cost(packing).model_flops < full.model_flops
    assert moba.cache_bytes > full.cache_bytes


def test_the_key_convolution_costs_the_same_in_every_mixer():
    packing = Packing.from_lengths(LENGTHS)
    rows = packing.num_queries * SHAPE.num_kv_heads * SHAPE.head_dim
    tail = 2 * len(LENGTHS) * SHAPE.num_kv_heads * SHAPE.head_dim
    for config in (FullAttentionConfig(), SlidingWindowConfig(window=4), MoBAConfig(block_size=8, top_k=2)):
        plain = config.build(SHAPE).cost(packing)
        convolved = replace(config, key_conv=3).build(SHAPE).cost(packing)
        assert convolved.model_flops == plain.model_flops
        assert convolved.executed_flops - plain.executed_flops == 2 * 3 * rows
        assert convolved.saved_bytes - plain.saved_bytes == 4 * 4 * rows
        assert convolved.cache_bytes - plain.cache_bytes == 4 * tail


def test_costs_follow_the_size_of_activations_except_for_what_is_fp32():
    packing = Packing.from_lengths(LENGTHS)
    for config in MIXERS:
        mixer = config.build(SHAPE)
        wide = mixer.cost(packing)
        mixer.activation_bytes = 2
        narrow = mixer.cost(packing)
        assert (narrow.model_flops, narrow.executed_flops) == (wide.model_flops, wide.executed_flops)
        kept_fp32 = 2 * narrow.saved_bytes - wide.saved_bytes
        # log-sums; of a selection the ids, their number, and for each head the lists that kernels make of them
        numbers = SHAPE.num_heads
        if isinstance(config, MoBAConfig):
            sets = SHAPE.num_heads if config.route_per == "q_head" else SHAPE.num_kv_heads
            numbers += sets * (config.num_blocks + 1) + SHAPE.num_heads * config.num_blocks
        assert kept_fp32 == packing.num_queries * numbers * 4
