# ruff: noqa: RUF005  (Triton cannot unpack tuples)
# mypy: disable-error-code="assignment"
"""The kernels of the gate: gate and top-k in one, in which scores live and die in registers.

A program owns TILE queries of one document and one set of heads. It walks over the document's block means in tiles and
multiplies its queries with them (16-bit operands: one chain of WGMMAs with fp32 accumulators). The means of a document
are read from L2 by every program; queries are read once and ids written once; the work is the product and a search.
There are two searches:

  podiums   Every column of the running tile keeps, for each row, its two best scores and the best of those it gave up:
            five minima and maxima a score, none of them across lanes. A score's last bits give way to the number of its
            tile. When all tiles are done, the best of the podiums are the best of the row, but in four cases: a score
            that was given up could be among them (one random row in thirty, with seven blocks to choose), the last
            chosen and the first not chosen differ at most in bits that are gone, two chosen ones of a tile likewise, or
            not every score is finite.
  rounds    A round takes the best score of every row of the tile, finds its column, strikes it out and inserts it into
            the row's sorted list: six operations a score. It happens while some row has a score that beats the worst of
            its list: about as often as the list is long in the first tile, three to five times later. It is right
            whatever the scores are: NaN, -inf, all equal.

Few blocks to choose are sought by podiums. Rows in doubt go to a list, one for every SEGMENT rows of a document and
set of heads, and a second kernel seeks their blocks by rounds, from the score on that is known to suffice: full tiles
of such rows, however they were spread. Many blocks are sought by rounds alone. The ids are the same.

What limits podiums is first the pipe that takes minima and maxima, half a warp a clock, and over long documents the
power that this and the product draw together (docs/log.md). So a product brings two tiles of columns at a time, which
the tensor cores do better than one; both lie in the same threads and share podiums.

A row's list is a tuple of row vectors, not a [TILE, list] matrix. A row vector lies in the registers of the four lanes
that hold the row's accumulators, so that a round needs no shared memory but for its one test whether all rows are done.

Rounds walk over the tiles in the order in which ties are decided, so a score found later never wins a tie, and a
strict comparison is exact. What they must not choose is NaN, which no comparison lets through: candidates that are
none, scores struck out, scores that are NaN.

Legend: T packed tokens, N documents, U units (blocks) of all documents, S selections per row, k selected per row, H
query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pithwood.ops.offsets_triton import doc_of_tile

NO_ID = tl.constexpr(0x7FFFFFFF)
"""Sorts behind every id."""


# fmt: off
@triton.jit
def podiums_kernel(
    q_ptr, means_ptr, ids_ptr, count_ptr, list_ptr, listed_ptr, cu_q_ptr, cu_k_ptr, offsets_ptr, num_docs,
    num_row_tiles, num_rows, block_size, tag_mask, stride_t, stride_h, stride_k,
    SETS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr, LOG_PADDED_K: tl.constexpr, BUDGET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    # fmt: on
    """ids and count of TILE queries by podiums of UNITS columns, except where rows are in doubt: these are listed, and
    a score that all of their best reach is left where their first id will be.

    list_ptr    [S, T] int16: rows in doubt, counted from the first of their segment, from where that row has its place
    listed_ptr  [segments, S] int32: how many
    tag_mask    1 in every bit of a score that goes to the number of a tile
    """
    # Heads fastest, for their ids share cache lines; last tiles of the batch first, for in a document they are longest.
    set_ = tl.program_id(0) % SETS
    tile = num_row_tiles - 1 - tl.program_id(0) // SETS
    doc, q_begin, q_length, k_length, first = _rows_of_tile(cu_q_ptr, cu_k_ptr, num_docs, tile, TILE)
    if first < q_length:
        shift = k_length - q_length
        row = tl.minimum(first + tl.arange(0, TILE), q_length - 1)
        own = _own_unit(row + shift, block_size)
        if CAUSAL:
            last_position = tl.minimum(first + TILE, q_length) - 1 + shift
            num_units = tl.where(last_position >= 0, last_position // block_size, 0)
            # Below this unit every row may choose every unit.
            open_units = tl.where(first + shift >= 0, (first + shift) // block_size, 0)
            num_candidates = tl.maximum(own, 0)
        else:
            num_units = (k_length + block_size - 1) // block_size
            open_units = num_units * 0 if OWN else num_units
            if OWN:
                num_candidates = tl.where(own >= 0, num_units - 1, num_units)
            else:
                num_candidates = tl.zeros([TILE], tl.int32) + num_units
        means_at = _means_at(means_ptr, offsets_ptr, doc, set_, SETS, KV_HEADS, DIM)
        # fmt: off
        q_at, q = _queries(
            q_ptr, means_at, q_begin, row, set_, stride_t, stride_h, stride_k, HEADS_PER_SET, DIM, PADDED_DIM,
            DIM_CHUNK,
        )
        podiums = _podiums(
            q, q_at, means_at, own, num_units, open_units, tag_mask, stride_h, stride_k, KV_HEADS, HEADS_PER_SET,
            CAUSAL, OWN, DIM, PADDED_DIM, DIM_CHUNK, TILE, UNITS,
        )
        # fmt: on
        ids, in_doubt, least = _best_of_podiums(podiums, num_candidates, tag_mask, BUDGET, TILE, UNITS)
        real = first + tl.arange(0, TILE) < q_length
        in_doubt = in_doubt & real
        to = (q_begin + row).to(tl.int64) * SETS + set_  # [TILE]
        _store(ids_ptr, count_ptr, ids, own, to, real, in_doubt, least, TOP_K, PADDED_K, LOG_PADDED_K, OWN, TILE)
        segment = first // SEGMENT
        listed_at = listed_ptr + (q_begin // SEGMENT + doc + segment).to(tl.int64) * SETS + set_
        place = tl.atomic_add(listed_at + tl.zeros([TILE], tl.int32), 1, mask=in_doubt, sem="relaxed")
        list_at = list_ptr + set_.to(tl.int64) * num_rows + q_begin + segment * SEGMENT
        tl.store(list_at + place, (row - segment * SEGMENT).to(tl.int16), mask=in_doubt)


# fmt: off
@triton.jit
def listed_kernel(
    q_ptr, means_ptr, ids_ptr, count_ptr, list_ptr, listed_ptr, cu_q_ptr, cu_k_ptr, offsets_ptr, num_docs,
    num_segments, num_rows, block_size, stride_t, stride_h, stride_k,
    SETS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr, LOG_PADDED_K: tl.constexpr, BUDGET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    LATER: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, SEGMENT: tl.constexpr, PARTS: tl.constexpr,
):
    # fmt: on
    """ids and count of the rows that podiums_kernel listed. Programs take the lists in turn; PARTS share a long one."""
    for item in range(tl.program_id(0), num_segments * PARTS * SETS, tl.num_programs(0)):
        set_ = item % SETS
        part = item // SETS % PARTS
        segment = num_segments - 1 - item // (SETS * PARTS)
        listed = tl.load(listed_ptr + segment.to(tl.int64) * SETS + set_)
        if part * TILE < listed:
            doc, q_begin, q_length, k_length, first = _rows_of_tile(cu_q_ptr, cu_k_ptr, num_docs, segment, SEGMENT)
            means_at = _means_at(means_ptr, offsets_ptr, doc, set_, SETS, KV_HEADS, DIM)
            list_at = list_ptr + set_.to(tl.int64) * num_rows + q_begin + first
            for begin in range(part * TILE, listed, PARTS * TILE):
                slot = begin + tl.arange(0, TILE)
                # Places past the list's end repeat its last row, so that they ask for no round of their own.
                row = first + tl.load(list_at + tl.minimum(slot, listed - 1)).to(tl.int32)
                own = _own_unit(row + k_length - q_length, block_size)
                if CAUSAL:
                    num_units = tl.maximum(tl.max(own, 0), 0)
                else:
                    num_units = (k_length + block_size - 1) // block_size
                to = (q_begin + row).to(tl.int64) * SETS + set_
                least = tl.load(ids_ptr + to * TOP_K).to(tl.float32, bitcast=True)
                # fmt: off
                _choose_by_rounds(
                    q_ptr, means_at, ids_ptr, count_ptr, row, q_begin, own, num_units, set_, slot < listed, least,
                    stride_t, stride_h, stride_k, SETS, KV_HEADS, HEADS_PER_SET, TOP_K, PADDED_K, LOG_PADDED_K, BUDGET,
                    CAUSAL, OWN, LATER, DIM, PADDED_DIM, DIM_CHUNK, TILE, UNITS,
                )
                # fmt: on


# fmt: off
@triton.jit
def rounds_kernel(
    q_ptr, means_ptr, ids_ptr, count_ptr, cu_q_ptr, cu_k_ptr, offsets_ptr, num_docs, num_row_tiles, block_size,
    stride_t, stride_h, stride_k,
    SETS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr, LOG_PADDED_K: tl.constexpr, BUDGET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    LATER: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    # fmt: on
    """ids and count of TILE queries by rounds."""
    set_ = tl.program_id(0) % SETS
    tile = num_row_tiles - 1 - tl.program_id(0) // SETS
    doc, q_begin, q_length, k_length, first = _rows_of_tile(cu_q_ptr, cu_k_ptr, num_docs, tile, TILE)
    if first < q_length:
        # Rows past the document's end repeat its last query, so that they ask for no round of their own.
        row = tl.minimum(first + tl.arange(0, TILE), q_length - 1)
        own = _own_unit(row + k_length - q_length, block_size)
        if CAUSAL:
            num_units = tl.maximum(tl.max(own, 0), 0)
        else:
            num_units = (k_length + block_size - 1) // block_size
        means_at = _means_at(means_ptr, offsets_ptr, doc, set_, SETS, KV_HEADS, DIM)
        real = first + tl.arange(0, TILE) < q_length
        least = tl.full([TILE], float("-inf"), tl.float32)
        # fmt: off
        _choose_by_rounds(
            q_ptr, means_at, ids_ptr, count_ptr, row, q_begin, own, num_units, set_, real, least, stride_t, stride_h,
            stride_k, SETS, KV_HEADS, HEADS_PER_SET, TOP_K, PADDED_K, LOG_PADDED_K, BUDGET, CAUSAL, OWN, LATER, DIM,
            PADDED_DIM, DIM_CHUNK, TILE, UNITS,
        )
        # fmt: on


@triton.jit
def _rows_of_tile(cu_q_ptr, cu_k_ptr, num_docs, tile, TILE: tl.constexpr):
    """(document, its first query, queries and keys, and the first of its queries that is in the tile)."""
    doc = doc_of_tile(cu_q_ptr, num_docs, tile, TILE)
    q_begin = tl.load(cu_q_ptr + doc)
    q_length = tl.load(cu_q_ptr + doc + 1) - q_begin
    k_length = tl.load(cu_k_ptr + doc + 1) - tl.load(cu_k_ptr + doc)
    return doc, q_begin, q_length, k_length, (tile - q_begin // TILE - doc) * TILE


@triton.jit
def _own_unit(position, block_size):
    return tl.where(position >= 0, position // block_size, -1)


@triton.jit
def _means_at(means_ptr, offsets_ptr, doc, set_, SETS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Where the means of a document and of a set's KV head begin."""
    kv_head = set_ * KV_HEADS // SETS
    return means_ptr + (tl.load(offsets_ptr + doc).to(tl.int64) * KV_HEADS + kv_head) * DIM


# fmt: off
@triton.jit
def _choose_by_rounds(
    q_ptr, means_at, ids_ptr, count_ptr, row, q_begin, own, num_units, set_, real, least, stride_t, stride_h, stride_k,
    SETS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr, LOG_PADDED_K: tl.constexpr, BUDGET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    LATER: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    # fmt: on
    """Store ids and count of TILE rows of a document, the real ones of them; all of a row's best reach `least`."""
    # fmt: off
    q_at, q = _queries(
        q_ptr, means_at, q_begin, row, set_, stride_t, stride_h, stride_k, HEADS_PER_SET, DIM, PADDED_DIM, DIM_CHUNK,
    )
    # fmt: on
    ids = ()
    if BUDGET > 0:
        # fmt: off
        ids = _rounds(
            q, q_at, means_at, own, num_units, least, stride_h, stride_k, KV_HEADS, HEADS_PER_SET, BUDGET, CAUSAL, OWN,
            LATER, DIM, PADDED_DIM, DIM_CHUNK, TILE, UNITS,
        )
        # fmt: on
    to = (q_begin + row).to(tl.int64) * SETS + set_
    none = tl.zeros([TILE], tl.int1)
    _store(ids_ptr, count_ptr, ids, own, to, real, none, least, TOP_K, PADDED_K, LOG_PADDED_K, OWN, TILE)


# fmt: off
@triton.jit
def _store(
    ids_ptr, count_ptr, ids, own, to, real, in_doubt, least,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, LOG_PADDED_K: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr,
):
    # fmt: on
    """The ids of rows, the own unit among them, ascending; of rows in doubt `least` in the first one's place."""
    if OWN:
        ids = ids + (tl.where(own >= 0, own, NO_ID),)
    for _ in tl.static_range(PADDED_K - TOP_K):
        ids = ids + (tl.full([TILE], NO_ID, tl.int32),)
    ids = _sort(ids, PADDED_K, LOG_PADDED_K)
    slot = tl.arange(0, PADDED_K)
    chosen_ids = tl.full([TILE, PADDED_K], NO_ID, tl.int32)
    count = tl.zeros([TILE], tl.int32)
    for i in tl.static_range(TOP_K):
        id_ = ids[i]
        count += (id_ != NO_ID).to(tl.int32)
        if i == 0:
            id_ = tl.where(in_doubt, least.to(tl.int32, bitcast=True), id_)
        chosen_ids = tl.where((slot == i)[None, :], id_[:, None], chosen_ids)
    tl.store(
        ids_ptr + to[:, None] * TOP_K + slot[None, :],
        tl.where(chosen_ids == NO_ID, -1, chosen_ids),
        mask=real[:, None] & (slot < TOP_K)[None, :],
    )
    tl.store(count_ptr + to, count, mask=real)


# fmt: off
@triton.jit
def _scores(
    q, q_at, means_at, unit, num_units, stride_h, stride_k,
    KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    DIM_CHUNK: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr, ALL_THERE: tl.constexpr,
):
    # fmt: on
    """[TILE, UNITS] scores of the units `unit`, 0 for those beyond the last; ALL_THERE: there are none."""
    mean_at = means_at + unit.to(tl.int64)[None, :] * (KV_HEADS * DIM)
    if DIM_CHUNK == PADDED_DIM:
        dim = tl.arange(0, PADDED_DIM)
        if ALL_THERE and DIM == PADDED_DIM:
            mean = tl.load(mean_at + dim[:, None])  # [PADDED_DIM, UNITS]
        else:
            mean = tl.load(mean_at + dim[:, None], mask=(dim < DIM)[:, None] & (unit < num_units)[None, :], other=0.0)
        score = tl.dot(q, mean, input_precision="ieee")
    else:
        score = tl.zeros([TILE, UNITS], tl.float32)
        for chunk in range(0, PADDED_DIM, DIM_CHUNK):
            some = chunk + tl.arange(0, DIM_CHUNK)
            part = _load_queries(q_at, some, stride_h, stride_k, DIM, HEADS_PER_SET, tl.float32)
            inside = (some < DIM)[:, None] & (unit < num_units)[None, :]
            mean = tl.load(mean_at + some[:, None], mask=inside, other=0.0)  # [DIM_CHUNK, UNITS]
            score = tl.dot(part, mean, score, input_precision="ieee")
    return score


@triton.jit
def _candidates(unit, own, num_units, CAUSAL: tl.constexpr, OWN: tl.constexpr):
    """[rows, units] True where a row may choose a unit."""
    if CAUSAL:
        return unit[None, :] < own[:, None]
    elif OWN:
        return (unit < num_units)[None, :] & (unit[None, :] != own[:, None])
    else:
        return (unit < num_units)[None, :] & (own == own)[:, None]


# fmt: off
@triton.jit
def _podiums(
    q, q_at, means_at, own, num_units, open_units, tag_mask, stride_h, stride_k,
    KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr,
):
    """(v1, v2, rest, broken), [TILE, UNITS] each: of every column the two best scores, tagged with their tiles, the
    best of its other scores, -inf where there is none, and 0, NaN if a score was not finite."""
    v1 = tl.full([TILE, UNITS], float("-inf"), tl.float32)
    podiums = (v1, v1, v1, tl.zeros([TILE, UNITS], tl.float32))
    pairs = open_units // (2 * UNITS)
    if means_at.dtype.element_ty == tl.float32:
        pairs = 0  # Without tensor cores a wider tile only costs registers.
    for pair in range(0, pairs):
        unit = pair * (2 * UNITS) + tl.arange(0, 2 * UNITS)
        score = _scores(
            q, q_at, means_at, unit, num_units, stride_h, stride_k, KV_HEADS, HEADS_PER_SET, DIM, PADDED_DIM, DIM_CHUNK,
            TILE, 2 * UNITS, True,
        )
        low, high = tl.split(tl.permute(tl.reshape(score, [TILE, 2, UNITS]), [0, 2, 1]))
        podiums = _mount(podiums, low, _tagged(low, 2 * pair, tag_mask))
        podiums = _mount(podiums, high, _tagged(high, 2 * pair + 1, tag_mask))
    for tile in range(2 * pairs, (num_units + UNITS - 1) // UNITS):
        unit = tile * UNITS + tl.arange(0, UNITS)
        score = _scores(
            q, q_at, means_at, unit, num_units, stride_h, stride_k, KV_HEADS, HEADS_PER_SET, DIM, PADDED_DIM, DIM_CHUNK,
            TILE, UNITS, False,
        )
        candidate = _candidates(unit, own, num_units, CAUSAL, OWN)
        podiums = _mount(podiums, score, tl.where(candidate, _tagged(score, tile, tag_mask), float("-inf")))
    return podiums
# fmt: on


@triton.jit
def _tagged(score, tag, tag_mask):
    return ((score.to(tl.int32, bitcast=True) & ~tag_mask) | tag).to(tl.float32, bitcast=True)


@triton.jit
def _mount(podiums, score, key):
    """The podiums after one more score, tagged, for each."""
    v1, v2, rest, broken = podiums
    second = tl.minimum(v1, key)
    third = tl.minimum(v2, second)
    # Infinity times 0 is NaN, and so is all that follows; this is free where maxima are what limits.
    broken = score * 0.0 + broken
    return tl.maximum(v1, key), tl.maximum(v2, second), tl.maximum(rest, third), broken


@triton.jit
def _best_of_podiums(podiums, num_candidates, tag_mask, BUDGET: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr):
    """(ids of the BUDGET best, True where they may be others, a score that all of the best reach), row vectors."""
    v1, v2, rest, broken = podiums
    column = tl.arange(0, UNITS)[None, :]
    ids = ()
    found = tl.zeros([TILE], tl.int32)
    best = tl.full([TILE], float("-inf"), tl.float32)
    in_doubt = tl.zeros([TILE], tl.int1)
    for _ in tl.static_range(BUDGET):
        best = tl.max(v1, 1)
        taken = v1 == best[:, None]
        # The column, and how many there are, in one sum.
        winner = tl.sum(tl.where(taken, column + UNITS, 0), 1)
        real = best > float("-inf")
        in_doubt = in_doubt | (real & (winner >= 2 * UNITS))
        ids = ids + (tl.where(real, (best.to(tl.int32, bitcast=True) & tag_mask) * UNITS + winner - UNITS, NO_ID),)
        found += real.to(tl.int32)
        v1 = tl.where(taken, v2, v1)
        v2 = tl.where(taken, float("-inf"), v2)
    not_chosen = tl.maximum(tl.max(v1, 1), tl.max(rest, 1))
    in_doubt = in_doubt | (
        (not_chosen > float("-inf")) & (_tagged(not_chosen, 0, tag_mask) >= _tagged(best, 0, tag_mask))
    )
    total = tl.sum(broken, 1)
    finite = total == total
    in_doubt = in_doubt | ~finite | (found < tl.minimum(num_candidates, BUDGET))
    # The bits that are gone lower a score below 0 and raise one above it.
    bits = best.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits | tag_mask, bits & ~tag_mask)
    least = tl.where(finite & (found == BUDGET), bits.to(tl.float32, bitcast=True), float("-inf"))
    return ids, in_doubt, least


# fmt: off
@triton.jit
def _rounds(
    q, q_at, means_at, own, num_units, least, stride_h, stride_k,
    KV_HEADS: tl.constexpr, HEADS_PER_SET: tl.constexpr, BUDGET: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    LATER: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    # fmt: on
    """Ids of the BUDGET best, row vectors; scores below `least` are left out."""
    values = ()
    ids = ()
    for _ in tl.static_range(BUDGET):
        values = values + (tl.full([TILE], float("nan"), tl.float32),)
        ids = ids + (tl.full([TILE], NO_ID, tl.int32),)
    num_unit_tiles = (num_units + UNITS - 1) // UNITS
    for step in range(0, num_unit_tiles):
        first_unit = (num_unit_tiles - 1 - step if LATER else step) * UNITS
        unit = first_unit + tl.arange(0, UNITS)
        # fmt: off
        score = _scores(
            q, q_at, means_at, unit, num_units, stride_h, stride_k, KV_HEADS, HEADS_PER_SET, DIM, PADDED_DIM, DIM_CHUNK,
            TILE, UNITS, False,
        )
        # fmt: on
        candidate = _candidates(unit, own, num_units, CAUSAL, OWN)
        score = tl.where(candidate & (score >= least[:, None]), score, float("nan"))
        best = tl.max(score, 1)
        # A row is done when its best score is NaN or no better than the last of a full list.
        while tl.max(((best == best) & ~(values[BUDGET - 1] >= best)).to(tl.int32), 0) > 0:
            if LATER:
                chosen = tl.max(tl.where(score == best[:, None], unit[None, :], -1), 1)
            else:
                chosen = tl.min(tl.where(score == best[:, None], unit[None, :], NO_ID), 1)
            score = tl.where(unit[None, :] == chosen[:, None], float("nan"), score)
            values, ids = _insert(values, ids, best, chosen, BUDGET)
            best = tl.max(score, 1)
    return ids


# fmt: off
@triton.jit
def _queries(
    q_ptr, means_at, q_begin, row, set_, stride_t, stride_h, stride_k,
    HEADS_PER_SET: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, DIM_CHUNK: tl.constexpr,
):
    # fmt: on
    """(where rows of a document lie, the rows); not the rows where products are cut: these load them chunk by chunk."""
    q_at = q_ptr + (q_begin + row).to(tl.int64)[:, None] * stride_t + set_.to(tl.int64) * HEADS_PER_SET * stride_h
    q = row
    if DIM_CHUNK == PADDED_DIM:
        dim = tl.arange(0, PADDED_DIM)
        q = _load_queries(q_at, dim, stride_h, stride_k, DIM, HEADS_PER_SET, means_at.dtype.element_ty)
    return q_at, q


@triton.jit
def _load_queries(at, dim, stride_h, stride_k, DIM: tl.constexpr, HEADS: tl.constexpr, dtype: tl.constexpr):
    """[TILE, dims] queries at `at` [TILE, 1], or the mean of HEADS heads in fp32."""
    at = at + dim.to(tl.int64)[None, :] * stride_k
    q = tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    if HEADS > 1:
        q = q.to(tl.float32)
        for head in range(1, HEADS):
            q += tl.load(at + tl.cast(head, tl.int64) * stride_h, mask=(dim < DIM)[None, :], other=0.0).to(tl.float32)
        q = q / HEADS
    return q.to(dtype)


@triton.jit
def _insert(values, ids, value, id_, COUNT: tl.constexpr):
    """The sorted lists with one score and its unit put before the first that it beats; the last falls off."""
    new_values = ()
    new_ids = ()
    real = value == value
    before = real  # of slot i: the new score goes before slot i - 1, which moves into slot i
    for i in tl.static_range(COUNT):
        here = real & ~(values[i] >= value)
        if i == 0:
            new_values = new_values + (tl.where(here, value, values[0]),)
            new_ids = new_ids + (tl.where(here, id_, ids[0]),)
        else:
            new_values = new_values + (tl.where(before, values[i - 1], tl.where(here, value, values[i])),)
            new_ids = new_ids + (tl.where(before, ids[i - 1], tl.where(here, id_, ids[i])),)
        before = here
    return new_values, new_ids


@triton.jit
def _sort(values, COUNT: tl.constexpr, LOG_COUNT: tl.constexpr):
    """The 2 ** LOG_COUNT row vectors of a tuple in ascending order, row by row: a bitonic network in registers."""
    for log_size in tl.static_range(1, LOG_COUNT + 1):
        for done in tl.static_range(log_size):
            values = _sort_step(values, 2**log_size, 2 ** (log_size - 1 - done), COUNT)
    return values


@triton.jit
def _sort_step(values, SIZE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    moved = ()
    for i in tl.static_range(COUNT):
        if ((i & STEP) == 0) == ((i & SIZE) == 0):
            moved = moved + (tl.minimum(values[i], values[i ^ STEP]),)
        else:
            moved = moved + (tl.maximum(values[i], values[i ^ STEP]),)
    return moved
