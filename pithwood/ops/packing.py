"""What attention kernels need to know about a packed batch: document offsets, and which blocks each row selected.

Below the data room there is no batch dimension: documents lie one after another along T.

Legend: T packed tokens (T_q queries, T_k keys), N documents, U units (blocks) of all documents, R selection rows, S
selections per row, k ids per selection, H query heads, G KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

KEY_LENGTHS = "key_lengths"
"""Under which a packing remembers its documents' key lengths, where the host knows them."""


@dataclass(frozen=True)
class Packing:
    """Document offsets of packed queries and keys, bottom-right aligned.

    Query i of document n stands at key position `i - cu_q[n] + (Lk[n] - Lq[n])` of its document: with Lk > Lq the
    queries are the last Lq positions (decode, chunked prefill); with Lk < Lq the first Lq - Lk queries see nothing.
    Documents of zero length are legal anywhere. Nothing here reads the offsets on the host: sizes come from tensor
    shapes and from the bounds `max_q`, `max_k`. Ops in plain torch may read them, and then wait for the device; kernels
    must not. Outside CUDA graphs the tensors never change once the packing is made; what derives from them is kept.
    """

    cu_q: Tensor
    """[N + 1] int32, offsets of each document's queries; unused offsets at the end repeat T_q."""
    cu_k: Tensor
    """[N + 1] int32, offsets of each document's keys; the same tensor as cu_q in self-attention."""
    max_q: int
    """Upper bound of a document's query count."""
    max_k: int
    """Upper bound of a document's key count."""
    position_T: Tensor
    """[T_q] int64, position of each query in its document, for RoPE and for loss by position."""
    causal: bool = True
    """False lets every query see all keys of its document."""
    _remembered: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_docs(self) -> int:
        return self.cu_q.shape[0] - 1

    @property
    def num_queries(self) -> int:
        return self.position_T.shape[0]

    @property
    def self_attention(self) -> bool:
        """True if queries and keys are the same tokens (one offsets tensor)."""
        return self.cu_q is self.cu_k

    @staticmethod
    def from_lengths(
        lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
    ) -> Packing:
        """Packing of documents with these query (and key) lengths; raises ValueError on negative or unequal counts."""
        keys = lengths if key_lengths is None else key_lengths
        if len(keys) != len(lengths):
            raise ValueError(f"{len(lengths)} query lengths but {len(keys)} key lengths; give one of each per document")
        if any(n < 0 for n in (*lengths, *keys)):
            raise ValueError("document lengths must be >= 0")
        cu_q = _offsets(lengths, device)
        cu_k = cu_q if key_lengths is None else _offsets(keys, device)
        position = [torch.arange(q, dtype=torch.int64) + (k - q) for q, k in zip(lengths, keys, strict=True)]
        position_T = torch.cat(position) if position else torch.zeros(0, dtype=torch.int64)
        packing = Packing(
            cu_q,
            cu_k,
            max(lengths, default=0) if max_q is None else max_q,
            max(keys, default=0) if max_k is None else max_k,
            position_T.to(device) if device is not None else position_T,
            causal,
        )
        packing._remembered[KEY_LENGTHS] = tuple(keys)
        return packing

    def to(self, device: torch.device | str) -> Packing:
        cu_q = sent(self.cu_q, device)
        cu_k = cu_q if self.self_attention else sent(self.cu_k, device)
        there = replace(self, cu_q=cu_q, cu_k=cu_k, position_T=sent(self.position_T, device))
        if KEY_LENGTHS in self._remembered:
            there._remembered[KEY_LENGTHS] = self._remembered[KEY_LENGTHS]
        return there

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once per packing and key (say, once for all layers of a step)."""
        if self._traced():
            return make()
        if key not in self._remembered:
            # Tensors of inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                self._remembered[key] = make()
        return self._remembered[key]

    def _traced(self) -> bool:
        """Whether this call may run again with other offsets: a CUDA graph is replayed with others in the same tensors,
        a compiled one keeps to its trace."""
        return torch.compiler.is_compiling() or (self.cu_q.is_cuda and torch.cuda.is_current_stream_capturing())

    @property
    def num_keys(self) -> int | None:
        """T_k where the host knows it: in self-attention, and where `from_lengths` made the packing; else None."""
        if self.self_attention:
            return self.num_queries
        if self._traced() or KEY_LENGTHS not in self._remembered:
            return None
        return self.remember("num_keys", lambda: sum(self._remembered[KEY_LENGTHS]))

    def num_units_between(self, block_size: int) -> tuple[int, int] | None:
        """The least and the most rows that summaries of blocks may have: all blocks, and what `summarise` returns. The
        least is a bound where the host does not know the documents' lengths; None where it does not know T_k."""
        num_keys = self.num_keys
        if num_keys is None:
            return None
        least = (num_keys + block_size - 1) // block_size
        if not self._traced() and KEY_LENGTHS in self._remembered:
            lengths = self._remembered[KEY_LENGTHS]
            least = self.remember(
                ("num_units", block_size), lambda: sum((n + block_size - 1) // block_size for n in lengths)
            )
        return least, self.num_units_bound(num_keys, block_size)

    def query_doc(self) -> Tensor:
        """[T_q] int64: document of each query."""
        return self.remember("query_doc", lambda: doc_of_rows(self.cu_q, self.num_queries))

    def key_doc(self, num_keys: int) -> Tensor:
        """[T_k] int64: document of each key."""
        return doc_of_rows(self.cu_k, num_keys)

    def query_key_position(self) -> Tensor:
        """[T_q] int64: position of each query among its document's keys; negative if it stands before all of them."""
        return self.remember("query_key_position", self._query_key_position)

    def _query_key_position(self) -> Tensor:
        doc_T = self.query_doc()
        cu_q, cu_k = self.cu_q.long(), self.cu_k.long()
        shift_N = (cu_k[1:] - cu_k[:-1]) - (cu_q[1:] - cu_q[:-1]) - cu_q[:-1]
        return torch.arange(self.num_queries, device=doc_T.device) + shift_N[doc_T]

    def unit_offsets(self, block_size: int) -> Tensor:
        """[N + 1] int64: offsets of each document's key blocks, ceil(Lk / block_size) each."""
        return self.remember(("unit_offsets", block_size), lambda: self._unit_offsets(block_size))

    def _unit_offsets(self, block_size: int) -> Tensor:
        lengths = (self.cu_k[1:] - self.cu_k[:-1]).long()
        return _cumulate((lengths + block_size - 1) // block_size)

    def num_units_bound(self, num_keys: int, block_size: int) -> int:
        """Units (blocks) that always suffice for num_keys keys in num_docs documents; no host sync."""
        return num_keys // block_size + min(self.num_docs, num_keys)

    def row_offsets(self, row_size: int) -> Tensor:
        """[N + 1] int64: offsets of each document's selection rows, ceil(Lq / row_size) each."""
        lengths = (self.cu_q[1:] - self.cu_q[:-1]).long()
        return _cumulate((lengths + row_size - 1) // row_size)

    def num_rows_bound(self, row_size: int) -> int:
        """Rows of a Selection with this row_size: exactly T_q for row_size 1, else a bound that needs no host sync."""
        if row_size == 1:
            return self.num_queries
        return self.num_queries // row_size + min(self.num_docs, self.num_queries)

    def row_of_query(self, row_size: int) -> Tensor:
        """[T_q] int64: the selection row that each query belongs to; rows restart at documents."""
        if row_size == 1:
            return torch.arange(self.num_queries, device=self.cu_q.device)
        doc_T = self.query_doc()
        local_T = torch.arange(self.num_queries, device=doc_T.device) - self.cu_q.long()[doc_T]
        return self.row_offsets(row_size)[doc_T] + local_T // row_size


@dataclass(frozen=True)
class Selection:
    """Which units of its own document each row of queries may attend to.

    A unit is `unit` consecutive keys (1: single tokens; a MoBA block otherwise), counted from the document's start.
    Causality is applied on top of the selection: a selected unit is visible up to the query's own position.
    The ids of a row must differ from each other and name units of the row's document, 0 to ceil(Lk / unit) - 1. No op
    looks at them for that: what repeated ids, or ids from there on, lead to is unspecified, an IndexError included.
    """

    ids: Tensor
    """[R, S, k] int32 unit ids local to the document, distinct, ascending, -1 padded at the end; k >= 1."""
    count: Tensor
    """[R, S] int32 number of valid ids."""
    unit: int
    """Keys per unit."""
    row_size: int = 1
    """Queries per row: 1 (each query selects alone) or a tile of 64 to 256 that shares one selection."""
    own: bool = False
    """Promise that the ids of every query that stands at a key hold its own unit (MoBA: yes). It saves work; `attend`
    refuses it where it is not kept."""

    def ids_per_head(self, packing: Packing, num_heads: int, num_kv_heads: int) -> Tensor:
        """[T_q, H, k] int32: the ids spelled out for every query and query head; S must be 1, G or H."""
        sets = self.ids.shape[1]
        if sets not in (1, num_kv_heads, num_heads):
            raise ValueError(
                f"selection has {sets} sets per row; allowed are 1, {num_kv_heads} (KV heads), {num_heads}"
            )
        ids = self.ids if self.row_size == 1 else self.ids[packing.row_of_query(self.row_size)]
        return ids.repeat_interleave(num_heads // sets, dim=1) if sets != num_heads else ids


def guarded(selection: Selection) -> tuple[Tensor, ...]:
    """What a backward pass that reads the selection saves of it, so that torch refuses ids changed in between: the ids,
    or nothing where they are of inference mode, which keeps no count of changes."""
    return () if selection.ids.is_inference() else (selection.ids,)


def doc_of_rows(cu: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: the document that holds each row, for offsets cu [N + 1]; zero-length documents hold none."""
    rows = torch.arange(num_rows, device=cu.device, dtype=cu.dtype)
    return torch.searchsorted(cu, rows, right=True).sub_(1).clamp_(0, max(cu.shape[0] - 2, 0))


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device, itself if it is there; the host waits for no copy to a GPU, nor for what the GPU is at."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        # the driver stages pageable memory itself, and may do so only when the stream gets there
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _offsets(lengths: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32).to(device or "cpu")


def _cumulate(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
