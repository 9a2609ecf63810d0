"""The kernel of block means against their definition: odd lengths, packing, strides, and what must not spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pithwood.ops import Packing, summarise
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS, on_device
from tests.ops.reference import make_inputs

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("block", "dim"), [(16, 16), (24, 40), (1, 64), (80, 256)])
@pytest.mark.parametrize("lengths", [[0, 5, 16, 0, 1, 27, 0], [90], [0, 0], []])
def test_the_means_are_those_of_the_definition(dtype, block, dim, lengths):
    inputs = on_device(make_inputs(lengths, kv_heads=2, dim=dim, dtype=dtype))
    ref, fast = (summarise(inputs.k, inputs.packing, block, impl=impl) for impl in ("ref", "triton"))
    assert fast.dtype == torch.float32
    assert_close(fast, ref, 1e-6)
    used = sum(-(-length // block) for length in lengths)
    assert torch.count_nonzero(fast[used:]) == 0
    assert summarise(inputs.k, inputs.packing, block, dtype=dtype, impl="triton").dtype == dtype


def test_a_block_has_the_same_digits_alone_and_packed():
    inputs = on_device(make_inputs([70, 33, 70]))
    packed = summarise(inputs.k, inputs.packing, 16, impl="triton")
    alone = summarise(inputs.k[70:103], Packing.from_lengths([33], device=DEVICE), 16, impl="triton")
    assert torch.equal(packed[5:8], alone[:3])


def test_a_nan_key_spoils_its_own_block_alone():
    inputs = on_device(make_inputs([40, 8]))
    inputs.k[17] = float("nan")
    bad = summarise(inputs.k, inputs.packing, 8, impl="triton").isnan().flatten(1).any(1)
    assert bad.nonzero().flatten().tolist() == [2]


def test_keys_of_a_fused_projection_need_no_copy():
    fused = torch.randn(50, 6, 32, device=DEVICE)
    packing = Packing.from_lengths([50], device=DEVICE)
    strided = summarise(fused[:, 2:4, ::2], packing, 8, impl="triton")
    # a kernel compiled for unit strides may add in another order
    assert_close(strided, summarise(fused[:, 2:4, ::2].contiguous(), packing, 8, impl="triton"))


def test_more_documents_than_a_program_counts_at_a_time():
    from pithwood.ops.offsets_triton import block_offsets

    packing = Packing.from_lengths([index % 5 for index in range(2100)], device=DEVICE)
    assert torch.equal(block_offsets(packing.cu_k, 2).long(), packing.unit_offsets(2))


def test_a_head_has_the_same_digits_whatever_the_number_of_heads():
    inputs = on_device(make_inputs([70, 33], kv_heads=5))
    together = summarise(inputs.k, inputs.packing, 16, impl="triton")
    for head in range(5):
        alone = summarise(inputs.k[:, head : head + 1], inputs.packing, 16, impl="triton")
        assert torch.equal(alone, together[:, head : head + 1])


def test_unused_offsets_at_the_end():
    inputs = on_device(make_inputs([30, 50]))
    cu = torch.tensor([0, 30, 80, 80, 80], dtype=torch.int32, device=DEVICE)
    padded = summarise(inputs.k, replace(inputs.packing, cu_q=cu, cu_k=cu), 8, impl="triton")
    assert torch.equal(padded[:11], summarise(inputs.k, inputs.packing, 8, impl="triton")[:11])


def test_it_refuses_fp64_and_is_known_to_the_compiler():
    from pithwood.ops.summarise.triton import summarise_mean

    inputs = on_device(make_inputs([40]))
    with pytest.raises(ValueError, match=r"fp32, fp16 and bf16, got torch\.float64; use impl='torch'"):
        summarise(inputs.k.double(), inputs.packing, 8, impl="triton")
    args = (inputs.k, inputs.packing.cu_k, None, 8, 6)
    torch.library.opcheck(summarise_mean.op, args, test_utils=("test_schema", "test_faketensor"))
