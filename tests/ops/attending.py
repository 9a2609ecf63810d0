"""Calls of `attend` checked against the fp64 reference: output, log-sums and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch

from pithwood.ops import attend, select, summarise
from tests.numerics import assert_close
from tests.ops.reference import Inputs, attention, gradients, masks_of_ids

SELF = ([0, 5, 64, 0, 1, 131, 0], None)
CROSS = ([3, 40, 0, 9, 2], [20, 25, 17, 9, 0])


def moba_selection(inputs, block, top_k, **options):
    summary = summarise(inputs.k, inputs.packing, block)
    return select(inputs.q, summary, inputs.packing, top_k, block_size=block, **options)


def expected_attention(inputs, selection, **options):
    """(o, lse) of the reference."""
    ids = selection.ids_per_head(inputs.packing, inputs.q.shape[1], inputs.k.shape[1])
    return attention(*inputs, masks_of_ids(ids, selection.unit, inputs.packing), **options)


def check_attend(inputs, selection, impl=None, tol=None, device="cpu", deterministic=False, **options):
    """Output, lse and gradients of one call on a device against the reference; returns the output."""
    expected = expected_attention(inputs, selection, **options)
    moved = Inputs(*(x.to(device) for x in inputs))
    on_device = replace(selection, ids=selection.ids.to(device), count=selection.count.to(device))
    o, lse = attend(*moved, on_device, impl=impl, deterministic=deterministic, **options)
    o, lse = o.cpu(), lse.cpu()
    assert o.dtype == inputs.q.dtype
    assert_close(o, expected[0], tol, "o")
    empty = expected[1] == float("-inf")
    assert_close(lse[~empty], expected[1][~empty], tol, "lse")
    if options.get("sink_H") is None:
        assert (lse[empty] == float("-inf")).all()
    assert torch.count_nonzero(o[empty]) == 0
    leaves = [x for x in (*inputs[:3], options.get("sink_H")) if x is not None]
    wanted = gradients(expected[0], expected[1].masked_fill(empty, 0.0), leaves)
    found = gradients(o, lse.masked_fill(empty, 0.0), leaves)
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), found, wanted, strict=False):
        limit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(a.dtype, 2e-2) if tol is None else tol
        assert (a.double() - b.double()).norm() <= limit * max(float(b.double().norm()), 1e-6), name
    return o
