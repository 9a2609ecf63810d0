"""MoBA end to end: its equivalences, fp64 parity with free routing, the plain-tensor op, memory at 32K tokens."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import pithwood
from pithwood.ops import dense_attention, moba_attention, select, summarise
from tests.numerics import assert_close
from tests.ops.reference import attention, dense_masks, gradients, make_inputs, masks_of_ids, selected

LENGTHS = [1, 2, 15, 16, 17, 47, 48, 49, 113, 128]


def _moba(inputs, **options):
    return moba_attention(*inputs[:3], cu_seqlens=inputs.packing.cu_q, return_lse=True, **options)


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enough_blocks_give_dense_causal_attention_with_its_gradients(impl, dtype):
    inputs = make_inputs(LENGTHS, heads=4, kv_heads=2, dtype=dtype)
    expected = attention(*inputs, dense_masks(inputs.packing, 4))
    o, lse = _moba(inputs, block_size=16, top_k=8, impl=impl)
    assert_close(o, expected[0])
    assert_close(lse, expected[1], 1e-2 if dtype == torch.bfloat16 else None)
    for a, b in zip(gradients(o, lse, inputs[:3]), gradients(*expected, inputs[:3]), strict=True):
        assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_top_k_1_is_block_local_attention(impl):
    inputs = make_inputs(LENGTHS, heads=2)
    o, lse = _moba(inputs, block_size=16, top_k=1, impl=impl)
    pieces = [min(16, length - i) for length in LENGTHS for i in range(0, length, 16)]
    local = inputs._replace(packing=inputs.packing.from_lengths(pieces))
    expected = attention(*local, dense_masks(local.packing, 2))
    assert_close(o, expected[0])
    assert_close(lse, expected[1])
    for a, b in zip(gradients(o, lse, inputs[:3]), gradients(*expected, inputs[:3]), strict=True):
        assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["input", "fp32", "centered"])
def test_free_routing_agrees_with_fp64_outside_near_ties(dtype, mode):
    inputs = make_inputs([150, 0, 97, 1], heads=4, kv_heads=2, dtype=dtype)
    ids, gap = selected(inputs.q, inputs.k, inputs.packing, 16, 3, mode)
    found = select(inputs.q, summarise(inputs.k, inputs.packing, 16), inputs.packing, 3, block_size=16, mean_dtype=mode)
    differ = (found.ids != ids).any(-1)
    assert not (differ & (gap >= 1e-5)).any()
    assert differ.double().mean() <= 0.005
    expected = attention(*inputs, masks_of_ids(found.ids, 16, inputs.packing))
    o, lse = _moba(inputs, block_size=16, top_k=3, mean_dtype=mode)
    assert_close(o, expected[0])
    for a, b in zip(gradients(o, lse, inputs[:3]), gradients(*expected, inputs[:3]), strict=True):
        assert_close(a, b, 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_topk_without_the_current_block_means_one_more(top_k):
    inputs = make_inputs([120], heads=2)
    without, _ = _moba(inputs, block_size=16, top_k=top_k, topk_includes_current=False)
    assert torch.equal(without, _moba(inputs, block_size=16, top_k=top_k + 1)[0])


def test_a_batch_is_packed_and_unpacked():
    q, k, v = torch.randn(3, 70, 4, 16), torch.randn(3, 70, 2, 16), torch.randn(3, 70, 2, 8)
    o, lse = moba_attention(q, k, v, block_size=16, top_k=2, return_lse=True)
    assert o.shape == (3, 70, 4, 8)
    assert lse.shape == (3, 70, 4)
    for n in range(3):
        assert torch.equal(o[n], moba_attention(q[n], k[n], v[n], block_size=16, top_k=2))
    last = moba_attention(q[:, -5:], k, v, block_size=16, top_k=2)
    assert_close(last, o[:, -5:], 1e-6)


def test_offsets_of_keys_may_differ_from_those_of_queries():
    q, k, v = torch.randn(30, 2, 16), torch.randn(90, 1, 16), torch.randn(90, 1, 16)
    cu_q, cu_k = torch.tensor([0, 10, 10, 30]), torch.tensor([0, 40, 50, 90])
    o = moba_attention(q, k, v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, block_size=16, top_k=2)
    alone = moba_attention(q[:10], k[:40], v[:40], block_size=16, top_k=2)
    assert torch.equal(o[:10], alone)


@pytest.mark.quick
def test_a_module_with_full_attention_equals_moba_that_sees_everything_at_any_switch():
    """What a run that switches from sparse to full attention relies on: at k >= n they are one function."""
    inputs = make_inputs([64, 30], heads=2)
    full, _ = dense_attention(*inputs)
    sparse, _ = _moba(inputs, block_size=16, top_k=4)
    assert_close(sparse, full, 1e-6)
    for a, b in zip(gradients(sparse, None, inputs[:3]), gradients(full, None, inputs[:3]), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.quick
def test_importing_the_package_costs_no_torch_and_names_the_op():
    code = "import sys, pithwood; assert 'torch' not in sys.modules; print(pithwood.moba_attention)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert "moba_attention" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'mobb'"):
        _ = pithwood.mobb
    assert pithwood.__version__ == tomllib.loads((_root() / "pyproject.toml").read_text())["project"]["version"]


def _root() -> Path:
    return Path(pithwood.__file__).parents[1]


@pytest.mark.quick
def test_bad_arguments_are_refused_with_what_is_allowed():
    q, k = torch.randn(16, 4, 8), torch.randn(16, 2, 8)
    for options, words in (
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens must rise from 0 to 16"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 16])}, "cu_seqlens must rise from 0 to 16"),
        ({"cu_seqlens_k": torch.tensor([0, 16])}, "without cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 16.0])}, "int32 or int64"),
        (
            {"cu_seqlens": torch.tensor([0, 16]), "cu_seqlens_k": torch.tensor([0, 8, 16])},
            "2 offsets but cu_seqlens_k has 3",
        ),
        ({"top_k": 0}, "top_k=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"impl": "cuda"}, "'ref', 'torch', 'triton'"),
        ({"tie": "none"}, "'later', 'earlier'"),
    ):
        with pytest.raises(ValueError, match=words):
            moba_attention(q, k, k, **{"block_size": 4, "top_k": 2, **options})
    with pytest.raises(ValueError, match="4 query heads must be a multiple of 3 KV heads"):
        moba_attention(q, torch.randn(16, 3, 8), torch.randn(16, 3, 8), block_size=4, top_k=2)
    with pytest.raises(ValueError, match="packed 3-D inputs"):
        moba_attention(q[None], k[None], k[None], block_size=4, top_k=2, cu_seqlens=torch.tensor([0, 16]))
    with pytest.raises(ValueError, match="share the batch"):
        moba_attention(q[None], k, k, block_size=4, top_k=2)


@pytest.mark.quick
def test_arguments_of_other_types_are_refused_with_what_is_allowed():
    q, k = torch.randn(16, 4, 8), torch.randn(16, 2, 8)
    for options, words in (
        ({"cu_seqlens": [0, 16]}, "cu_seqlens must be a torch tensor, got list; give torch.as_tensor.cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 16]), "cu_seqlens_k": [0, 16]}, "cu_seqlens_k must be a torch tensor"),
        *(({"top_k": value}, "top_k must be a whole number") for value in (2.0, "3", None, torch.tensor(2), True)),
        *(({"block_size": value}, "block_size must be a whole number") for value in (8.0, "8", None, True)),
    ):
        with pytest.raises(ValueError, match=words):
            moba_attention(q, k, k, **{"block_size": 4, "top_k": 2, **options})
    with pytest.raises(ValueError, match="q must be a torch tensor, got ndarray"):
        moba_attention(q.numpy(), k, k, block_size=4, top_k=2)
    with pytest.raises(ValueError, match="must lie on one device, got cpu, meta, cpu, cpu"):
        moba_attention(q, k.to("meta"), k, block_size=4, top_k=2)
    whole = np.int64(4)
    assert torch.equal(
        moba_attention(q, k, k, block_size=whole, top_k=np.int32(2)), moba_attention(q, k, k, block_size=4, top_k=2)
    )


@pytest.mark.quick
def test_heads_before_tokens_are_refused_with_the_layout():
    q, k = torch.randn(1, 8, 64, 16), torch.randn(1, 2, 64, 16)
    for given in ((q, k, k), (q[0], k[0], k[0])):
        with pytest.raises(ValueError, match=r"q has 8 tokens and k has 2.*\[B, T, H, K\].*transpose\(1, 2\)"):
            moba_attention(*given, block_size=16, top_k=2)
    assert moba_attention(q, k, k, block_size=16, top_k=2, causal=False).shape == q.shape
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    assert moba_attention(q, k, k, block_size=16, top_k=2).shape == q.shape


MEMORY_PROBE = """
import resource, sys, torch
from pithwood import moba_attention
torch.set_num_threads(1)
tokens = int(sys.argv[1])
q, k, v = (torch.randn(tokens, h, 32, requires_grad=True) for h in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moba_attention(q, k, v, block_size=64, top_k=4).square().sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_32k_tokens_of_one_document_need_memory_linear_in_tokens():
    """A T x T mask would be 1 GiB in bool and 4 GiB in fp32 per head; this takes a bounded workspace and O(T)."""
    peaks = []
    for tokens in (8192, 32768):
        command = [sys.executable, "-c", MEMORY_PROBE, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_root())
        peaks.append(int(done.stdout))
    workspace = 200 << 20
    assert peaks[0] < workspace
    assert peaks[1] < workspace + 4 * peaks[0]
    assert peaks[1] < 500 << 20


MILLION_PROBE = """
import resource, torch
from pithwood import moba_attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1 << 20, 1, 16, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
o, lse = moba_attention(q, k, v, block_size=1024, top_k=2, return_lse=True)
o.square().sum().backward()
assert lse.isfinite().all()
assert all(x.grad.isfinite().all() for x in (q, k, v))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_document_of_a_million_tokens_fits_a_laptop():
    """Forward and backward of one head; a bool mask of T x T alone would be 1 TiB."""
    command = [sys.executable, "-c", MILLION_PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_root(), timeout=400)
    assert int(done.stdout) < 4 << 30


@pytest.mark.slow
def test_every_rung_of_long_documents_matches_the_mask():
    inputs = make_inputs([4096 + 17, 1023], heads=2, dim=64)
    o, lse = _moba(inputs, block_size=128, top_k=8)
    found = select(
        inputs.q, summarise(inputs.k, inputs.packing, 128), inputs.packing, 8, block_size=128, mean_dtype="centered"
    )
    expected = attention(*inputs, masks_of_ids(found.ids, 128, inputs.packing))
    assert_close(o, expected[0])
    for a, b in zip(gradients(o, lse, inputs[:3]), gradients(*expected, inputs[:3]), strict=True):
        assert_close(a, b)
