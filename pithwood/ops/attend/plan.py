"""What the kernels look up instead of searching: where each unit's keys and own queries lie, and what a query may see.

Everything is computed by device operations from the packing's offsets; nothing is read on the host, so a plan can be
part of a CUDA graph.

Legend: T packed queries, N documents, U units (blocks) of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pithwood.ops.packing import Packing
from pithwood.ops.units import unit_table


@dataclass(frozen=True)
class BlockPlan:
    """Tables of one packing cut into units of `block_size` keys."""

    block_size: int
    units: Tensor
    """[6, U] int32: a row per property below. U is a bound that needs no host sync; units past the last are empty."""
    queries: Tensor
    """[3, T] int32: a row per property below."""

    # Views are made once: short batches wait for the host.
    @cached_property
    def _unit_rows(self) -> tuple[Tensor, ...]:
        return self.units.unbind(0)

    @cached_property
    def _query_rows(self) -> tuple[Tensor, ...]:
        return self.queries.unbind(0)

    @property
    def num_units(self) -> int:
        """U"""
        return self.units.shape[1]

    @property
    def key_start_U(self) -> Tensor:
        """Packed index of the unit's first key."""
        return self._unit_rows[0]

    @property
    def key_count_U(self) -> Tensor:
        """Keys of the unit: block_size, less in a document's last unit, 0 past the last one."""
        return self._unit_rows[1]

    @property
    def position_U(self) -> Tensor:
        """Position of the unit's first key in its document."""
        return self._unit_rows[2]

    @property
    def query_start_U(self) -> Tensor:
        """Packed index that a query at the unit's first key position has; below query_low_U if there is none."""
        return self._unit_rows[3]

    @property
    def query_low_U(self) -> Tensor:
        """First query of the unit's document."""
        return self._unit_rows[4]

    @property
    def query_high_U(self) -> Tensor:
        """One past the last query of the unit's document."""
        return self._unit_rows[5]

    @property
    def position_T(self) -> Tensor:
        """Position of each query among its document's keys; negative before the first."""
        return self._query_rows[0]

    @property
    def first_unit_T(self) -> Tensor:
        """The first unit of each query's document."""
        return self._query_rows[1]

    @property
    def limit_T(self) -> Tensor:
        """Selected ids below this are attended to key-major: the past units (own=True), all that begin at or before the
        query (causal), or all units of the document."""
        return self._query_rows[2]


def block_plan(packing: Packing, block_size: int, num_keys: int, own: bool) -> BlockPlan:
    """The plan of a packing. `own`: every query's own unit is attended to apart from the selected past ones."""
    key = ("block_plan", block_size, num_keys, own)
    return packing.remember(key, lambda: _make_plan(packing, block_size, num_keys, own))


def _make_plan(packing: Packing, block_size: int, num_keys: int, own: bool) -> BlockPlan:
    units = unit_table(packing, block_size, num_keys)
    offsets_N = packing.unit_offsets(block_size)
    cu_q, cu_k = packing.cu_q.long(), packing.cu_k.long()
    num_units = units.doc_U.shape[0]
    doc_U = units.doc_U
    local_U = torch.arange(num_units, device=cu_q.device) - offsets_N[doc_U]
    position_U = local_U * block_size
    shift_N = (cu_k[1:] - cu_k[:-1]) - (cu_q[1:] - cu_q[:-1])
    doc_T = packing.query_doc()
    position_T = packing.query_key_position()
    if not packing.causal:
        limit_T = (offsets_N[1:] - offsets_N[:-1])[doc_T]
    else:
        own_T = position_T.div(block_size, rounding_mode="floor")
        limit_T = (own_T if own else own_T + 1).clamp_(min=0)
    units_6U = (
        units.start_U,
        units.length_U,
        position_U,
        cu_q[doc_U] + position_U - shift_N[doc_U],
        cu_q[doc_U],
        cu_q[doc_U + 1],
    )
    queries_3T = position_T, offsets_N[doc_T], limit_T
    return BlockPlan(block_size, torch.stack(units_6U).to(torch.int32), torch.stack(queries_3T).to(torch.int32))
