"""The attention ops compute in the dtypes of their inputs, whatever autocast says around them."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import (
    attend,
    attention_mass,
    decode_attend,
    dense_attention,
    merge,
    moba_attention,
    scores_at,
    select,
    summarise,
)
from pithwood.ops.dense_attention import dense_attention_backward
from tests.ops.reference import make_inputs


def _moba(block_size, impl):
    return lambda inputs: moba_attention(*inputs[:3], block_size=block_size, top_k=3, return_lse=True, impl=impl)


CALLS = {
    "key-major": _moba(16, "torch"),
    "query-major": _moba(8, "torch"),
    "ref": _moba(16, "ref"),
    "dense": lambda inputs: dense_attention(*inputs),
    "windows": lambda inputs: dense_attention(*inputs, window=20, need_lse=True),
    "dense ref": lambda inputs: dense_attention(*inputs, need_lse=True, impl="ref"),
    "decode ref": lambda inputs: decode_attend(*inputs, impl="ref"),
}


def _grads(outputs, inputs):
    return torch.autograd.grad(sum(x.square().sum() for x in outputs if x is not None), inputs[:3])


def _equal(some, others):
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True) if a is not None)


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_without_autocast(name):
    inputs = make_inputs([300], heads=4, kv_heads=2)
    expected = CALLS[name](inputs)
    grads = _grads(expected, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CALLS[name](inputs)
        assert torch.is_autocast_enabled("cpu")
        # the gradient of a reference is autograd's own, which follows the autocast that it runs in
        inside = grads if "ref" in name else _grads(CALLS[name](inputs), inputs)
    _equal(found, expected)
    _equal(_grads(found, inputs), grads)
    _equal(inside, grads)


@pytest.mark.quick
def test_ops_without_a_gradient_and_scores_too():
    inputs = make_inputs([300], heads=4, kv_heads=2)
    q, k, v, packing = (*(x.detach() for x in inputs[:3]), inputs.packing)

    def results():
        means = summarise(k, packing, 16)
        blocks = select(q, means, packing, 3, block_size=16)
        o, lse = attend(q, k, v, packing, blocks)
        whole, whole_lse = dense_attention(q, k, v, packing, need_lse=True)
        grads = [
            g for impl in ("ref", "torch") for g in dense_attention_backward(o, q, k, v, o, lse, packing, impl=impl)
        ]
        mass, scores = attention_mass(q, k, lse, packing, blocks), scores_at(q, means, blocks, packing)
        return means, blocks.ids, o, lse, mass, scores, *grads, *merge([(o, lse), (whole, whole_lse)])

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _equal(results(), expected)


def test_a_compiled_graph_turns_autocast_off_too():
    inputs = make_inputs([40])
    seen = []

    def keep(graph, example):
        seen.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep, dynamic=False)
    def merged(o, lse):
        return merge([(o, lse), (o, lse)])

    o, lse = inputs.q.detach(), inputs.q.detach().sum(-1)
    expected = merge([(o, lse), (o, lse)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _equal(merged(o, lse), expected)
    assert any("autocast" in str(target) for target in seen[-1])
