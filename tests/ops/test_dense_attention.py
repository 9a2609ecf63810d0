"""Full and sliding-window attention against fp64 masks: lengths, windows, sinks, gradients, leaks and memory."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import Packing, dense_attention, merge
from pithwood.ops.dense_attention import banded, dense_attention_backward
from pithwood.ops.dense_attention.cudnn import batch_lengths, equal_length
from pithwood.ops.dense_attention.fa4 import installed
from tests.numerics import assert_close, rel_error
from tests.ops.reference import assert_lse_close, attention, dense_masks, gradients, make_inputs

pytestmark = pytest.mark.usefixtures("poison")
SELF = [0, 1, 37, 0, 70, 5, 0]
CROSS = ([7, 30, 0, 9, 1, 3, 0], [20, 12, 4, 9, 17, 0, 0])


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("lengths", [(SELF, None), CROSS, ([1, 1], [9, 1])], ids=["self", "cross", "decode"])
@pytest.mark.parametrize("need_lse", [False, True])
def test_output_lse_and_gradients_follow_the_mask(impl, window, lengths, need_lse):
    inputs = make_inputs(*lengths, heads=4, kv_heads=2, dtype=torch.float64)
    expected = attention(*inputs, dense_masks(inputs.packing, 4, window))
    o, lse = dense_attention(*inputs, window=window, need_lse=need_lse, impl=impl)
    assert_close(o, expected[0])
    assert (lse is not None) == need_lse
    found = gradients(o, lse, inputs[:3])
    wanted = gradients(expected[0], expected[1] if need_lse else None, inputs[:3])
    for name, a, b in zip("qkv", found, wanted, strict=True):
        # window=1 has a constant softmax: the gradients of q and k are zero up to cancellation
        assert (a - b).norm() <= 1e-12 * max(float(b.norm()), 1.0), name
    if lse is not None:
        assert_lse_close(lse, expected[1])


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("need_lse", [False, True])
def test_bidirectional_attention_sees_the_whole_document(impl, need_lse):
    inputs = make_inputs(*CROSS, heads=2, value_dim=8, dtype=torch.float64, causal=False)
    expected = attention(*inputs, dense_masks(inputs.packing, 2))
    o, lse = dense_attention(*inputs, need_lse=need_lse, impl=impl)
    assert_close(o, expected[0])
    wanted = gradients(expected[0], expected[1] if need_lse else None, inputs[:3])
    for a, b in zip(gradients(o, lse, inputs[:3]), wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("window", [None, 9])
def test_a_sink_takes_its_share_and_its_gradient(window):
    inputs = make_inputs([40, 21], heads=4, kv_heads=2, value_dim=8, dtype=torch.float64)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = attention(*inputs, dense_masks(inputs.packing, 4, window), sink_H=sink)
    o, lse = dense_attention(*inputs, window=window, sink_H=sink, need_lse=True)
    assert_close(o, expected[0])
    assert_close(lse, expected[1])
    leaves = [*inputs[:3], sink]
    for a, b in zip(gradients(o, lse, leaves), gradients(*expected, leaves), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dim", [32, 80])
def test_low_precision_keeps_its_tolerance(dtype, window, dim):
    inputs = make_inputs([150, 40], heads=4, kv_heads=1, dim=dim, dtype=dtype)
    expected = attention(*inputs, dense_masks(inputs.packing, 4, window))
    o, _ = dense_attention(*inputs, window=window)
    assert o.dtype == dtype
    assert_close(o, expected[0], {torch.float32: 1e-5}.get(dtype, 2e-2))
    for a, b in zip(gradients(o, None, inputs[:3]), gradients(expected[0], None, inputs[:3]), strict=True):
        assert_close(a, b, {torch.float32: 1e-5}.get(dtype, 2e-2))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("need_lse", [False, True])
def test_documents_do_not_see_each_other_in_any_digit(window, need_lse):
    inputs = make_inputs([300, 41, 300], heads=2)

    def run(q, k, v, packing):
        o, lse = dense_attention(q, k, v, packing, window=window, need_lse=need_lse)
        return [o, *gradients(o, lse if need_lse else None, (q, k, v))]

    packed = run(*inputs)
    changed = [x.detach().clone() for x in inputs[:3]]
    for x in changed:
        x[300:341] = torch.randn(41, *x.shape[1:])
    for x in changed:
        x.requires_grad_()
    for a, b in zip(packed, run(*changed, inputs.packing), strict=True):
        assert torch.equal(a[:300], b[:300])
        assert torch.equal(a[341:], b[341:])
        assert not torch.equal(a[300:341], b[300:341])
    alone = run(*(x[300:341].detach().requires_grad_() for x in inputs[:3]), Packing.from_lengths([41]))
    assert torch.equal(alone[0], packed[0][300:341])


@pytest.mark.parametrize("window", [None, 20])
def test_a_later_token_changes_nothing_before_it(window):
    inputs = make_inputs([200], heads=2)
    before, lse = dense_attention(*inputs, window=window, need_lse=True)
    with torch.no_grad():
        for x in inputs[:3]:
            x[120] += 1.0
    after, lse_after = dense_attention(*inputs, window=window, need_lse=True)
    assert torch.equal(before[:120], after[:120])
    assert torch.equal(lse[:120], lse_after[:120])
    assert not torch.equal(before[120], after[120])
    if window is not None:
        assert torch.equal(before[140:], after[140:])


def test_no_intermediate_is_larger_than_one_chunk(monkeypatch):
    """A packing of many documents, and a window over a long one, never need scores of T x T."""
    largest = 0
    original = banded._scores

    def watched(*args):
        nonlocal largest
        scores = original(*args)
        largest = max(largest, scores.numel())
        return scores

    monkeypatch.setattr(banded, "_scores", watched)
    inputs = make_inputs([3000, 500], heads=1, dim=8)
    dense_attention(*inputs, window=50)
    assert 0 < largest <= 2 * banded.MOST_ROWS * (50 + banded.MOST_ROWS)
    dense_attention(*inputs, need_lse=True)
    assert largest <= 3500 * banded.MOST_ROWS


def test_scale_is_applied_and_huge_logits_stay_finite():
    inputs = make_inputs([50], heads=2)
    expected = attention(*inputs, dense_masks(inputs.packing, 2), scale=30.0)
    for need_lse in (False, True):
        o, _ = dense_attention(*inputs, scale=30.0, need_lse=need_lse)
        assert rel_error(o, expected[0]) < 1e-4


def test_bad_arguments_are_refused_with_what_is_allowed():
    inputs = make_inputs([16], heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="window=0"):
        dense_attention(*inputs, window=0)
    with pytest.raises(ValueError, match="window=3 needs a causal packing"):
        dense_attention(*inputs[:3], Packing.from_lengths([16], causal=False), window=3)
    with pytest.raises(ValueError, match="'ref', 'torch', 'varlen', 'cudnn', 'fa4'"):
        dense_attention(*inputs, impl="flash")
    for impl in ("varlen", "cudnn", "fa4"):
        with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; use impl='torch'"):
            dense_attention(*inputs, impl=impl)
    with pytest.raises(ValueError, match="one logit per query head"):
        dense_attention(*inputs, sink_H=torch.zeros(3))
    with pytest.raises(ValueError, match="share a dtype"):
        dense_attention(inputs.q.double(), *inputs[1:])
    with pytest.raises(ValueError, match="15 rows but the packing describes 16"):
        dense_attention(inputs.q[:15], *inputs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "fa4"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [([300, 0, 41, 700], None), ([30, 1, 41], [300, 200, 20])])
def test_packed_kernels_on_the_gpu_agree_with_fp64(window, lengths, impl):
    if impl == "fa4" and not installed():
        pytest.skip("needs the package flash-attn-4")
    check_on_gpu(make_inputs(*lengths, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16), impl, window)


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "heads", "dim"), [([256] * 3, 4, 64), ([700], 8, 128), ([65, 65], 2, 128)])
def test_documents_of_one_length_by_cudnn_agree_with_fp64(lengths, heads, dim):
    check_on_gpu(make_inputs(lengths, heads=heads, kv_heads=2, dim=dim, dtype=torch.bfloat16), "cudnn", None)


def check_on_gpu(inputs, impl, window):
    """Output, gradients and log-sum of an implementation against fp64."""
    expected = attention(*inputs, dense_masks(inputs.packing, inputs.q.shape[1], window))
    wanted = gradients(expected[0], None, inputs[:3])
    q, k, v = (x.detach().cuda().requires_grad_() for x in inputs[:3])
    packing = inputs.packing.to("cuda")
    o, _ = dense_attention(q, k, v, packing, window=window, impl=impl)
    assert_close(o, expected[0], 2e-2)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((o.double() * weight.cuda()).sum(), (q, k, v)), wanted, strict=True):
        assert_close(a, b, 2e-2)
    with torch.no_grad():
        _, lse = dense_attention(q, k, v, packing, window=window, need_lse=True, impl=impl)
    assert_lse_close(lse.cpu(), expected[1], 1e-2)


def test_documents_of_one_length_are_known_without_reading_offsets():
    assert equal_length(Packing.from_lengths([64, 64])) == 64
    assert equal_length(Packing.from_lengths([64, 63])) is None
    assert equal_length(Packing.from_lengths([64, 64], max_q=128)) is None
    assert equal_length(Packing.from_lengths([64, 64, 0])) is None
    assert equal_length(Packing.from_lengths([64], [64])) is None
    assert equal_length(Packing.from_lengths([])) is None


def in_two_parts(dtype: torch.dtype, device: str = "cpu", tokens: int = 40) -> tuple:
    """(q, k, v, grad_o) of the later of two equal runs of tokens of one document, with the keys of both; its own
    packing, and the one of all its queries and the keys before them."""
    torch.manual_seed(0)
    q, grad = torch.randn(2, tokens, 4, 32, device=device, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 2 * tokens, 2, 32, device=device, dtype=torch.float64).to(dtype)
    own = Packing.from_lengths([tokens], device=device)
    before = Packing.from_lengths([tokens], [tokens], causal=False, device=device)
    return (q, k, v, grad), own, before


def gradients_of_parts(dtype, impl, device="cpu", tokens=40):
    """(dq, dk, dv) from two parts that know the whole's output and log-sum, and those of the whole in fp64."""
    (q, k, v, grad), own, before = in_two_parts(dtype, device, tokens)
    sides = (slice(0, tokens), before), (slice(tokens, None), own)
    pieces = [dense_attention(q, k[keys], v[keys], packing, need_lse=True, impl=impl) for keys, packing in sides]
    o, lse = merge(pieces)
    parts = [dense_attention_backward(grad, q, k[keys], v[keys], o, lse, packing, impl=impl) for keys, packing in sides]
    (dq0, dk0, dv0), (dq1, dk1, dv1) = parts
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    whole, _ = dense_attention(*leaves, Packing.from_lengths([tokens], [2 * tokens], device=device), impl="torch")
    whole.backward(grad.double())
    return (dq0 + dq1, torch.cat([dk0, dk1]), torch.cat([dv0, dv1])), [leaf.grad for leaf in leaves]


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(impl):
    for found, expected in zip(*gradients_of_parts(torch.float64, impl), strict=True):
        assert_close(found, expected)


@pytest.mark.quick
def test_a_backward_pass_refuses_what_does_not_belong_to_its_queries():
    (q, k, v, grad), own, _ = in_two_parts(torch.float32)
    with pytest.raises(ValueError, match="must have q's"):
        dense_attention_backward(grad, q, k[:40], v[:40], grad, torch.zeros(40, 2), own)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        dense_attention_backward(grad, q, k[:40], v[:40], grad, torch.zeros(40, 4), own, impl="cudnn")


@pytest.mark.quick
def test_rectangles_without_a_mask_are_batches_for_cudnn():
    assert batch_lengths(Packing.from_lengths([5], [9], causal=False), 9) == (5, 9)
    assert batch_lengths(Packing.from_lengths([5, 5], [9, 9], causal=False), 18) == (5, 9)
    assert batch_lengths(Packing.from_lengths([7, 7]), 14) == (7, 7)
    # its mask would begin at the first key
    assert batch_lengths(Packing.from_lengths([5], [9]), 9) is None
    assert batch_lengths(Packing.from_lengths([5, 4], [9, 9], causal=False), 18) is None


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "cudnn", None])
@pytest.mark.parametrize("tokens", [512, 1000])
def test_kernels_give_the_gradients_of_a_part_from_the_wholes_log_sum(impl, tokens):
    for found, expected in zip(*gradients_of_parts(torch.bfloat16, impl, "cuda", tokens), strict=True):
        assert_close(found, expected, 1e-2)
