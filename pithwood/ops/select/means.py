"""The block means and queries as the router compares them: rounding, centring and averaging over a KV group.

Legend: T packed tokens, U units (blocks) of all documents, S selections per row, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing
from pithwood.ops.units import unit_table


def packed_summary(s_UGK: Tensor, packing: Packing, block_size: int, unit_start_N: Tensor) -> Tensor:
    """Summaries that begin at row unit_start_N[n] of each document, laid out as `summarise` does; those of blocks that
    are not complete are zero. Reads nothing on the host.
    """
    num_units = packing.num_docs * ((packing.max_k + block_size - 1) // block_size)
    table = unit_table(packing, block_size, 0, num_units)
    if s_UGK.shape[0] == 0 or packing.num_docs == 0:
        return s_UGK.new_zeros(num_units, *s_UGK.shape[1:])
    inside_U = torch.arange(num_units, device=s_UGK.device) - packing.unit_offsets(block_size)[table.doc_U]
    complete_U = table.length_U == block_size
    row_U = torch.where(complete_U, unit_start_N.long()[table.doc_U] + inside_U, 0)
    return torch.where(complete_U[:, None, None], s_UGK[row_U], 0.0)


def rounded_means(s_UGK: Tensor, packing: Packing, block_size: int, mean_dtype: str, key_dtype: torch.dtype) -> Tensor:
    """Block means rounded as mean_dtype says, in fp32 (fp64 if the keys are).

    "fp32" keeps them, "input" rounds to the key dtype, "centered" subtracts the mean of the document's block 0 in full
    precision and then rounds to the key dtype. One vector is subtracted from all blocks of a document and KV head,
    which shifts every score of a query alike: exact ranking does not change, while rounding errors shrink with the
    common part. A centre that is not finite is not subtracted (component by component), so one bad key spoils its own
    block alone.
    """
    s_UGK = s_UGK.to(compute_dtype(key_dtype))
    if mean_dtype == "centered" and packing.num_docs > 0:
        offsets_N = packing.unit_offsets(block_size)
        doc_U = unit_table(packing, block_size, 0, s_UGK.shape[0]).doc_U
        first_U = offsets_N[doc_U].clamp_(max=max(s_UGK.shape[0] - 1, 0))
        center_UGK = s_UGK[first_U]
        s_UGK = s_UGK - center_UGK.masked_fill_(~center_UGK.isfinite(), 0.0)
    return s_UGK if mean_dtype == "fp32" else s_UGK.to(key_dtype).to(s_UGK.dtype)


def routing_queries(q_THK: Tensor, num_kv_heads: int, route_per: str) -> Tensor:
    """[T, S, K] fp32 (fp64 for fp64): queries as scored; S = H, or G with each KV group's mean."""
    q_THK = q_THK.to(compute_dtype(q_THK.dtype))
    if route_per == "q_head":
        return q_THK
    num_tokens, num_heads, dim = q_THK.shape
    return q_THK.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, dim).mean(2)
