"""Joining pieces of one softmax that were computed apart.

Legend: T packed tokens, H query heads, V value head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_impl, check_sink
from pithwood.ops.merge.ref import merge_ref


@without_autocast
def merge(pieces: Sequence[tuple[Tensor, Tensor]], *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from attention over each: (o, lse) of the whole.

    pieces      o [T, H, V] float, lse [T, H] natural log of each piece's sum; -inf where a piece saw no key
    impl        "ref" | "torch"         one implementation: both names mean plain torch
    returns     (o [T, H, V] in the first piece's dtype, lse [T, H] fp32, fp64 if a piece is)
    raises      ValueError on no pieces or unequal shapes

    lse = logsumexp_i lse_i and o = sum_i exp(lse_i - lse) o_i, accumulated in fp32; rows that no piece saw give zero
    and -inf. Differentiable in every o and lse. A row's piece with lse -inf counts nothing, whatever its o holds.
    """
    check_impl(impl, ("ref", "torch"))
    if not pieces:
        raise ValueError("merge needs at least one (o, lse) piece")
    for o, lse in pieces:
        if o.shape != pieces[0][0].shape or lse.shape != o.shape[:-1]:
            raise ValueError(
                f"pieces must agree: o {tuple(pieces[0][0].shape)} and {tuple(o.shape)}, lse {tuple(lse.shape)}; "
                "every lse is o's shape without the last dimension"
            )
    return merge_ref(pieces)


def add_sink(o: Tensor, lse: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) after one more logit per head, without a value, joins the softmax; differentiable in all three.

    o [T, H, V], lse [T, H], sink_H [H] a logit that is compared with scaled scores. Rows that saw no key keep zero
    output and get the sink's logit as lse.
    """
    check_sink(sink_H, o.shape[1])
    sink_TH = sink_H.to(lse.dtype).expand_as(lse)
    whole = torch.logaddexp(lse, sink_TH)
    # weight of the keys' share; 1 / (1 + exp(sink - lse)) neither overflows nor meets -inf - -inf, as sinks are finite
    return o * torch.sigmoid(lse - sink_TH)[..., None].to(o.dtype), whole
