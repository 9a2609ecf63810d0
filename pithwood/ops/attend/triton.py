"""Block-sparse attention by Triton kernels: the schedule, and the custom ops that torch.compile treats as opaque.

Forward: early queries, those near the start of their document, sweep over all keys before them (`early_triton.py`). For
the others, lists of queries per unit (`lists_triton.py`), partial results of every (query, unit) pair key-major, then
the own unit and the merge query-major. Backward: lists of all queries, dK and dV key-major, dQ by fp32 row reductions,
or, with deterministic=True, by parts that are summed in a fixed order. Heads are worked on in slices, so that what is
gathered stays in the L2 cache and the workspace under WORKSPACE_BYTES. No size is read on the host: the ops can be
captured in a CUDA graph.

Legend: T queries, H query heads, G KV heads, K query/key head dim, V value head dim, k ids per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pithwood.ops.attend.backward_hopper import _keys_hopper_kernel, hopper_tiles
from pithwood.ops.attend.backward_hopper_apart import _keys_apart_kernel, hopper_apart_tiles
from pithwood.ops.attend.backward_triton import (
    _cast_dq_kernel,
    _delta_kernel,
    _hot_kernel,
    _keys_kernel,
    _own_dq_kernel,
    _rows_dq_kernel,
    _sum_dq_kernel,
)
from pithwood.ops.attend.early_hopper import EARLY_TILE, _early_hopper_kernel, early_hopper_tiles
from pithwood.ops.attend.early_triton import UNIT_BITS, _early_kernel
from pithwood.ops.attend.forward_hopper_parts import hopper_forward
from pithwood.ops.attend.forward_triton import _merge_kernel, _own_kernel, _rows_kernel
from pithwood.ops.attend.lists_triton import LISTS, Items, Lists, Segments, build_items, build_lists, empty_lists
from pithwood.ops.attend.plan import BlockPlan, block_plan
from pithwood.ops.attend.shapes import (
    Choose,
    Tiles,
    backward_tiles,
    dq_tiles,
    early_tiles,
    forward_tiles,
    has_large_shared,
    own_tiles,
)
from pithwood.ops.operator import operator
from pithwood.ops.packing import Packing, Selection

WORKSPACE_BYTES = 2**30
"""Most bytes of partial results, and of fp32 dQ, held at a time, unless a single KV head needs more."""
WHOLE_LISTS = 2**30
"""A chunk that no list exceeds: its sums are formed in one order."""
LOG2_E = 1.4426950408889634
PAIR_KEYS = 150
"""Keys that a query can sweep over in the time that a pair of a query and a unit costs key-major besides its products:
for its place in a list, and for a partial result that is written and read. It says up to where queries are early."""
APART_DIM = 64
"""The head dim at which the Hopper backward's multiplying warpgroups have registers enough to go at their own pace."""
NEAR_BYTES = 32 * 2**20
"""Of Q and dO that neighbouring lists may read for the backward pass to take the longest of them first: they must still
find each other's rows in the L2 cache."""
HOPPER_KEYS = 128
"""Keys per program of the Hopper backward kernel; smaller blocks go to the other kernel."""
LEAST_SCALE = 1e-30
"""Of scores, for Hopper's kernels: they scale a row's largest score, and divide log-sums by the scale."""


def backward_chunk(parts: int) -> int:
    """Rows of a list that one program of the backward takes, when each list is worked on in `parts` of its unit's keys.
    Only lists that very many queries have in common are cut."""
    return 16384 * parts


def num_early(block: int, top_k: int, own: bool) -> int:
    """Units of a document whose queries are early: sweeping over all keys before them costs no more than going
    key-major."""
    if not own or top_k == 1:
        return 0
    return max(min(round((top_k * block + (top_k - 1) * PAIR_KEYS) / block), UNIT_BITS), 0)


def num_slots(top_k: int, own: bool) -> int:
    """Leading ids of a query that can be past units: ids ascend, so with an own unit never the last."""
    return max(top_k - (1 if own else 0), 1)


def _heads(x: Tensor, heads: slice) -> Tensor:
    """x[:, heads]; x itself if that is all, which saves time on the host."""
    return x if heads.stop - heads.start == x.shape[1] else x[:, heads]


def _aligned(x: Tensor) -> bool:
    """Whether rows [., ., dim] can be copied 16 bytes at a time, in words that Triton specialises kernels for."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0


def readable(x: Tensor) -> Tensor:
    """[T, heads, dim] as kernels read it, a copy if need be: a row's elements lie side by side, and all heads less than
    2^31 elements apart, which kernels count in 32 bits. Seen through a layout [heads, T, dim] they may lie further.
    """
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def attend_triton(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    packing: Packing,
    selection: Selection,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(o like q, lse [T, H] fp32) as `attend` promises; differentiable in q, k, v through both."""
    ids_THk = selection.ids_per_head(packing, q_THK.shape[1], k_TGK.shape[1])
    # The diagonal serves own units of causal packings; elsewhere they are units like any other.
    own = selection.own and packing.causal
    plan = block_plan(packing, selection.unit, k_TGK.shape[0], own)
    o, lse, *_ = attend_blocks(
        q_THK, k_TGK, v_TGV, ids_THk.to(torch.int32), plan.units, plan.queries, packing.causal, packing.self_attention,
        selection.unit, triton.cdiv(packing.max_k, selection.unit), own, scale, deterministic,
    )  # fmt: skip
    return o, lse


@operator("attend_blocks")
def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, units: Tensor, queries: Tensor, causal: bool, self_attention: bool,
    unit: int, most_units: int, own: bool, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward of `attend_triton` on plain arguments: o, lse and, for the backward, entries, starts, counts of lists."""
    call = _Call.of(q, k, v, ids, units, queries, causal, self_attention, unit, most_units, own, scale)
    o, lse, lists = call.forward(deterministic)
    return o, lse, lists.entry_P, lists.start_X, lists.count_X


@attend_blocks.register_fake
def _(q, k, v, ids, units, queries, causal, self_attention, unit, most_units, own, scale, deterministic):
    num_queries, heads, _ = q.shape
    num_lists = k.shape[1] * units.shape[1]
    slots = num_slots(ids.shape[2], own)
    return (
        q.new_empty(num_queries, heads, v.shape[2]),
        q.new_empty(num_queries, heads, dtype=torch.float32),
        q.new_empty(num_queries * heads * slots, dtype=torch.int32),
        q.new_empty(num_lists, dtype=torch.int64),
        q.new_empty(num_lists, dtype=torch.int32),
    )


@operator("attend_blocks_backward")
def attend_blocks_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, entry_P: Tensor,
    start_X: Tensor, count_X: Tensor, ids: Tensor, units: Tensor, queries: Tensor, causal: bool, self_attention: bool,
    unit: int, most_units: int, own: bool, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of `attend_blocks`, from what it returned and the same ids."""
    call = _Call.of(q, k, v, ids, units, queries, causal, self_attention, unit, most_units, own, scale)
    return call.backward(do, dlse, o, lse, Lists(entry_P, start_X, count_X), deterministic)


@attend_blocks_backward.register_fake
def _(
    do, dlse, q, k, v, o, lse, entry_P, start_X, count_X, ids, units, queries, causal, self_attention, unit,
    most_units, own, scale, deterministic,
):  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, ids, units, queries, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, ids, units, queries)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse, *_):
    q, k, v, o, lse, *lists_and_ids = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 13
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv = attend_blocks_backward(do, dlse, q, k, v, o, lse, *lists_and_ids, *ctx.rest)
    return dq, dk, dv, *(None,) * 10


attend_blocks.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Call:
    """One attention call on plain tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    plan: BlockPlan
    causal: bool
    self_attention: bool
    most_units: int
    """No document has more."""
    own: bool
    scale: float

    @staticmethod
    def of(q, k, v, ids, units, queries, causal, self_attention, unit, most_units, own, scale) -> _Call:
        q, k, v, ids = map(readable, (q, k, v, ids))
        return _Call(q, k, v, ids, BlockPlan(unit, units, queries), causal, self_attention, most_units, own, scale)

    @property
    def slots(self) -> int:
        return num_slots(self.ids.shape[2], self.own)

    @property
    def early(self) -> int:
        return num_early(self.plan.block_size, self.ids.shape[2], self.own)

    @property
    def ratio(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def head_slices(self, bytes_per_head: int) -> Iterator[tuple[slice, slice]]:
        """(query heads, KV heads) worked on together: as many KV heads as fit the workspace, at least one."""
        heads, ratio = self.q.shape[1], self.ratio
        step = max(WORKSPACE_BYTES // max(bytes_per_head * ratio, 1), 1) * ratio
        for h0 in range(0, heads, step):
            h1 = min(h0 + step, heads)
            yield slice(h0, h1), slice(h0 // ratio, h1 // ratio)

    def lists_of(self, lists: Lists, gs: slice) -> Lists:
        """The lists of some KV heads."""
        if gs.stop - gs.start == self.k.shape[1]:
            return lists
        units = slice(gs.start * self.plan.num_units, gs.stop * self.plan.num_units)
        return Lists(lists.entry_P, lists.start_X[units], lists.count_X[units])

    def most_entries(self, gs: slice) -> int:
        """Most entries that the lists of some KV heads can have."""
        return self.q.shape[0] * self.ratio * self.slots * (gs.stop - gs.start)

    def constants(self, ratio: int) -> dict[str, object]:
        """Compile-time constants that most kernels share."""
        dim, value_dim = self.q.shape[2], self.v.shape[2]
        return {
            "K": dim,
            "V": value_dim,
            "K_PAD": max(16, triton.next_power_of_2(dim)),
            "V_PAD": max(16, triton.next_power_of_2(value_dim)),
            "RATIO": ratio,
            "SLOTS": self.slots,
            # Only fp32 has a choice: full precision, not tf32.
            "PRECISION": "ieee",
        }

    def tiles(self, choose: Choose) -> tuple[Tiles, dict[str, int]]:
        """A kernel's tiles, and its launch options."""
        large = has_large_shared(self.q)
        tiles = choose(self.plan.block_size, max(self.q.shape[2], self.v.shape[2]), self.q.element_size(), large)
        return tiles, {"num_warps": tiles.warps, "num_stages": tiles.stages}

    def on_hopper(self) -> bool:
        """Whether the kernels of their own for this GPU serve these dtypes, head dims, selections and this scale."""
        q, dim = self.q, self.q.shape[2]
        return (
            q.is_cuda
            and torch.cuda.get_device_capability(q.device) == (9, 0)
            and q.element_size() == 2
            and dim == self.v.shape[2]
            and dim in (64, 128)
            and self.own
            and self.scale > LEAST_SCALE
        )

    def fits_hopper(self) -> bool:
        """Whether the backward has a kernel of its own on this GPU."""
        return self.on_hopper() and self.plan.block_size >= HOPPER_KEYS

    def fits_hopper_forward(self) -> bool:
        """Whether the key-major forward has kernels of its own on this GPU: for blocks of one part or of whole ones."""
        block = self.plan.block_size
        fits = self.on_hopper() and (64 <= block <= HOPPER_KEYS or block % HOPPER_KEYS == 0)
        return fits and all(_aligned(x) for x in (self.q, self.k, self.v))

    def sweeps_on_hopper(self) -> bool:
        """Whether early queries have a kernel of their own on this GPU, which copies 16 bytes at a time."""
        aligned = all(_aligned(x) for x in (self.q, self.k, self.v))
        return self.fits_hopper() and aligned and self.plan.block_size % EARLY_TILE == 0

    # ---- forward

    def forward(self, ordered: bool) -> tuple[Tensor, Tensor, Lists]:
        """(o, lse, lists); ordered: the lists are the same in every run."""
        q, v = self.q, self.v
        num_queries, heads, _ = q.shape
        o = torch.empty(num_queries, heads, v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
        num_groups = self.k.shape[1]
        if num_queries == 0 or self.k.shape[0] == 0:
            return o.zero_(), lse.fill_(float("-inf")), empty_lists(self.ids, self.plan, num_groups, self.slots)
        segments = Segments.of(self.plan.block_size, self.early, self.own)
        lists, late_lists = build_lists(self.ids, self.plan, num_groups, self.slots, segments, ordered)
        if self.own and not self.self_attention:
            # Queries before their document's first key belong to no unit.
            o.zero_()
            lse.fill_(float("-inf"))
        if self.early:
            self._sweep(o, lse)
        if self.most_units > self.early:
            per_head = num_queries * self.slots * (v.shape[2] * q.element_size() + 4)
            items = None
            if self.fits_hopper_forward():
                chunk, most = hopper_forward(self.plan.block_size)[1]["CHUNK"], self.most_entries(slice(0, num_groups))
                items = build_items(late_lists, self.plan, chunk, most, at_least_one=False)
            for hs, gs in self.head_slices(per_head):
                self._forward_slice(hs, gs, o, lse, self.lists_of(late_lists, gs), items)
        return o, lse, lists

    def _sweep(self, o: Tensor, lse: Tensor) -> None:
        """Write the rows of early queries."""
        q, k, v, ids, plan = self.q, self.k, self.v, self.ids, self.plan
        heads, block = q.shape[1], plan.block_size
        strides = (
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), o.stride(0), o.stride(1),
            lse.stride(0), ids.stride(0), ids.stride(1),
        )  # fmt: skip
        tables = (
            plan.key_start_U, plan.key_count_U, plan.position_U, plan.query_start_U, plan.query_low_U,
            plan.query_high_U,
        )  # fmt: skip
        scale = self.scale * LOG2_E
        shape: dict[str, object] = {"HEAD_RATIO": self.ratio, "TOP_K": ids.shape[2]}
        if self.sweeps_on_hopper():
            num_tiles = plan.num_units * (block // EARLY_TILE)
            programs = min(num_tiles * heads, torch.cuda.get_device_properties(q.device).multi_processor_count)
            _early_hopper_kernel[(programs,)](
                q, k, v, o, lse, ids, *tables, *strides, num_tiles, heads, self.early, scale, K=q.shape[2],
                BLOCK=block, **shape, **early_hopper_tiles(q.shape[2]),
            )  # fmt: skip
            return
        tiles, _ = self.tiles(early_tiles)
        tiles_per_unit, parts = (triton.cdiv(block, n) for n in (tiles.rows, tiles.keys))
        num_tiles = plan.num_units * tiles_per_unit
        shape |= {name: value for name, value in self.constants(1).items() if name not in ("RATIO", "SLOTS")}
        _early_kernel[(num_tiles * heads,)](
            q, k, v, o, lse, ids, *tables, *strides, num_tiles, heads, self.early, scale, **shape,
            TOP_K_PAD=triton.next_power_of_2(ids.shape[2]), BLOCK=block, ROWS=tiles.rows, KEYS=tiles.keys,
            TILES=tiles_per_unit, PARTS=parts, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _forward_slice(
        self, hs: slice, gs: slice, o: Tensor, lse: Tensor, lists: Lists, items: Items | None
    ) -> None:  # fmt: skip
        """Write the rows of late queries of some heads. items: those of all heads, for the Hopper kernels."""
        plan = self.plan
        q, ids, o, lse = (_heads(x, hs) for x in (self.q, self.ids, o, lse))
        k, v = _heads(self.k, gs), _heads(self.v, gs)
        num_queries, heads, _ = q.shape
        groups = k.shape[1]
        ratio = heads // groups
        rows_per_group = num_queries * ratio * self.slots
        partial_o = q.new_empty(groups * rows_per_group, v.shape[2])
        partial_lse = torch.empty(groups * rows_per_group, dtype=torch.float32, device=q.device)
        strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        shape = self.constants(ratio)
        if items is not None:
            kernel, options = hopper_forward(plan.block_size)
            lists_here = groups * plan.num_units
            bound = self.most_entries(gs) // options["CHUNK"] + lists_here
            kernel[(bound,)](
                q, k, v, partial_o, partial_lse, lists.entry_P, lists.start_X, lists.count_X, items.list_I,
                items.chunk_I, items.first_X, plan.key_start_U, *strides, items.bound,
                gs.start * plan.num_units, lists_here, plan.num_units, rows_per_group, self.scale * LOG2_E,
                K=q.shape[2], RATIO=ratio, SLOTS=self.slots, BLOCK=plan.block_size, **options,
            )  # fmt: skip
        else:
            tiles, launch = self.tiles(forward_tiles)
            parts = triton.cdiv(plan.block_size, tiles.keys)
            chunk = 16 * tiles.rows if parts == 1 else tiles.rows
            items = build_items(lists, plan, chunk, self.most_entries(gs), at_least_one=False)
            _rows_kernel[(items.bound,)](
                q, k, v, partial_o, partial_lse, lists.entry_P, lists.start_X, lists.count_X, items.list_I,
                items.chunk_I, plan.key_start_U, plan.key_count_U, plan.position_U, plan.position_T, *strides,
                plan.num_units, rows_per_group, self.scale * LOG2_E, **shape, BLOCK=plan.block_size, CHUNK=chunk,
                ROWS=tiles.rows, KEYS=tiles.keys, PARTS=parts, ALL_SEEN=self.own, CAUSAL=self.causal, **launch,
            )  # fmt: skip
        out = (o.stride(0), o.stride(1), lse.stride(0), ids.stride(0), ids.stride(1), num_queries)
        if self.own:
            tiles, _ = self.tiles(own_tiles)
            tiles_per_unit = triton.cdiv(plan.block_size, tiles.rows)
            shape["HEAD_RATIO"] = ratio
            _own_kernel[(plan.num_units * tiles_per_unit, heads)](
                q, k, v, o, lse, partial_o, partial_lse, ids, plan.key_start_U, plan.key_count_U, plan.position_U,
                plan.query_start_U, plan.query_low_U, plan.query_high_U, *strides, *out, self.early,
                self.scale * LOG2_E, **shape, TOP_K=ids.shape[2], TOP_K_PAD=triton.next_power_of_2(ids.shape[2]),
                BLOCK=plan.block_size, ROWS=tiles.rows, KEYS=tiles.keys, TILES=tiles_per_unit, STAGES=tiles.stages,
                num_warps=tiles.warps, num_stages=1,
            )  # fmt: skip
        else:
            rows = 32
            _merge_kernel[(triton.cdiv(num_queries, rows), heads)](
                o, lse, partial_o, partial_lse, ids, plan.limit_T, *out, V=shape["V"], V_PAD=shape["V_PAD"],
                RATIO=ratio, SLOTS=self.slots, ROWS=rows,
            )  # fmt: skip

    # ---- backward

    def backward(
        self, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, lists: Lists, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q, self.k, self.v
        num_queries, heads, dim = q.shape
        if num_queries == 0 or k.shape[0] == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        do = readable(do)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if deterministic and self.own and not self.self_attention:
            dq.zero_()
        delta = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
        rows, value_dim = 32, v.shape[2]
        dlse_ = delta if dlse is None else dlse
        _delta_kernel[(triton.cdiv(num_queries * heads, rows),)](
            o, do, dlse_, delta, num_queries * heads, heads, o.stride(0), o.stride(1), do.stride(0), do.stride(1),
            dlse_.stride(0), dlse_.stride(1), V=value_dim, V_PAD=max(16, triton.next_power_of_2(value_dim)),
            HAS_DLSE=dlse is not None, ROWS=rows,
        )  # fmt: skip
        per_head = num_queries * dim * 4 * (self.slots if deterministic else 1)
        for hs, gs in self.head_slices(per_head):
            self._backward_slice(hs, gs, do, lse, delta, dq, dk, dv, self.lists_of(lists, gs), deterministic)
        return dq, dk, dv

    def _backward_slice(
        self, hs: slice, gs: slice, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        lists: Lists, deterministic: bool,
    ) -> None:  # fmt: skip
        plan = self.plan
        q, ids, do, lse, delta, dq = (_heads(x, hs) for x in (self.q, self.ids, do, lse, delta, dq))
        k, v, dk, dv = (_heads(x, gs) for x in (self.k, self.v, dk, dv))
        num_queries, heads, dim = q.shape
        groups = k.shape[1]
        ratio = heads // groups
        most = self.most_entries(gs)
        tiles, launch = self.tiles(backward_tiles)
        hopper = self.fits_hopper() and not deterministic and _aligned(q) and _aligned(do)
        apart = dim == APART_DIM
        if apart:
            # That kernel copies keys 16 bytes at a time too, and takes every listed key for a real one.
            hopper = hopper and _aligned(k) and _aligned(v) and plan.block_size % HOPPER_KEYS == 0
        keys = HOPPER_KEYS if hopper else tiles.keys
        parts = triton.cdiv(plan.block_size, keys)
        chunk = WHOLE_LISTS if deterministic else backward_chunk(parts)
        near = LISTS * plan.block_size * ratio * (dim + v.shape[2]) * q.element_size() <= NEAR_BYTES
        items = build_items(lists, plan, chunk, most, at_least_one=True, longest_first=near)
        hot_X, hot_list, dk_hot, dv_hot = self._hot_lists(lists, chunk, most, dim, v.shape[2])
        dq_rows = 0 if deterministic else num_queries
        # The last of these zeros count the work items that programs have taken.
        dq32 = torch.zeros(heads * dq_rows * dim + 4, dtype=torch.float32, device=q.device)
        shape = self.constants(ratio)
        strides = (
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), do.stride(0), do.stride(1)
        )  # fmt: skip
        grad_strides = (dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1))
        if hopper and apart:
            options = hopper_apart_tiles()
            num_items = items.bound * parts
            programs = min(num_items, torch.cuda.get_device_properties(q.device).multi_processor_count)
            _keys_apart_kernel[(programs,)](
                q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot, lists.entry_P, lists.start_X, lists.count_X,
                hot_X, items.list_I, items.chunk_I, dq32[-4:].view(torch.int32), plan.key_start_U, plan.key_count_U,
                plan.query_start_U, plan.query_low_U, plan.query_high_U, *strides, *grad_strides, lse.stride(0),
                num_queries, num_items, plan.num_units, self.scale, self.scale * LOG2_E, K=dim, RATIO=ratio,
                SLOTS=self.slots, BLOCK=plan.block_size, CHUNK=chunk, KEYS=keys, PARTS=parts,
                OWN_TILES=triton.cdiv(plan.block_size, options["ROWS"]), **options,
            )  # fmt: skip
        elif hopper:
            options = hopper_tiles()
            _keys_hopper_kernel[(items.bound * parts,)](
                q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot, lists.entry_P, lists.start_X, lists.count_X,
                hot_X, items.list_I, items.chunk_I, plan.key_start_U, plan.key_count_U, plan.query_start_U,
                plan.query_low_U, plan.query_high_U, *strides, *grad_strides, lse.stride(0), num_queries,
                plan.num_units, self.scale, self.scale * LOG2_E, K=dim, RATIO=ratio, SLOTS=self.slots,
                BLOCK=plan.block_size, CHUNK=chunk, KEYS=keys, PARTS=parts,
                OWN_TILES=triton.cdiv(plan.block_size, options["ROWS"]), **options,
            )  # fmt: skip
        else:
            _keys_kernel[(items.bound * parts,)](
                q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot, lists.entry_P, lists.start_X, lists.count_X,
                hot_X, items.list_I, items.chunk_I, plan.key_start_U, plan.key_count_U, plan.position_U,
                plan.query_start_U, plan.query_low_U, plan.query_high_U, plan.position_T, *strides, *grad_strides,
                lse.stride(0), num_queries, plan.num_units, self.scale, self.scale * LOG2_E, **shape,
                BLOCK=plan.block_size, CHUNK=chunk, ROWS=tiles.rows, KEYS=keys, PARTS=parts,
                OWN_TILES=triton.cdiv(plan.block_size, tiles.rows), OWN=self.own, CAUSAL=self.causal,
                ADD_DQ=not deterministic, **launch,
            )  # fmt: skip
        if hot_list.shape[0]:
            _hot_kernel[(hot_list.shape[0] * parts,)](
                dk, dv, dk_hot, dv_hot, hot_list, plan.key_start_U, plan.key_count_U, *grad_strides, plan.num_units,
                **{name: shape[name] for name in ("K", "V", "K_PAD", "V_PAD")}, BLOCK=plan.block_size,
                KEYS=keys, PARTS=parts,
            )  # fmt: skip
        if deterministic:
            self._ordered_dq(q, k, v, ids, do, lse, delta, dq, lists, shape, strides)
        else:
            rows = 32
            _cast_dq_kernel[(triton.cdiv(num_queries, rows), heads)](
                dq32, dq, num_queries, dq.stride(0), dq.stride(1), K=dim, K_PAD=shape["K_PAD"], ROWS=rows
            )

    def _hot_lists(
        self, lists: Lists, chunk: int, most: int, dim: int, value_dim: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lists of several chunks: their number in hot_X [X] (-1: one chunk), hot_list its inverse, fp32 sums."""
        device = lists.count_X.device
        # A row is in a list once at most, so short sequences have none of several chunks.
        bound = most // (chunk + 1) if self.q.shape[0] * self.ratio > chunk else 0
        if bound == 0:
            none = torch.empty(0, dtype=torch.float32, device=device)
            return torch.full_like(lists.count_X, -1), torch.empty(0, dtype=torch.int32, device=device), none, none
        hot = lists.count_X > chunk
        number = hot.cumsum(0, dtype=torch.int32) - 1
        hot_X = torch.where(hot, number, -1)
        hot_list = torch.full((bound + 1,), -1, dtype=torch.int32, device=device)
        every = torch.arange(hot.shape[0], device=device, dtype=torch.int32)
        # Lists of one chunk all write to the spare place at the end.
        hot_list.index_copy_(0, torch.where(hot, number, bound).long(), every)
        size = bound * self.plan.block_size
        dk_sum, dv_sum = (torch.zeros(size, d, dtype=torch.float32, device=device) for d in (dim, value_dim))
        return hot_X, hot_list[:bound], dk_sum, dv_sum

    def _ordered_dq(
        self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
        lists: Lists, shape: dict[str, object], strides: tuple[int, ...],
    ) -> None:  # fmt: skip
        """dQ without atomics."""
        plan = self.plan
        num_queries, heads, dim = q.shape
        groups = k.shape[1]
        rows_per_group = num_queries * (heads // groups) * self.slots
        partial = torch.empty(groups * rows_per_group, dim, dtype=torch.float32, device=q.device)
        tiles, launch = self.tiles(dq_tiles)
        items = build_items(lists, plan, tiles.rows, rows_per_group * groups, at_least_one=False)
        scales = (self.scale, self.scale * LOG2_E)
        _rows_dq_kernel[(items.bound,)](
            q, k, v, do, lse, delta, partial, lists.entry_P, lists.start_X, lists.count_X, items.list_I, items.chunk_I,
            plan.key_start_U, plan.key_count_U, plan.position_U, plan.position_T, *strides, lse.stride(0),
            plan.num_units, rows_per_group, *scales, **shape, ROWS=tiles.rows, KEYS=tiles.keys,
            PARTS=triton.cdiv(plan.block_size, tiles.keys), MASKED=self.causal and not self.own, **launch,
        )  # fmt: skip
        out = (dq.stride(0), dq.stride(1), ids.stride(0), ids.stride(1), num_queries)
        if self.own:
            tiles_per_unit = triton.cdiv(plan.block_size, tiles.rows)
            _own_dq_kernel[(plan.num_units * tiles_per_unit, heads)](
                q, k, v, do, lse, delta, partial, dq, ids, plan.key_start_U, plan.key_count_U, plan.position_U,
                plan.query_start_U, plan.query_low_U, plan.query_high_U, *strides, lse.stride(0), *out, *scales,
                **shape, BLOCK=plan.block_size, ROWS=tiles.rows, KEYS=tiles.keys, TILES=tiles_per_unit, **launch,
            )  # fmt: skip
        else:
            rows = 32
            _sum_dq_kernel[(triton.cdiv(num_queries, rows), heads)](
                partial, dq, ids, plan.limit_T, *out, K=shape["K"], K_PAD=shape["K_PAD"], RATIO=shape["RATIO"],
                SLOTS=self.slots, ROWS=rows,
            )  # fmt: skip
