"""Numbers that describe a step: block-selection statistics, memory, model FLOP utilisation.

Legend: T packed tokens, S selections per token, k ids per selection, N documents, U units (blocks) of all documents, R
tiles of consecutive queries.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pithwood.observe.clock import StepTime
from pithwood.ops.packing import Packing, Selection, doc_of_rows

UNION_ROWS = 128
"""Queries per tile in the `union_128` statistic: the row tile of a dense attention kernel."""

HOPPER_PEAK_FLOPS = 989e12
"""Dense bf16 FLOP/s that the vendor states for H100 SXM and H200."""

HOPPER_MEASURED_FLOPS = 790e12
"""Best 8192-cubed bf16 matmul measured on an H200; a second denominator for MFU."""

HOPPER_COPY_BYTES = 4.27e12
"""Bytes per second, read and written, of a large copy measured on an H200."""


def selection_stats(ids_TSk: Tensor, packing: Packing, block_size: int) -> dict[str, Tensor]:
    """How queries spread their block choices: own share, entropy, union per 128 rows.

    ids_TSk     [T, S, k] int32   block ids local to the document, -1 for none, own block included, no id twice in a row
    packing                       documents of the T queries
    block_size                    keys per block
    returns     dict of fp32 scalars on the device of the ids; NaN where nothing could be measured
    raises      ValueError on wrong shapes or block_size < 1

    own_share   entries that name the block holding the query / all valid entries. 1 means that nothing else is
                attended.
    entropy     of the histogram over the other (past) blocks that a document's queries chose in one set, divided by the
                log of how many past blocks the document has; mean over (document, set), weighted by entries. 1 is a
                uniform histogram, 0 is one block chosen by all. Uniformly random routing stays a little below 1,
                because early blocks are visible to more queries. Documents with fewer than two past blocks are left
                out.
    union_128   distinct past blocks chosen by 128 consecutive queries of one document in one set, divided by k - 1;
                mean over the tiles whose 128 queries all chose k - 1 past blocks. 1 means that the tile agrees; it is
                the factor by which a kernel that visits the union of a tile does more work than the selection asks for.
                NaN for k = 1.

    No host sync; memory O(T * S * k).
    """
    if ids_TSk.ndim != 3 or ids_TSk.shape[0] != packing.num_queries:
        raise ValueError(
            f"selection ids have shape {list(ids_TSk.shape)}; expected [T, S, k] with T = {packing.num_queries} queries"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    own_T = torch.div(packing.query_key_position(), block_size, rounding_mode="floor")
    valid_TSk = ids_TSk >= 0
    is_own_TSk = valid_TSk & (ids_TSk == own_T[:, None, None])
    past_TSk = valid_TSk & ~is_own_TSk
    return {
        "own_share": is_own_TSk.sum() / valid_TSk.sum(),
        "entropy": _past_entropy(ids_TSk, past_TSk, packing, block_size),
        "union_128": tile_union(ids_TSk, past_TSk, packing, block_size),
    }


def _past_entropy(ids_TSk: Tensor, past_TSk: Tensor, packing: Packing, block_size: int) -> Tensor:
    sets = ids_TSk.shape[1]
    offsets_N = packing.unit_offsets(block_size)
    blocks_N = offsets_N.diff()
    num_units = (
        packing.num_units_bound(packing.num_queries, block_size)
        if packing.self_attention
        else packing.num_docs * -(-packing.max_k // block_size)
    )
    set_S = torch.arange(sets, device=ids_TSk.device)
    slot_TSk = (offsets_N[packing.query_doc()][:, None, None] + ids_TSk) * sets + set_S[:, None]
    # One slot more than there are units takes what is not counted.
    slot_TSk = slot_TSk.where(past_TSk, num_units * sets)
    count = slot_TSk.new_zeros(num_units * sets + 1).scatter_add_(0, slot_TSk.flatten(), past_TSk.flatten().long())
    count_US = count[:-1].view(num_units, sets).double()

    doc_U = doc_of_rows(offsets_N, num_units)
    total_NS = count_US.new_zeros(packing.num_docs, sets).index_add_(0, doc_U, count_US)
    clogc_NS = torch.zeros_like(total_NS).index_add_(0, doc_U, torch.xlogy(count_US, count_US))
    candidates_N1 = (blocks_N - 1 if packing.causal else blocks_N)[:, None]
    counted_NS = (total_NS > 0) & (candidates_N1 > 1)
    entropy_NS = total_NS.clamp(min=1).log() - clogc_NS / total_NS.clamp(min=1)
    share_NS = entropy_NS / candidates_N1.clamp(min=2).double().log()
    weight_NS = total_NS.where(counted_NS, 0.0)
    return ((weight_NS * share_NS).sum() / weight_NS.sum()).float()


def tile_union(ids_TSk: Tensor, past_TSk: Tensor, packing: Packing, block_size: int, rows: int = UNION_ROWS) -> Tensor:
    """The `union_128` of `selection_stats` for tiles of `rows` queries; past_TSk marks the ids of past blocks."""
    k = ids_TSk.shape[2]
    if k < 2:
        return torch.full((), math.nan, device=ids_TSk.device)
    union_RS, measured_RS = tile_unions(ids_TSk, past_TSk, packing, block_size, rows)
    return union_RS.where(measured_RS, 0).sum() / ((k - 1) * measured_RS.sum())


def tile_unions(
    ids_TSk: Tensor, past_TSk: Tensor, packing: Packing, block_size: int, rows: int
) -> tuple[Tensor, Tensor]:
    """([R, S] int64 distinct past blocks of each tile of `rows` queries, [R, S] bool whether it can be measured).

    A tile can be measured if it has `rows` queries that all chose k - 1 past blocks; past_TSk marks these in ids_TSk.
    """
    _, sets, k = ids_TSk.shape
    tile_T = packing.row_of_query(rows)
    num_tiles = packing.num_rows_bound(rows)
    full_TS = (past_TSk.sum(-1) == k - 1).long()
    measured_RS = full_TS.new_zeros(num_tiles, sets).index_add_(0, tile_T, full_TS) == rows

    # Distinct (tile, set, block) triples: sort their numbers and count where the number changes. A bitmap of tiles x
    # blocks would be quadratic in the length, and torch.unique would synchronise.
    blocks = packing.max_k // block_size + 1
    set_S = torch.arange(sets, device=ids_TSk.device)
    number_TSk = ((tile_T[:, None] * sets + set_S)[:, :, None]) * blocks + ids_TSk
    number = number_TSk.where(past_TSk, num_tiles * sets * blocks).flatten().sort().values
    is_new = torch.ones_like(number)
    is_new[1:] = (number[1:] != number[:-1]).long()
    union = number.new_zeros(num_tiles * sets + 1).scatter_add_(0, number // blocks, is_new)
    return union[:-1].view(num_tiles, sets), measured_RS


def block_fields(decisions: Mapping[str, Any], packing: Packing) -> dict[str, Tensor]:
    """Event fields `block_own_share`, `block_entropy`, `block_union_128`: means over the layers that could be measured.

    decisions   what `LayerContext.probe` collected in one micro-batch; entries that are not a Selection are passed over
    returns     scalars on the device, or {} if no layer selected blocks

    Worth a fraction of a forward pass at most, but not nothing (it sorts all ids): call it on logging steps only.
    """
    stats: list[dict[str, Tensor]] = []
    for value in decisions.values():
        if isinstance(value, Selection):
            ids = value.ids if value.row_size == 1 else value.ids[packing.row_of_query(value.row_size)]
            stats.append(selection_stats(ids, packing, value.unit))
    if not stats:
        return {}
    return {f"block_{name}": torch.stack([layer[name] for layer in stats]).nanmean() for name in stats[0]}


def speed_fields(
    lap: StepTime, tokens: int, training_flops: float, peaks: Mapping[str, float | None]
) -> dict[str, Callable[[], float]]:
    """Event fields `step_s`, `tokens_per_s` and one MFU per peak, as functions that are evaluated at the log's flush.

    lap             time of the step
    tokens          tokens of the step, over all ranks
    training_flops  3 x Cost.model_flops of the step, over all ranks
    peaks           field name -> FLOP/s of all devices together; a name whose peak is None is left out
    """

    def per_second(amount: float) -> Callable[[], float]:
        return lambda: amount / max(lap.seconds(), 1e-12)

    utilisations = {name: per_second(training_flops / peak) for name, peak in peaks.items() if peak is not None}
    return {"step_s": lap.seconds, "tokens_per_s": per_second(tokens), **utilisations}


def mfu(training_flops: float, seconds: float, peak: float | None) -> float | None:
    """Model FLOP utilisation in 0..1, or None if the peak is not known.

    training_flops  FLOPs of one step as the mathematics needs them: 3 x Cost.model_flops (causal half, selected blocks,
                    active experts, head; no recomputation, gates or optimizer)
    seconds         duration of the step
    peak            FLOP/s of all devices together, from `peak_flops` or `measure_peak_flops`
    """
    if peak is None:
        return None
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"mfu needs seconds > 0 and peak > 0; got seconds={seconds}, peak={peak}")
    return training_flops / seconds / peak


def peak_flops(device: torch.device | str, *, measured: bool = False) -> float | None:
    """Dense bf16 FLOP/s of one device, as stated or as measured with a large matmul: H100 and H200 (SXM), else None."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # The PCIe and NVL boards of the same chip run at lower clocks.
    if any(chip in name for chip in ("H100", "H200")) and not any(board in name for board in ("PCIe", "NVL")):
        return HOPPER_MEASURED_FLOPS if measured else HOPPER_PEAK_FLOPS
    return None


@functools.cache
def measure_peak_flops(
    device: torch.device | str, dtype: torch.dtype = torch.float32, size: int = 1024, seconds: float = 0.3
) -> float:
    """FLOP/s of the fastest size-cubed matmul seen within about `seconds`: a stand-in for a stated peak.

    A process measures once.
    """
    if size < 1 or seconds <= 0:
        raise ValueError(f"measure_peak_flops needs size >= 1 and seconds > 0; got size={size}, seconds={seconds}")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    b = torch.randn(size, size, generator=generator).to(device, dtype)
    out = torch.mm(a, b)
    best = math.inf
    deadline = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < deadline:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory_gb(device: torch.device | str) -> float:
    """Peak memory in GB (1e9 bytes): what torch allocated at most on CUDA, the resident set of the process elsewhere.

    NaN on systems that do not report a peak resident set (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux reports KiB, macOS bytes.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite: Sequence[float] = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
