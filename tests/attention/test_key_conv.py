"""The key convolution: its definition, causality, reset at documents, and decoding from its tail."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.key_conv import KeyConv
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.ops.packing import Packing
from tests.attention.builders import context, hidden, make_mixer, run_with_grads
from tests.generate.test_decode import run_in_steps, whole
from tests.generate.tiny_model import TinyModel, tokens
from tests.numerics import assert_close, rel_error

LENGTHS = [7, 1, 0, 2, 12, 3]
pytestmark = pytest.mark.quick


def _conv(width: int, dtype: torch.dtype = torch.float64) -> KeyConv:
    conv = KeyConv(width, 6).to(dtype)
    with torch.no_grad():
        conv.weight.copy_(hidden(width, seed=3, width=6, dtype=dtype))
    return conv


def _by_definition(k_TC: torch.Tensor, weight_WC: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """torch's grouped convolution, document by document."""
    parts = []
    for k in k_TC.split(lengths):
        kernel = weight_WC.flip(0).T[:, None, :]
        padded = F.pad(k.T, (len(weight_WC) - 1, 0))[None]
        mixed = F.conv1d(padded, kernel, groups=k.shape[1])[0].T if len(k) else k
        parts.append(k + F.silu(mixed))
    return torch.cat(parts)


@pytest.mark.parametrize("width", [3, 5])
def test_key_conv_equals_torch_conv1d_per_document_with_gradients(width):
    conv = _conv(width)
    k_TC = hidden(sum(LENGTHS), width=6, dtype=torch.float64).requires_grad_()
    weight_WC = conv.weight.detach().clone().requires_grad_()
    out, expected = conv(k_TC, Packing.from_lengths(LENGTHS)), _by_definition(k_TC, weight_WC, LENGTHS)
    assert_close(out, expected)
    upstream = hidden(sum(LENGTHS), seed=4, width=6, dtype=torch.float64)
    grad_k, grad_weight = torch.autograd.grad(out, [k_TC, conv.weight], upstream)
    expected_k, expected_weight = torch.autograd.grad(expected, [k_TC, weight_WC], upstream)
    assert_close(grad_k, expected_k)
    assert_close(grad_weight, expected_weight)


@pytest.mark.parametrize("width", [3, 5])
def test_nothing_crosses_a_document_or_comes_from_the_future(width):
    conv, packing = _conv(width), Packing.from_lengths(LENGTHS)
    k_TC = hidden(sum(LENGTHS), width=6, dtype=torch.float64)
    before = conv(k_TC, packing)
    changed = k_TC.clone()
    changed[12:15] = float("nan")
    after = conv(changed, packing)
    moved = (after != before).any(-1)
    assert torch.equal(moved.nonzero()[:, 0], torch.arange(12, min(15 + width - 1, 22)))


@pytest.mark.parametrize("width", [3, 5])
def test_zero_weights_are_the_identity_with_a_gradient(width):
    conv = KeyConv(width, 6)
    torch.nn.init.zeros_(conv.weight)
    k_TC = hidden(9, width=6)
    out = conv(k_TC, Packing.from_lengths([9]))
    assert torch.equal(out, k_TC)
    out.sum().backward()
    assert conv.weight.grad is not None
    assert bool((conv.weight.grad != 0).all())


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("chunks", [[[4, 1, 0], [1, 0, 2], [2, 6, 3]], [[0, 0, 0], [7, 7, 5]], [[1, 1, 1]] * 6])
def test_calls_that_pass_the_tail_on_equal_one_call(width, chunks):
    conv = _conv(width)
    lengths = [sum(chunk[n] for chunk in chunks) for n in range(3)]
    k_TC = hidden(sum(lengths), width=6, dtype=torch.float64)
    expected = conv(k_TC, Packing.from_lengths(lengths)).split(lengths)
    keys = k_TC.split(lengths)
    tail_NWC = torch.zeros(3, width - 1, 6, dtype=torch.float64)
    done = [0, 0, 0]
    for chunk in chunks:
        packing = Packing.from_lengths(chunk)
        part = torch.cat([keys[n][done[n] : done[n] + chunk[n]] for n in range(3)])
        out = conv(part, packing, tail_NWC).split(chunk)
        tail_NWC = conv.next_tail(part, tail_NWC, packing)
        for n in range(3):
            assert torch.equal(out[n], expected[n][done[n] : done[n] + chunk[n]])
            done[n] += chunk[n]
    last = [F.pad(k, (0, 0, width - 1, 0))[-(width - 1) :] for k in keys]
    assert torch.equal(tail_NWC, torch.stack(last))


def test_a_mixer_with_zero_key_conv_is_the_plain_one_and_then_learns():
    packing, x_TD = Packing.from_lengths([20, 12]), hidden(32)
    plain = make_mixer(MoBAConfig(block_size=4, top_k=2))
    convolved = make_mixer(MoBAConfig(block_size=4, top_k=2, key_conv=5))
    assert set(dict(convolved.named_parameters())) - set(dict(plain.named_parameters())) == {"key_conv.weight"}
    convolved.load_state_dict({**plain.state_dict(), "key_conv.weight": torch.zeros(5, 16)})
    y_plain, grads_plain = run_with_grads(plain, x_TD, context(packing))
    y_conv, grads_conv = run_with_grads(convolved, x_TD, context(packing))
    assert torch.equal(y_plain, y_conv)
    assert_close(grads_conv["q_proj.weight"], grads_plain["q_proj.weight"])
    assert float(grads_conv["key_conv.weight"].norm()) > 0
    with torch.no_grad():
        convolved.key_conv.weight.fill_(0.5)
    assert rel_error(convolved(x_TD, context(packing)).y_TD, y_plain) > 1e-2


@pytest.mark.parametrize("key_conv", [3, 5])
def test_every_mixer_convolves_its_keys_alike(key_conv):
    """Where all keys are visible the mixers are one function of the same parameters, gradients included."""
    packing, x_TD = Packing.from_lengths([20, 12]), hidden(32, dtype=torch.float64)
    configs = [
        FullAttentionConfig(key_conv=key_conv),
        SlidingWindowConfig(window=32, key_conv=key_conv),
        MoBAConfig(block_size=8, top_k=3, key_conv=key_conv),
    ]
    mixers = [make_mixer(config, dtype=torch.float64) for config in configs]
    y_full, grads_full = run_with_grads(mixers[0], x_TD, context(packing))
    plain = FullAttentionConfig().build(mixers[0].shape).double()
    plain.load_state_dict({name: p for name, p in mixers[0].state_dict().items() if name != "key_conv.weight"})
    assert rel_error(plain(x_TD, context(packing)).y_TD, y_full) > 1e-2
    keys_TGK = mixers[0].project(x_TD, context(packing))[1]
    for mixer in mixers[1:]:
        assert torch.equal(mixer.project(x_TD, context(packing))[1], keys_TGK)
        y_TD, grads = run_with_grads(mixer, x_TD, context(packing))
        assert_close(y_TD, y_full, 1e-9)
        assert grads.keys() == grads_full.keys()
        for name, grad in grads_full.items():
            assert_close(grads[name], grad, 1e-9, name)


@pytest.mark.parametrize("steps", [[[0, 1]] + [[1, 1]] * 9, [[1, 2]] + [[1, 1]] * 8, [[6, 3], [2, 4], [1, 0], [0, 2]]])
@pytest.mark.parametrize(
    "config",
    [FullAttentionConfig(key_conv=3), FullAttentionConfig(key_conv=5), SlidingWindowConfig(window=4, key_conv=3)],
)
def test_prefill_and_decode_of_dense_mixers_equal_the_whole_forward(config, steps):
    lengths = [sum(step[n] for step in steps) for n in range(2)]
    model, sequences = TinyModel([config, config]), tokens(*lengths)
    for n, expected_TD in enumerate(whole(model, sequences)):
        assert_close(run_in_steps(model, sequences, steps)[n], expected_TD, 1e-5, f"sequence {n}")
