"""Where the units (key blocks) of a packing lie: first key and length of each, counted over all documents.

Legend: T packed tokens, N documents, U units of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pithwood.ops.packing import Packing


@dataclass(frozen=True)
class UnitTable:
    """Units in document order. Entries past the last unit have start T_k and length 0."""

    doc_U: Tensor
    """[U] int64: the document of each unit."""
    start_U: Tensor
    """[U] int64: packed index of the unit's first key."""
    length_U: Tensor
    """[U] int64: number of keys; block_size, or less for a document's last unit."""


def unit_table(packing: Packing, block_size: int, num_keys: int, num_units: int | None = None) -> UnitTable:
    """The table for num_units rows (default: the bound of the packing), made once. Reads nothing on the host."""
    if num_units is None:
        num_units = packing.num_units_bound(num_keys, block_size)
    key = "unit_table", block_size, num_keys, num_units
    return packing.remember(key, lambda: _make_table(packing, block_size, num_keys, num_units))


def _make_table(packing: Packing, block_size: int, num_keys: int, num_units: int) -> UnitTable:
    offsets_N = packing.unit_offsets(block_size)
    cu_k = packing.cu_k.long()
    unit_U = torch.arange(num_units, device=cu_k.device)
    doc_U = (torch.searchsorted(offsets_N, unit_U, right=True) - 1).clamp_(0, max(packing.num_docs - 1, 0))
    if packing.num_docs == 0:
        return UnitTable(doc_U, torch.full_like(unit_U, num_keys), torch.zeros_like(unit_U))
    real_U = unit_U < offsets_N[-1]
    start_U = cu_k[doc_U] + (unit_U - offsets_N[doc_U]) * block_size
    start_U = torch.where(real_U, start_U, num_keys)
    length_U = torch.where(real_U, (cu_k[doc_U + 1] - start_U).clamp(max=block_size), 0)
    return UnitTable(doc_U, start_U, length_U)
