"""Depthwise causal convolution of keys along time, added back through a SiLU.

Legend: T packed tokens, C channels (KV heads x head dim), W conv width, N documents.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithwood.ops.packing import Packing

ConvWidth = Literal[0, 3, 5]
"""Widths that a configuration can ask for; 0 is no convolution."""


class KeyConv(nn.Module):
    """k'_t = k_t + SiLU(sum over l < W of w_l * k_(t-l)), per channel; keys before the document's start count as zero.

    With zero weights it is the identity and its weights still have a gradient (SiLU'(0) = 1/2), so a model trained
    without it can be continued with it. Time and memory are O(T * W * C).

    "Optimizing Mixture of Block Attention", arXiv 2511.11571, section on the key convolution (widths 3 and 5).
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))

    def forward(self, k_TC: Tensor, packing: Packing, tail_NWC: Tensor | None = None) -> Tensor:
        """Convolved keys [T, C] in k's dtype.

        tail_NWC  [N, W - 1, C]  the raw keys before this call, latest last, zeros where a document had fewer;
                                 None if the call holds documents from their start
        """
        weight_WC = self.weight.to(k_TC.dtype)
        local_T = _index_in_document(packing)
        total_TC = weight_WC[0] * k_TC
        for lag in range(1, self.width):
            if tail_NWC is None:
                lagged_TC = _shift_in_document(k_TC, lag, local_T)
            else:
                lagged_TC = _rows_with_tail(k_TC, tail_NWC, local_T - lag, packing.query_doc(), packing)
            total_TC = total_TC + weight_WC[lag] * lagged_TC
        return k_TC + F.silu(total_TC)

    def between(self, k_TC: Tensor, before_WC: Tensor, packing: Packing) -> Tensor:
        """Convolved keys of a run of tokens that may begin within a document: before_WC [W - 1, C] are the raw keys
        before it, latest last, and the packing's positions say which of them belong to the document.
        """
        weight_WC = self.weight.to(k_TC.dtype)
        rows_C = torch.cat([before_WC, k_TC])
        total_TC = weight_WC[0] * k_TC
        for lag in range(1, self.width):
            start = self.width - 1 - lag
            # filled, not multiplied by 0: a NaN or inf of another document must not get through
            outside_T = packing.position_T < lag
            lagged_TC = rows_C[start : start + k_TC.shape[0]].masked_fill(outside_T[:, None], 0.0)
            total_TC = total_TC + weight_WC[lag] * lagged_TC
        return k_TC + F.silu(total_TC)

    def next_tail(self, k_TC: Tensor, tail_NWC: Tensor, packing: Packing) -> Tensor:
        """[N, W - 1, C]: the last raw keys of every document after this call, for the next call's `tail_NWC`."""
        num_docs, kept = tail_NWC.shape[:2]
        lengths_N = (packing.cu_q[1:] - packing.cu_q[:-1]).long()
        back_W = torch.arange(-kept, 0, device=k_TC.device)
        doc = torch.arange(num_docs, device=k_TC.device).repeat_interleave(kept)
        local = (lengths_N[:, None] + back_W[None, :]).flatten()
        return _rows_with_tail(k_TC, tail_NWC, local, doc, packing).view_as(tail_NWC)


def _index_in_document(packing: Packing) -> Tensor:
    """[T] int64: how many of this call's tokens of the same document come before each token."""
    doc_T = packing.query_doc()
    return torch.arange(packing.num_queries, device=doc_T.device) - packing.cu_q.long()[doc_T]


def _shift_in_document(k_TC: Tensor, lag: int, local_T: Tensor) -> Tensor:
    """Row t is k[t - lag], or zero where that row is of another document."""
    tokens = k_TC.shape[0]
    shifted_TC = F.pad(k_TC[: max(tokens - lag, 0)], (0, 0, min(lag, tokens), 0))
    # filled, not multiplied by 0: a NaN or inf of another document must not get through
    return shifted_TC.masked_fill((local_T < lag)[:, None], 0.0)


def _rows_with_tail(k_TC: Tensor, tail_NWC: Tensor, local: Tensor, doc: Tensor, packing: Packing) -> Tensor:
    """Raw keys at the given in-call positions of the given documents; negative positions read the document's tail."""
    num_docs, kept = tail_NWC.shape[:2]
    rows_C = torch.cat([tail_NWC.to(k_TC.dtype).flatten(0, 1), k_TC])
    in_tail = doc * kept + kept + local
    in_call = num_docs * kept + packing.cu_q.long()[doc] + local
    return rows_C[torch.where(local < 0, in_tail, in_call)]
