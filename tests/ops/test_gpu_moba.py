"""MoBA on a GPU: routing and attention by kernels against fp64 masks, over the shapes, packings and systems that count.

Errors are held against those of plain PyTorch in the same dtype: at most twice as large for outputs, three times for
gradients (the criterion of flash-attention's tests).

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, k ids per query.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pithwood.bench.reference import masked_attention, selection_errors
from pithwood.ops import Packing, Selection, attend, select, summarise
from pithwood.ops.select.means import rounded_means
from pithwood.ops.select.triton import select_blocks
from tests.ops.attending import CROSS, check_attend, moba_selection
from tests.ops.reference import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

DEVICE = "cuda"
BF16 = torch.bfloat16
MIXED = (0, 700, 1, 0, 65, 1300, 2, 128, 0)
"""Documents of no, one and many tokens, whole blocks and parts of them."""


def make(lengths, heads=4, kv_heads=2, dim=64, value_dim=None, dtype=BF16, seed=0):
    """(q, k, v, packing), leaves that want gradients."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    tokens = sum(lengths)
    leaves = [torch.randn(tokens, *size, generator=generator, device=DEVICE).to(dtype) for size in sizes]
    return *(x.requires_grad_() for x in leaves), Packing.from_lengths(list(lengths), device=DEVICE)


def like(x: Tensor, heads: int, seed: int = 1) -> Tensor:
    """A gradient of the output, for values x."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(x.shape[0], heads, x.shape[2], generator=generator, device=DEVICE).to(x.dtype)


def route(q, k, packing, block, top_k, mode="centered", **options) -> Selection:
    means = summarise(k, packing, block)
    return select(q, means, packing, top_k, block_size=block, mean_dtype=mode, **options)


def run(q, k, v, packing, selection, grad_o=None, deterministic=False) -> dict[str, Tensor]:
    """o, lse, dq, dk, dv of the kernels."""
    o, lse = attend(q, k, v, packing, selection, impl="triton", deterministic=deterministic)
    grads = torch.autograd.grad(o, (q, k, v), like(v, q.shape[1]) if grad_o is None else grad_o)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *grads), strict=True))


def check(q, k, v, packing, selection, grad_o=None, dense=False, **options) -> dict[str, Tensor]:
    """One call against fp64, errors held against those of plain PyTorch; returns what the kernels found."""
    found = run(q, k, v, packing, selection, grad_o, **options)
    grad_o = like(v, q.shape[1]) if grad_o is None else grad_o
    ids = None if dense else selection.ids
    args = (q, k, v, packing.cu_q, ids, selection.unit, grad_o)
    exact, plain = masked_attention(*args), masked_attention(*args, dtype=q.dtype)
    for name, value in found.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        error = (value.double() - exact[name]).abs().max()
        allowed = (plain[name].double() - exact[name]).abs().max()
        factor = 2 if name in ("o", "lse") else 3
        floor = 1e-5 * float(exact[name].abs().max().clamp(min=1))
        assert error <= factor * allowed + floor, f"{name}: largest error {error:.3g}, plain PyTorch's {allowed:.3g}"
        norm = exact[name].norm()
        # what every element is off by must not hide below the largest error
        share = (value.double() - exact[name]).norm() / norm.clamp(min=1e-30)
        cap = {torch.float32: 1e-4, torch.float16: 5e-3}.get(q.dtype, 2e-2)
        plain_share = float((plain[name].double() - exact[name]).norm() / norm.clamp(min=1e-30))
        # Inputs as hard as an outlier channel leave flash attention 2.4e-2 off in dq, and plain PyTorch 2e-1.
        assert norm < 1e-6 or share <= max(cap, plain_share / 4), (name, share)
    return found


def random_selection(packing: Packing, heads: int, block: int, top_k: int, seed: int = 0) -> Selection:
    """The own block of every query and up to top_k - 1 random past ones; made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    own_T = packing.position_T // block
    tokens = packing.num_queries
    ids = torch.empty(tokens, heads, top_k, dtype=torch.int32, device=DEVICE)
    for head in range(heads):
        random = torch.rand(tokens, top_k - 1, generator=generator, device=DEVICE, dtype=torch.float64)
        past = (random * own_T[:, None]).long().sort(dim=1).values
        twice = torch.cat([torch.zeros_like(past[:, :1], dtype=torch.bool), past[:, 1:] == past[:, :-1]], 1)
        past = past.masked_fill(twice | (past >= own_T[:, None]), 1 << 30)
        row = torch.cat([past, own_T[:, None]], 1).sort(dim=1).values
        ids[:, head] = row.masked_fill(row == 1 << 30, -1).int()
    return Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), block, own=True)


def row_by_row(q, k, v, ids, block, rows) -> Tensor:
    """[rows, H, V] fp64: the output of single queries of one document, from nothing but their own keys."""
    out = []
    ratio = q.shape[1] // k.shape[1]
    for t in rows:
        for head in range(q.shape[1]):
            chosen = ids[t, head][ids[t, head] >= 0].long()
            at = (chosen[:, None] * block + torch.arange(block, device=q.device)).flatten()
            at = at[at <= t]
            s = k[at, head // ratio].double() @ q[t, head].double() * q.shape[2] ** -0.5
            out.append(s.softmax(0) @ v[at, head // ratio].double())
    return torch.stack(out).view(len(rows), q.shape[1], -1)


# ---- 1, 2: equivalences and lengths


@pytest.mark.parametrize("lengths", [(300,), MIXED])
def test_enough_blocks_are_dense_causal_attention(lengths):
    q, k, v, packing = make(lengths)
    check(q, k, v, packing, route(q, k, packing, 64, 32), dense=True)


@pytest.mark.parametrize("block", [64, 128])
def test_one_block_is_block_local_attention(block):
    q, k, v, packing = make([700])
    found = run(q, k, v, packing, route(q, k, packing, block, 1))
    cut = Packing.from_lengths([block] * (700 // block) + [700 % block], device=DEVICE)
    local = masked_attention(q, k, v, cut.cu_q, None, 1, like(v, 4))
    for name, value in found.items():
        assert (value.double() - local[name]).norm() <= 1e-2 * local[name].norm(), name


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 113, 128, 191, 192, 193, 1023, 4096 + 17])
def test_every_length_around_blocks_and_tiles(length):
    q, k, v, packing = make([length], heads=2, kv_heads=1)
    check(q, k, v, packing, route(q, k, packing, 64, 3))


def test_a_block_longer_than_the_document():
    q, k, v, packing = make([100, 30])
    check(q, k, v, packing, route(q, k, packing, 4096, 2), dense=True)


# ---- 3, 4: packing and causality


@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_documents_of_all_kinds(deterministic):
    q, k, v, packing = make(MIXED, dim=128)
    check(q, k, v, packing, route(q, k, packing, 64, 3), deterministic=deterministic)


def test_many_short_documents_and_a_long_one():
    lengths = [1 + 37 * i % 90 for i in range(60)] + [3000]
    q, k, v, packing = make(lengths)
    check(q, k, v, packing, route(q, k, packing, 64, 3))


def test_nothing_leaks_from_one_document_into_another():
    q, k, v, packing = make(MIXED)
    before = run(q, k, v, packing, route(q, k, packing, 64, 3), deterministic=True)
    touched = slice(701, 766)  # the document of 65 tokens
    with torch.no_grad():
        for x in (q, k, v):
            x[touched] = float("nan")
    after = run(q, k, v, packing, route(q, k, packing, 64, 3), deterministic=True)
    for name in before:
        for part in (slice(0, 701), slice(766, None)):
            assert torch.equal(before[name][part], after[name][part]), name


def test_documents_in_another_order_give_the_same_bits():
    lengths = [700, 65, 1300]
    q, k, v, packing = make(lengths)
    grad_o = like(v, 4)
    found = run(q, k, v, packing, route(q, k, packing, 64, 3), grad_o, deterministic=True)
    pieces = [torch.arange(765, 2065), torch.arange(700), torch.arange(700, 765)]
    order = torch.cat(pieces).to(DEVICE)
    moved = [x.detach()[order].requires_grad_() for x in (q, k, v)]
    other = Packing.from_lengths([1300, 700, 65], device=DEVICE)
    selection = route(*moved[:2], other, 64, 3)
    again = run(*moved, other, selection, grad_o[order], deterministic=True)
    for name in found:
        assert torch.equal(found[name][order], again[name]), name


@pytest.mark.parametrize("u", [200, 640, 1001])
def test_a_token_changes_nothing_before_it(u):
    q, k, v, packing = make([1500])
    selection = route(q, k, packing, 64, 3)
    before = run(q, k, v, packing, selection)
    with torch.no_grad():
        for x in (q, k, v):
            x[u] += 3
    later = route(q, k, packing, 64, 3)
    same = slice(0, u // 64 * 64 + 64)
    kept = torch.ones(1500, dtype=torch.bool, device=DEVICE)
    kept[u] = False  # its own query chooses anew
    assert torch.equal(later.ids[same][kept[same]], selection.ids[same][kept[same]])
    after = run(q, k, v, packing, later)
    assert torch.equal(before["o"][:u], after["o"][:u])
    assert torch.equal(before["lse"][:u], after["lse"][:u])


# ---- 5: more keys than queries, and fewer


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_queries_and_keys_of_different_length(dtype, deterministic):
    inputs = make_inputs(*CROSS, heads=4, kv_heads=2, dtype=dtype)
    check_attend(inputs, moba_selection(inputs, 16, 3), "triton", device=DEVICE, deterministic=deterministic)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("scale", [0.3, 1e-35, 0.0, -0.2])
def test_scales_of_every_size_and_sign(scale, dim):
    inputs = make_inputs([700, 1, 0, 300], heads=4, kv_heads=2, dim=dim, dtype=BF16)
    check_attend(inputs, moba_selection(inputs, 128, 2), "triton", device=DEVICE, scale=scale)


# ---- 6: selection


@pytest.mark.parametrize("mode", ["input", "centered", "fp32"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1)])
@pytest.mark.parametrize(("block", "top_k"), [(64, 4), (128, 8), (100, 3)])
def test_the_chosen_blocks_are_right_in_fp64(mode, heads, kv_heads, block, top_k):
    q, k, _, packing = make([3000, 1, 0, 1100], heads, kv_heads, dim=128)
    ids = route(q, k, packing, block, top_k, mode).ids
    means = rounded_means(summarise(k, packing, block, impl="ref"), packing, block, mode, k.dtype)
    offsets = packing.unit_offsets(block)
    # fp32 sums of bf16 products differ from fp64 in the last bits
    assert selection_errors(ids, q.detach(), means, packing.cu_q, offsets, block, top_k, 1e-4) == 0


def test_few_slots_differ_from_the_reference():
    q, k, _, packing = make([6000], 4, 2, dim=128)
    fast = route(q, k, packing, 64, 8, "input").ids
    exact = route(q, k, packing, 64, 8, "input", impl="ref").ids
    assert (fast != exact).any(-1).double().mean() <= 0.005


def test_a_vector_common_to_all_means_changes_no_choice():
    q, k, _, packing = make([4000], 2, 2, dtype=torch.float32)
    chosen = route(q, k, packing, 64, 4, "fp32").ids
    means = summarise(k, packing, 64) + 2 * torch.randn(64, device=DEVICE)
    shifted = select(q, means, packing, 4, block_size=64, mean_dtype="centered")
    assert (shifted.ids != chosen).any(-1).double().mean() <= 0.005


@pytest.mark.parametrize("mode", ["centered", "input"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 16, 64), (12, 4, 64), (32, 4, 128)])
def test_short_documents_choose_by_their_kernel_what_the_gate_chooses(heads, kv_heads, dim, mode):
    for lengths in ([2048] * 4, [1, 4096, 0, 130, 2047, 128, 129, 17]):
        q, k, _, p = make(lengths, heads, kv_heads, dim)
        means = summarise(k, p, 128)
        found = select(q, means, p, 8, block_size=128, mean_dtype=mode)
        ids, count = select_blocks(q.detach(), means, p.cu_q, p.cu_k, True, 8, 128, True, "later", False, mode)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.count, count)


# ---- 7: hot and cold blocks


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (128, 64), (128, 128)])
def test_a_block_that_every_query_takes(block, dim, deterministic):
    q, k, v, packing = make([20000], heads=2, kv_heads=1, dim=dim)
    own = (packing.position_T // block).int()
    rows = torch.stack([own.where(own == 0, 0), own.masked_fill(own == 0, -1)], -1)
    ids = rows[:, None].expand(-1, 2, -1).contiguous()
    selection = Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), block, own=True)
    check(q, k, v, packing, selection, deterministic=deterministic)


def test_blocks_that_nobody_takes_get_zero_gradients():
    q, k, v, packing = make([2000], heads=4, kv_heads=2)
    ids = torch.full((2000, 4, 2), -1, dtype=torch.int32, device=DEVICE)
    ids[..., 0] = 3  # visible from block 3 on; all others are cold
    selection = Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), 64, own=False)
    found = run(q, k, v, packing, selection)
    cold = torch.ones(2000, dtype=torch.bool, device=DEVICE)
    cold[3 * 64 : 4 * 64] = False
    for name in ("dk", "dv"):
        assert torch.count_nonzero(found[name][cold]) == 0
        assert torch.count_nonzero(found[name][~cold]) > 0
    assert (found["lse"][: 3 * 64] == float("-inf")).all()
    assert torch.count_nonzero(found["o"][: 3 * 64]) == torch.count_nonzero(found["dq"][: 3 * 64]) == 0


# ---- 8: gradients


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_ratio_of_heads(ratio, deterministic):
    q, k, v, packing = make([900, 130], heads=16, kv_heads=16 // ratio)
    check(q, k, v, packing, route(q, k, packing, 64, 3), deterministic=deterministic)


@pytest.mark.parametrize("shape", ["broadcast", "transposed"])
def test_gradients_of_the_output_with_strides_of_their_own(shape):
    q, k, v, packing = make([500])
    if shape == "broadcast":
        grad_o = torch.randn(1, 1, 64, device=DEVICE, dtype=BF16).expand(500, 4, 64)
    else:
        grad_o = torch.randn(64, 4, 500, device=DEVICE, dtype=BF16).permute(2, 1, 0)
    check(q, k, v, packing, route(q, k, packing, 64, 3), grad_o)


def test_gradients_add_to_those_already_there():
    q, k, v, packing = make([500])
    selection = route(q, k, packing, 64, 3)
    expected = run(q, k, v, packing, selection, deterministic=True)
    for x in (q, k, v):
        x.grad = torch.ones_like(x)
    o, _ = attend(q, k, v, packing, selection, impl="triton", deterministic=True)
    o.backward(like(v, 4))
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert torch.equal(x.grad, expected[name] + 1), name


# ---- 9: shapes and dtypes


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_head_dims_and_dtypes(dims, dtype):
    q, k, v, packing = make([700, 90], 2, 1, *dims, dtype)
    check(q, k, v, packing, route(q, k, packing, 64, 3))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 100, 33])
def test_block_sizes(block, deterministic):
    lengths = [min(6 * block + 17, 10000), 40]
    q, k, v, packing = make(lengths, 2, 1, 128)
    check(q, k, v, packing, route(q, k, packing, block, 3), deterministic=deterministic)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 12, 16, 32, 64])
def test_numbers_of_blocks(top_k):
    q, k, v, packing = make([5000], 2, 1, 128)
    check(q, k, v, packing, route(q, k, packing, 64, top_k))


@pytest.mark.parametrize("which", ["q", "k", "v", "grad_o"])
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_that_no_16_byte_copies_fit_are_attended_to_as_well(which, dim):
    q, k, v, packing = make([900, 130], dim=dim)
    inputs = {"q": q, "k": k, "v": v, "grad_o": like(v, 4)}
    x = inputs[which].detach()
    wide = torch.zeros(x.shape[0], x.shape[1] * dim + 3, device=DEVICE, dtype=BF16)
    view = wide[:, 1:-2].unflatten(1, (x.shape[1], dim))
    view.copy_(x)
    inputs[which] = view.requires_grad_(which != "grad_o")
    check(inputs["q"], inputs["k"], inputs["v"], packing, route(q, k, packing, 128, 3), inputs["grad_o"])


@pytest.mark.parametrize("lengths", [(3000,), (1, 640, 0, 127, 129, 2900)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 4])
def test_lists_of_one_tile_and_of_many(lengths, dim, block, ratio):
    q, k, v, packing = make(lengths, 4, 4 // ratio, dim)
    check(q, k, v, packing, random_selection(packing, 4, block, 5))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [256, 384, 512])
@pytest.mark.parametrize("ratio", [1, 2])
def test_blocks_of_several_parts(dim, block, ratio):
    q, k, v, packing = make([130, 12 * block + 70, block], 2, 2 // ratio, dim)
    check(q, k, v, packing, random_selection(packing, 2, block, 3))


def test_views_into_a_fused_projection_are_read_in_place():
    wide = torch.randn(600, (4 + 2 + 2) * 64, device=DEVICE, dtype=BF16)
    parts = [x.unflatten(1, (-1, 64)) for x in wide.split([256, 128, 128], 1)]
    packing = Packing.from_lengths([600], device=DEVICE)
    selection = route(parts[0], parts[1], packing, 64, 3)
    leaves = [x.requires_grad_() for x in (y.detach() for y in parts)]
    found = check(*leaves, packing, selection)
    copies = [x.detach().contiguous().requires_grad_() for x in parts]
    assert torch.equal(found["o"], run(*copies, packing, selection)["o"])


# ---- 10: numerics


@pytest.mark.parametrize("what", ["large scores", "common offset", "outlier channel"])
def test_hard_values(what):
    q, k, v, packing = make([1500], dim=128)
    with torch.no_grad():
        if what == "large scores":
            q.mul_(30)
        elif what == "common offset":
            k.add_(8 * torch.randn(128, device=DEVICE))
        else:
            k[..., 5] *= 50
    check(q, k, v, packing, route(q, k, packing, 64, 4))


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_past_the_end_of_a_block_give_no_gradient(dim):
    q, k, v, packing = make([1500], dim=dim, dtype=torch.float16)
    with torch.no_grad():
        # log-sums far below zero, where a score of zero would outweigh all others
        k.add_(8 * torch.randn(dim, device=DEVICE))
    check(q, k, v, packing, route(q, k, packing, 192, 3))


# ---- 11: determinism


def test_ten_runs_agree_bit_by_bit():
    q, k, v, packing = make([8000, 500, 1], 8, 2, 128)
    selection = route(q, k, packing, 128, 8)
    first = run(q, k, v, packing, selection, deterministic=True)
    for _ in range(9):
        again = route(q, k, packing, 128, 8)
        assert torch.equal(again.ids, selection.ids)
        found = run(q, k, v, packing, again, deterministic=True)
        for name in first:
            assert torch.equal(found[name], first[name]), name


def test_the_fast_forward_repeats_too():
    q, k, v, packing = make([8000], 8, 2, 128)
    selection = route(q, k, packing, 128, 8)
    first = attend(q, k, v, packing, selection, impl="triton", deterministic=False)
    for _ in range(9):
        o, lse = attend(q, k, v, packing, selection, impl="triton", deterministic=False)
        assert torch.equal(o, first[0])
        assert torch.equal(lse, first[1])


def test_recomputed_activations_have_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    q, k, v, packing = make([2000])
    chosen = []

    def layer(q, k, v):
        chosen.append(route(q, k, packing, 64, 3).ids)
        selection = Selection(chosen[-1], (chosen[-1] >= 0).sum(-1, dtype=torch.int32), 64, own=True)
        return attend(q, k, v, packing, selection, impl="triton", deterministic=True)[0]

    plain = torch.autograd.grad(layer(q, k, v), (q, k, v), like(v, 4))
    again = torch.autograd.grad(checkpoint(layer, q, k, v, use_reentrant=False), (q, k, v), like(v, 4))
    assert len(chosen) == 3
    assert all(torch.equal(ids, chosen[0]) for ids in chosen)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


# ---- 12: indices past 2^31


def test_rows_further_apart_than_2_to_31_elements():
    tokens, stride = 36_000, 65_536
    wide = torch.empty(tokens, stride, device=DEVICE, dtype=BF16)  # 4.7 GB; the last rows lie past 2^31 elements
    parts = wide[:, -256:].unflatten(1, (4, 64)), wide[:, -384:-256].unflatten(1, (2, 64))
    packing = Packing.from_lengths([tokens], device=DEVICE)
    for part in parts:
        part.copy_(torch.randn(part.shape, device=DEVICE))
    q, k = (x.detach().requires_grad_() for x in parts)
    grad_o = wide[:, :256].unflatten(1, (4, 64)).copy_(torch.randn(tokens, 4, 64, device=DEVICE))
    selection = route(q, k, packing, 128, 8)
    found = run(q, k, k, packing, selection, grad_o, deterministic=True)
    near = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k)]
    assert torch.equal(route(*near, packing, 128, 8).ids, selection.ids)
    expected = run(*near, near[1], packing, selection, grad_o.contiguous(), deterministic=True)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.slow
def test_partial_results_of_one_head_past_2_to_31_elements():
    tokens, top_k = 1 << 20, 20  # 19 past blocks x 128 x 2^20 > 2^31
    q, k, v, packing = make([tokens], 1, 1, 128)
    selection = random_selection(packing, 1, 128, top_k)
    found = run(q, k, v, packing, selection)
    rows = [0, 127, 5000, 500_000, 1_000_000, tokens - 129, tokens - 1]
    expected = row_by_row(q.detach(), k.detach(), v.detach(), selection.ids, 128, rows)
    assert (found["o"][rows].double() - expected).norm() <= 1e-2 * expected.norm()
    _check_sums(found, like(v, 1))


@pytest.mark.slow
def test_65535_blocks_in_one_document():
    tokens = 65_535 * 16
    q, k, v, packing = make([tokens], 2, 1)
    selection = random_selection(packing, 2, 16, 4)
    found = run(q, k, v, packing, selection)
    rows = [*range(0, tokens, 50_021), tokens - 17, tokens - 1]
    expected = row_by_row(q.detach(), k.detach(), v.detach(), selection.ids, 16, rows)
    assert (found["o"][rows].double() - expected).norm() <= 1e-2 * expected.norm()
    _check_sums(found, like(v, 2))


@pytest.mark.slow
def test_a_million_tokens_with_routing():
    tokens = 1 << 20
    q, k, v, packing = make([tokens], 2, 1, 128)
    selection = route(q, k, packing, 128, 8)
    found = run(q, k, v, packing, selection)
    rows = [*range(0, tokens, 50_021), tokens - 1]
    expected = row_by_row(q.detach(), k.detach(), v.detach(), selection.ids, 128, rows)
    assert (found["o"][rows].double() - expected).norm() <= 1e-2 * expected.norm()
    _check_sums(found, like(v, 2))


def _check_sums(found: dict[str, Tensor], grad_o: Tensor) -> None:
    """Each query's weights sum to 1, so dv sums to what grad_o sums to: a few queries lost or doubled would show."""
    assert all(torch.isfinite(value).all() for value in found.values())
    error = (found["dv"].double().sum((0, 1)) - grad_o.double().sum((0, 1))).norm()
    # bf16 rounds every weight and every dv by up to 2^-9 of it, independently; a lost query adds about 1 to each column
    assert error <= 2**-7 * found["dv"].double().norm()


# ---- 13: systems


def _layer(q, k, v, packing, grad_o):
    selection = route(q, k, packing, 128, 4)
    o, lse = attend(q, k, v, packing, selection, impl="triton", deterministic=True)
    return selection.ids, o, lse, *torch.autograd.grad(o, (q, k, v), grad_o)


def test_a_captured_graph_replays_with_other_values_and_documents():
    q, k, v, packing = make([3000, 1096], 4, 2, 128)
    cu = packing.cu_q
    packing = replace(packing, max_q=4096, max_k=4096)  # bounds, so that offsets may change
    grad_o = like(v, 4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _layer(q, k, v, packing, grad_o)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _layer(q, k, v, packing, grad_o)
    for lengths in ([3000, 1096], [700, 3396], [4096, 0]):
        new_q, new_k, new_v, new_packing = make(lengths, 4, 2, 128, seed=lengths[0])
        with torch.no_grad():
            for old, new in ((q, new_q), (k, new_k), (v, new_v)):
                old.copy_(new)
            cu.copy_(new_packing.cu_q)
            packing.position_T.copy_(new_packing.position_T)
        graph.replay()
        expected = _layer(new_q, new_k, new_v, replace(new_packing, max_q=4096, max_k=4096), grad_o)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_the_host_never_waits():
    q, k, v, packing = make([3000, 1096], 4, 2, 128)
    grad_o = like(v, 4)
    _layer(q, k, v, packing, grad_o)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _layer(q, k, v, packing, grad_o)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_compiler_sees_opaque_ops():
    q, k, v, packing = make([900, 124], 4, 2)
    grad_o = like(v, 4)

    @torch.compile(fullgraph=True)
    def layer(q, k, v):
        selection = route(q, k, packing, 64, 3)
        return attend(q + 0.0, k, v, packing, selection, impl="triton", deterministic=True)[0] * 2.0

    o = layer(q, k, v)
    grads = torch.autograd.grad(o, (q, k, v), grad_o)
    found = run(q, k, v, packing, route(q, k, packing, 64, 3), grad_o * 2.0, deterministic=True)
    assert torch.equal(o, found["o"] * 2.0)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert torch.equal(grad, found[name]), name


def test_inference_mode_gives_the_same():
    q, k, v, packing = make([900])
    selection = route(q, k, packing, 64, 3)
    with torch.inference_mode():
        o, lse = attend(q, k, v, packing, selection, impl="triton", deterministic=False)
    found = run(q, k, v, packing, selection)
    assert torch.equal(o, found["o"])
    assert torch.equal(lse, found["lse"])


def test_memory_stays_within_workspace_lists_and_gradients():
    from pithwood.ops.attend.triton import WORKSPACE_BYTES

    heads, top_k, tokens = 16, 8, 131_072
    q, k, v, packing = make([tokens], heads, heads, 128)
    selection = route(q, k, packing, 128, top_k)
    grad_o = like(v, heads)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(q, k, v, packing, selection, grad_o)
    one = q.nbytes
    # o, dq, dk, dv; lse, delta; lists of int32 with their parts; partial results or fp32 dq
    lists = 4 * 4 * tokens * heads * top_k
    assert torch.cuda.max_memory_allocated() - before <= 4 * one + 16 * tokens * heads + lists + 2 * WORKSPACE_BYTES
