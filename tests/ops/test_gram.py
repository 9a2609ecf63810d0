"""Symmetric products against their definition: shapes, edges, scales, and what is refused."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.gram import gram, gram_polynomial
from tests.numerics import REL_ERROR, assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, ON_GPU

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]

DTYPES = [dtype for dtype in KERNEL_DTYPES if not ON_GPU or dtype != torch.float32]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = [(3, 40, 64), (2, 200, 48), (1, 136, 136), (2, 264, 520), (1, 8, 16)]


def matrices(shape: tuple[int, ...], dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def gram_matrices(num: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(num, size, size, dtype=torch.float64)
    return (x @ x.mT / (4 * size)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_matrices_are_those_of_the_definition(shape, dtype, impl):
    x = matrices(shape, dtype)
    scale = torch.rand(shape[0], device=DEVICE) + 0.5
    for scale_M in (None, scale):
        found = gram(x, scale_M=scale_M, impl=impl)
        assert found.dtype == dtype
        assert_close(found, gram(x.double(), scale_M=scale_M, impl="ref"), REL_ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_writes_symmetric_matrices(shape, dtype):
    found = gram(matrices(shape, dtype) / shape[2], impl="triton")
    assert torch.equal(found, found.mT)
    poly = gram_polynomial(found, 3.4, -4.8, 2.0, impl="triton")
    assert torch.equal(poly, poly.mT)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 40, 136, 264])
def test_polynomials_are_those_of_the_definition(size, dtype, impl):
    g = gram_matrices(2, size, dtype)
    for scale_M in (None, torch.rand(2, device=DEVICE) + 0.5):
        expected = gram_polynomial(g.double(), 3.4, -4.8, 2.0, scale_M=scale_M, impl="ref")
        assert_close(gram_polynomial(g, 3.4, -4.8, 2.0, scale_M=scale_M, impl=impl), expected, REL_ERROR[dtype])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("tile", [(64, 64, 32), (64, 128, 32), (128, 256, 64)])
def test_tiles_of_other_shapes_cover_the_same_matrix(tile, flatten, monkeypatch):
    from pithwood.ops.gram import triton as kernels

    tiling = kernels.Tiling(*tile, warps=8, stages=2, programs_per_sm=1, flatten=flatten)
    monkeypatch.setattr(kernels, "GRAM", tiling)
    monkeypatch.setattr(kernels, "POLYNOMIAL", tiling)
    for shape in ((3, 40, 64), (2, 400, 328), (1, 136, 72)):
        x = matrices(shape) / shape[1]
        found = gram(x, impl="triton")
        assert_close(found, gram(x, impl="ref"), REL_ERROR[DTYPE])
        assert_close(gram_polynomial(found, 1.0, 0.5, 0.1, impl="triton"), gram_polynomial(found, 1.0, 0.5, 0.1))


def test_a_matrix_of_nan_spoils_no_other():
    x = matrices((3, 40, 64))
    x[1] = float("nan")
    found = gram(x, impl="triton")
    assert found[1].isnan().all()
    assert not found[::2].isnan().any()


def test_results_are_written_where_they_are_wanted():
    x = matrices((2, 40, 64))
    for impl in ("ref", "torch", "triton"):
        out = torch.empty(2, 40, 40, dtype=DTYPE, device=DEVICE)
        assert gram(x, out_MKK=out, impl=impl) is out
        assert_close(out, x @ x.mT)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 16 bytes.*use impl='torch'"):
        gram(matrices((2, 5, 6)), impl="triton")
    with pytest.raises(ValueError, match=r"contiguous stacks.*use impl='torch'"):
        gram(matrices((2, 16, 8)).mT, impl="triton")
    if ON_GPU:
        with pytest.raises(ValueError, match="on a GPU kernels take fp16 and bf16"):
            gram(matrices((2, 8, 8), torch.float32), impl="triton")
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        gram(matrices((2, 8, 8)).double(), impl="triton")
    with pytest.raises(ValueError, match=r"stacks of matrices \[M, R, C\], got \(4, 8\)"):
        gram(matrices((4, 8)))
    with pytest.raises(ValueError, match="c other than 0"):
        gram_polynomial(matrices((2, 8, 8)), 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="square matrices"):
        gram_polynomial(matrices((2, 4, 8)), 1.0, 1.0, 1.0)
