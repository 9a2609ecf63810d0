"""Storage for what layers keep while decoding: allocated by field, grown by doubling, truncated and forked by sequence.

One `Cache` serves all layers of one generation. A step is: `packing = cache.begin(lengths)`, every layer reads and
appends through `cache.layer(i, packing)`, then `cache.advance()`. Until then the step has not happened: it can be run
again.

Legend: N sequences, T_q tokens of this step, T_k tokens held with them, U finished blocks of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pithwood.attention.base import CacheField
from pithwood.ops.packing import Packing

FIRST_CAPACITY = 256
"""Tokens per sequence that are allocated first."""


class Cache:
    """All layers' state of `num_sequences` sequences of at most `max_len` tokens.

    Storage is one tensor [N, capacity, ...] per layer and `token` or `block` field, [N, ...] per `sequence` or `tail`
    field. Capacity doubles up to max_len as sequences grow. For inference only: appended rows leave the autograd graph.
    """

    def __init__(
        self,
        model_fields: Sequence[Sequence[CacheField]],
        num_sequences: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        decode_attention: Literal["moba", "full"] | None = None,
    ) -> None:
        """An empty cache for layers with these fields.

        dtype             the model's activation dtype while decoding. Floating token and tail rows are activations and
                          are stored in it; block and sequence rows are running statistics and keep the declared dtype
        decode_attention  "full" or "moba" makes mixers that can do both decode so; None: as configured
        raises            ValueError for a repeated field name in a layer, a block field without block size, sizes < 1
        """
        if num_sequences < 1 or max_len < 1:
            raise ValueError(f"a cache needs num_sequences >= 1 and max_len >= 1; got {num_sequences} and {max_len}")
        if decode_attention not in (None, "moba", "full"):
            raise ValueError(f"attention={decode_attention!r} is not known; choose 'moba', 'full' or None")
        for i, fields in enumerate(model_fields):
            _check_fields(i, fields)
        self.max_len = max_len
        self.dtype = dtype
        self.decode_attention = decode_attention
        self.lengths: list[int] = [0] * num_sequences
        """Tokens held per sequence."""
        self._fields = [{field.name: field for field in fields} for fields in model_fields]
        self._device = torch.device(device or "cpu")
        self._capacity = min(FIRST_CAPACITY, max_len)
        self._storage = [{f.name: self._zeros(f, num_sequences) for f in fields} for fields in model_fields]
        self._step: _Step | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for layer in self._storage for t in layer.values())

    def begin(self, new_lengths: Sequence[int]) -> Packing:
        """Packing of a step that adds new_lengths[n] tokens to sequence n, its queries at the end of what is held.

        Raises ValueError if the counts do not fit the sequences or a sequence would exceed max_len.
        """
        self._check_new(new_lengths)
        held = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        keys = None if not any(self.lengths) else held
        packing = Packing.from_lengths(list(new_lengths), keys, device=self._device)
        self._start(packing, list(new_lengths))
        return packing

    def layer(self, index: int, packing: Packing) -> SequenceCache:
        """What layer `index` sees of the cache in the step described by `packing`.

        A packing that `begin` did not make has its offsets read from the device (one synchronisation a step).
        """
        if self._step is None or self._step.packing is not packing:
            new = packing.cu_q.diff().tolist()
            self._check_new(new)
            held = [old + added for old, added in zip(self.lengths, new, strict=True)]
            if packing.cu_k.diff().tolist() != held:
                raise ValueError(
                    f"packing has key lengths {packing.cu_k.diff().tolist()}; with this cache they must be {held}"
                )
            self._start(packing, new)
        assert self._step is not None
        return SequenceCache(self, index, self._step)

    def advance(self) -> None:
        """Count the step's tokens as held, after all layers have run."""
        if self._step is None:
            raise ValueError("advance() without a step: call begin(lengths), run all layers, then advance()")
        self.lengths = [old + new for old, new in zip(self.lengths, self._step.new, strict=True)]
        for (layer, name), value_N in self._step.written.items():
            self._storage[layer][name] = value_N
        self._step = None

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from `length` on.

        Raises ValueError if fewer are held, or if a layer keeps state that only runs forward (`sequence` and `tail`
        fields): such a cache can only be cut to zero.
        """
        self._check_sequence(sequence)
        held = self.lengths[sequence]
        if not 0 <= length <= held:
            raise ValueError(f"cannot truncate sequence {sequence} to {length} tokens: it holds {held}")
        if length == held:
            return
        running = [(i, f.name) for i, fields in enumerate(self._fields) for f in fields.values() if _runs_forward(f)]
        if running and length > 0:
            layer, name = running[0]
            raise ValueError(
                f"cannot truncate sequence {sequence} from {held} to {length} tokens: layer {layer} keeps {name!r}, "
                "which cannot be rolled back; truncate to 0 and prefill again, or fork() before decoding"
            )
        for i, name in running:
            self._storage[i][name][sequence].zero_()
        self.lengths[sequence] = length
        self._step = None

    def fork(self, sequence: int, copies: int) -> list[int]:
        """Add `copies` sequences that hold what `sequence` holds; returns their indexes."""
        self._check_sequence(sequence)
        if copies < 0:
            raise ValueError(f"cannot fork {copies} copies")
        first = self.num_sequences
        self.keep([*range(first), *[sequence] * copies])
        return list(range(first, first + copies))

    def keep(self, sequences: Sequence[int]) -> None:
        """Make the cache hold exactly these of its sequences, in this order; repeated ones are copied."""
        for n in sequences:
            self._check_sequence(n)
        if list(sequences) == list(range(self.num_sequences)):
            return
        index = torch.tensor(sequences, dtype=torch.int64, device=self._device)
        self._storage = [{name: t[index] for name, t in layer.items()} for layer in self._storage]
        self.lengths = [self.lengths[n] for n in sequences]
        self._step = None

    def _start(self, packing: Packing, new: list[int]) -> None:
        self._reserve(max((old + n for old, n in zip(self.lengths, new, strict=True)), default=0))
        self._step = _Step(packing, list(self.lengths), new, self._device)

    def _reserve(self, tokens: int) -> None:
        """Grow the storage to hold `tokens` per sequence, by doubling so that appending is O(1) amortised."""
        if tokens <= self._capacity:
            return
        while self._capacity < tokens:
            self._capacity = min(2 * self._capacity, self.max_len)
        for fields, storage in zip(self._fields, self._storage, strict=True):
            for name, old in storage.items():
                if fields[name].per in ("token", "block"):
                    grown = self._zeros(fields[name], self.num_sequences)
                    grown[:, : old.shape[1]] = old
                    storage[name] = grown

    def _zeros(self, field: CacheField, num_sequences: int) -> Tensor:
        dtype = field.dtype
        if field.per in ("token", "tail") and dtype.is_floating_point:
            dtype = self.dtype
        rows = {"token": (self._capacity,), "block": (self._capacity // max(field.block_size, 1),)}.get(field.per, ())
        return torch.zeros(num_sequences, *rows, *field.shape, dtype=dtype, device=self._device)

    def _check_new(self, new_lengths: Sequence[int]) -> None:
        if len(new_lengths) != self.num_sequences:
            raise ValueError(f"{len(new_lengths)} lengths for a cache of {self.num_sequences} sequences")
        for n, (held, new) in enumerate(zip(self.lengths, new_lengths, strict=True)):
            if new < 0:
                raise ValueError(f"sequence {n} cannot add {new} tokens")
            if held + new > self.max_len:
                raise ValueError(
                    f"sequence {n} holds {held} tokens and would add {new}: beyond max_len={self.max_len}; "
                    "make the cache with a larger max_len or truncate"
                )

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.num_sequences:
            raise ValueError(f"sequence {sequence} does not exist: the cache holds {self.num_sequences}")


class _Step:
    """One step's lengths and where its rows go, worked out once for all layers."""

    def __init__(self, packing: Packing, held: list[int], new: list[int], device: torch.device) -> None:
        self.packing, self.held, self.new = packing, held, new
        self.written: dict[tuple[int, str], Tensor] = {}
        sequence, place = [], []
        for n, (start, count) in enumerate(zip(held, new, strict=True)):
            sequence.append(torch.full((count,), n))
            place.append(torch.arange(start, start + count))
        self.sequence_T = torch.cat(sequence).to(device)
        self.place_T = torch.cat(place).to(device)


class SequenceCache:
    """One layer's view of a `Cache` within one step; the `LayerCache` that mixers are given."""

    def __init__(self, cache: Cache, index: int, step: _Step) -> None:
        self.lengths_N = step.held
        self.added_N = step.new
        self.decode_attention = cache.decode_attention
        self._step = step
        self._fields = cache._fields[index]
        self._storage = cache._storage[index]
        self._index = index
        self._finished: dict[str, list[int]] = {}

    def append(self, name: str, rows_T: Tensor) -> Tensor:
        """Append [T_q, *shape] rows of a token field; returns all rows packed, [T_k, *shape].

        With one sequence the result is a view of the storage; it is valid until the next step.
        """
        store = self._put(name, rows_T)
        totals = [held + new for held, new in zip(self.lengths_N, self.added_N, strict=True)]
        if len(totals) == 1:
            return store[0, : totals[0]]
        return torch.cat([store[n, :total] for n, total in enumerate(totals)])

    def append_in_place(self, name: str, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, without a copy: (all rows with room between the sequences, [N] int64 first row of each).

        The rows are a view of the storage [N * capacity, *shape]; it is valid until the next step.
        """
        store = self._put(name, rows_T)
        start_N = torch.arange(store.shape[0], device=store.device) * store.shape[1]
        return store.flatten(0, 1), start_N

    def _put(self, name: str, rows_T: Tensor) -> Tensor:
        """Store this step's rows of a token field; returns the storage [N, capacity, *shape]."""
        store = self._field(name, "token")
        if rows_T.shape != (len(self._step.place_T), *store.shape[2:]):
            raise ValueError(
                f"layer {self._index}: {name!r} got rows {tuple(rows_T.shape)} for {len(self._step.place_T)} tokens of "
                f"shape {tuple(store.shape[2:])}"
            )
        rows_T = rows_T.detach().to(store.dtype)
        if len(self.lengths_N) == 1:
            store[0, self.lengths_N[0] : self.lengths_N[0] + len(rows_T)] = rows_T
        else:
            store[self._step.sequence_T, self._step.place_T] = rows_T
        return store

    def append_blocks(self, name: str, rows_U: Tensor, counts_N: list[int]) -> None:
        """Append the rows of the blocks that this step finishes, counts_N[n] of sequence n; at most once a step."""
        store = self._field(name, "block")
        expected = [after - before for before, after in zip(*self._finished_before_after(name), strict=True)]
        if counts_N != expected or rows_U.shape != (sum(counts_N), *store.shape[2:]):
            raise ValueError(
                f"layer {self._index}: {name!r} got {counts_N} finished blocks in rows {tuple(rows_U.shape)}; "
                f"this step finishes {expected} of shape {tuple(store.shape[2:])}"
            )
        first = self._finished_before_after(name)[0]
        rows_U = rows_U.detach().to(store.dtype)
        done = 0
        for n, count in enumerate(counts_N):
            store[n, first[n] : first[n] + count] = rows_U[done : done + count]
            done += count
        self._finished[name] = [before + count for before, count in zip(first, counts_N, strict=True)]

    def blocks(self, name: str) -> tuple[Tensor, list[int]]:
        """All rows of a block field packed by sequence, [U, *shape], and how many each sequence holds."""
        store = self._field(name, "block")
        counts = self._finished.get(name, self._finished_before_after(name)[0])
        if len(counts) == 1:
            return store[0, : counts[0]], counts
        return torch.cat([store[n, :count] for n, count in enumerate(counts)]), counts

    def blocks_in_place(self, name: str) -> tuple[Tensor, Tensor]:
        """As `blocks`, without a copy: (all rows with room between the sequences, [N] int64 first row of each)."""
        store = self._field(name, "block")
        start_N = torch.arange(store.shape[0], device=store.device) * store.shape[1]
        return store.flatten(0, 1), start_N

    def read(self, name: str) -> Tensor:
        """[N, *shape] of a sequence or tail field as it was before this step; zeros before the first write."""
        return self._field(name, "sequence", "tail")

    def write(self, name: str, value_N: Tensor) -> None:
        """Overwrite a sequence or tail field with [N, *shape], as of the cache's next `advance`."""
        store = self._field(name, "sequence", "tail")
        if value_N.shape != store.shape:
            raise ValueError(
                f"layer {self._index}: {name!r} got {tuple(value_N.shape)}; the field is {tuple(store.shape)}"
            )
        # a copy: the caller may go on changing its own tensor, and a view must not keep a whole batch alive
        self._step.written[self._index, name] = value_N.detach().to(store.dtype, copy=True)

    def _finished_before_after(self, name: str) -> tuple[list[int], list[int]]:
        size = self._fields[name].block_size
        before = [held // size for held in self.lengths_N]
        return before, [(held + new) // size for held, new in zip(self.lengths_N, self.added_N, strict=True)]

    def _field(self, name: str, *per: str) -> Tensor:
        if name not in self._fields:
            raise ValueError(f"layer {self._index} keeps no field {name!r}; its mixer declares {sorted(self._fields)}")
        if self._fields[name].per not in per:
            raise ValueError(
                f"layer {self._index}: {name!r} is a {self._fields[name].per} field, not {' or '.join(per)}"
            )
        return self._storage[name]


def _runs_forward(field: CacheField) -> bool:
    return field.per in ("sequence", "tail")


def _check_fields(layer: int, fields: Sequence[CacheField]) -> None:
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            raise ValueError(f"layer {layer} declares the cache field {field.name!r} twice")
        if field.per == "block" and field.block_size < 1:
            raise ValueError(f"layer {layer}: block field {field.name!r} has block_size={field.block_size}; give >= 1")
