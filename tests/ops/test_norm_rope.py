"""Norm per head and rotation: every implementation against the definition, gradients included."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.norm_rope import norm_rope
from pithwood.ops.rope import Rope
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

pytestmark = [pytest.mark.usefixtures("poison")]

SHAPES = [(37, 4, 2, 16), (5, 3, 1, 24), (1, 1, 1, 2), (0, 2, 1, 8), (70, 2, 2, 128)]


def make(shape=(37, 4, 2, 16), dtype=torch.float32, norm=True, rotate=True, device="cpu"):
    """(arguments of norm_rope, leaves that want gradients, gradients of the results)."""
    tokens, heads, kv_heads, dim = shape
    sizes = (tokens, heads, dim), (tokens, kv_heads, dim)
    q, k = (torch.randn(size, dtype=torch.float64).to(dtype).to(device).requires_grad_() for size in sizes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.randn(dim, dtype=wide, device=device).requires_grad_() if norm else None for _ in range(2)]
    rope = Rope.from_positions(torch.arange(tokens, device=device), dim, 1e4) if rotate else None
    upstream = [torch.randn(size, dtype=torch.float64).to(dtype).to(device) for size in sizes]
    return (q, k, *weights, 1e-6, rope), [x for x in (q, k, *weights) if x is not None], upstream


def compare(impl, args, leaves, upstream):
    """Values and gradients of `impl` against "ref"."""
    found, expected = (norm_rope(*args, impl=name) for name in (impl, "ref"))
    for out, want in zip(found, expected, strict=True):
        assert out.dtype == args[0].dtype
        assert_close(out, want)
    grads, wanted = (torch.autograd.grad(outs, leaves, upstream) for outs in (found, expected))
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == want.dtype
        assert_close(grad, want, 1e-2 if args[0].dtype == torch.float16 else None)


@pytest.mark.quick
@pytest.mark.parametrize(("norm", "rotate"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_two_ops_one_after_the_other_are_the_definition(dtype, norm, rotate):
    args, leaves, upstream = make(dtype=dtype, norm=norm, rotate=rotate)
    if dtype == torch.float64 and rotate:
        args = (*args[:5], Rope(args[5].cos_TK.double(), args[5].sin_TK.double()))
    compare("torch", args, leaves, upstream)


@pytest.mark.quick
def test_without_norm_and_rotation_nothing_happens():
    (q, k, *_), _, _ = make()
    assert norm_rope(q, k, None, None, 1e-6, None) == (q, k)


@pytest.mark.quick
def test_arguments_that_do_not_fit_are_refused_in_words():
    (q, k, weight, other, eps, rope), _, _ = make()
    with pytest.raises(ValueError, match="give both weights or None for both"):
        norm_rope(q, k, weight, None, eps, rope)
    with pytest.raises(ValueError, match=r"weight must be \[16\], got \(8,\)"):
        norm_rope(q, k, weight[:8], other, eps, rope)
    with pytest.raises(ValueError, match=r"angles for \(36, 16\); q needs \(37, 16\)"):
        norm_rope(q, k, weight, other, eps, Rope(rope.cos_TK[1:], rope.sin_TK[1:]))
    with pytest.raises(ValueError, match="share head dim and dtype"):
        norm_rope(q, k.double(), weight, other, eps, rope)
    with pytest.raises(ValueError, match="k has 36 rows but the packing describes 37"):
        norm_rope(q, k[1:], weight, other, eps, rope)
    with pytest.raises(ValueError, match="even head dim, got 15; use impl='torch'"):
        norm_rope(q[..., :15], k[..., :15], weight[:15], other[:15], eps, None, impl="triton")


class TestKernel:
    """On a GPU, or in the interpreter."""

    pytestmark = KERNEL_MARKS

    @pytest.mark.parametrize(("norm", "rotate"), [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    def test_values_and_gradients_are_those_of_the_definition(self, dtype, shape, norm, rotate):
        compare("triton", *make(shape, dtype, norm, rotate, DEVICE))

    def test_views_into_a_fused_projection_need_no_copy(self):
        (_, _, *rest), _, _ = make(device=DEVICE)
        fused = torch.randn(37, 8, 16, device=DEVICE)
        q, k = fused[:, :4].requires_grad_(), fused[:, 4:6].requires_grad_()
        upstream = [torch.randn(16, 37, 4, device=DEVICE).permute(1, 2, 0), torch.randn(37, 2, 16, device=DEVICE)]
        compare("triton", (q, k, *rest), [q, k], upstream)

    def test_gradients_repeat_to_the_last_digit(self):
        args, leaves, upstream = make((300, 4, 2, 16), device=DEVICE)
        first, again = (torch.autograd.grad(norm_rope(*args, impl="triton"), leaves, upstream) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)

    def test_a_nan_head_spoils_itself_alone(self):
        (q, k, *rest), _, _ = make(device=DEVICE)
        with torch.no_grad():
            q[17, 2] = float("nan")
        found_q, found_k = norm_rope(q, k, *rest, impl="triton")
        assert found_q.isnan().any(2).nonzero().tolist() == [[17, 2]]
        assert not found_k.isnan().any()

    def test_the_kernels_are_known_to_the_compiler(self):
        from pithwood.ops.norm_rope.triton import norm_rope_backward, norm_rope_forward

        (q, k, q_weight, k_weight, eps, rope), _, _ = make(device=DEVICE)
        plain = [x.detach() for x in (q, k, q_weight, k_weight)]
        tests, tail = ("test_schema", "test_faketensor"), (rope.cos_TK, rope.sin_TK, eps)
        torch.library.opcheck(norm_rope_forward.op, (*plain, *tail), test_utils=tests)
        torch.library.opcheck(norm_rope_backward.op, (*plain[:2], *plain, *tail), test_utils=tests)
