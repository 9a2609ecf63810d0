"""What the attention benchmark measures: shapes, presets, and the least that each needs of a machine.

Legend: T packed tokens, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

PASSES = ("fwd", "fwd+bwd")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
BACKWARD = 2.5
"""FLOPs of a backward pass per forward FLOP: five matrix products instead of two."""


@dataclass(frozen=True)
class Shape:
    """Packed documents and the tensors of one attention layer over them."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bf16"
    inputs: str = "random"
    """"random" (normal) or "trained"."""
    source: str = ""
    """Of trained inputs: RUN@STEP."""
    layer: int | None = None
    """Of trained inputs: the layer whose q, k, v they are."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def mixed(self) -> bool:
        """True if the documents are not all of one length."""
        return len(set(self.lengths)) > 1

    def describe(self) -> str:
        docs = (
            f"{len(self.lengths)} x {self.length}" if not self.mixed else f"{len(self.lengths)} docs to {self.length}"
        )
        where = "" if self.layer is None else f", layer {self.layer}"
        return f"{docs}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.dtype}{where}"


@dataclass(frozen=True)
class Case:
    """One thing to measure, whatever implements it: MoBA with (block_size, top_k), or dense attention (both None)."""

    shape: Shape
    pass_: str
    block_size: int | None = None
    top_k: int | None = None

    @property
    def op(self) -> str:
        return "dense" if self.block_size is None else "moba"

    @property
    def blocks(self) -> tuple[int, int]:
        """(block size, top k) of a MoBA case."""
        if self.block_size is None or self.top_k is None:
            raise ValueError("a dense case has no blocks")
        return self.block_size, self.top_k

    def columns(self) -> dict[str, Any]:
        """The fields of a results row that say what was measured."""
        s = self.shape
        trained = {"source": s.source, "layer": s.layer} if s.inputs == "trained" else {}
        return {
            "op": self.op,
            "pass": self.pass_,
            "length": s.length,
            "lengths": list(s.lengths) if s.mixed else None,
            "sequences": len(s.lengths),
            "heads": s.heads,
            "kv_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "block_size": self.block_size,
            "top_k": self.top_k,
            "dtype": s.dtype,
            "inputs": s.inputs,
            **trained,
        }


KEY_COLUMNS = (
    "op", "impl", "pass", "length", "lengths", "sequences", "heads", "kv_heads", "head_dim", "block_size", "top_k",
    "dtype", "inputs", "source", "layer",
)  # fmt: skip


def row_key(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells rows of attention.json apart."""
    return tuple(str(row.get(column)) for column in KEY_COLUMNS)


def row_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row of attention.json stands: peaks, then heads by heads short inputs before long ones, MoBA first."""
    if row["op"] == "peak":
        return (0,)
    return (
        *(1, row["inputs"], row.get("layer") or 0, -row["head_dim"], row["heads"], row["kv_heads"], row["dtype"]),
        *(row["lengths"] is not None, row["length"], row["sequences"], row["op"] == "dense", row["impl"]),
        *(row["block_size"] or 0, row["top_k"] or 0, row["pass"]),
    )


@dataclass(frozen=True)
class Work:
    """What a case needs at least, however it is computed."""

    useful_flops: float
    """Products with visible keys: 4 K per (query, key) pair and head forward, BACKWARD times that in backward."""
    gate_flops: float
    """Scores of all candidate blocks, forward only; counted in the floor, not as useful."""
    bytes: float
    """Inputs and outputs once each: q, k, v, o forward; in backward again, with dO, dq, dk, dv."""

    def floor_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Time at the given peaks, whichever of the two takes longer."""
        return 1e3 * max((self.useful_flops + self.gate_flops) / flops_per_s, self.bytes / bytes_per_s)


def work_of(case: Case) -> Work:
    """Exact from the lengths. `specs` of MoBA count the same with N (k - 1) pairs and half a block per query."""
    s = case.shape
    visible = gate = 0.0
    for length in s.lengths:
        if case.block_size is None or case.top_k is None:
            visible += length * (length + 1) / 2
            continue
        size, past = case.block_size, case.top_k - 1
        full, rest = divmod(length, size)
        # queries of block c see min(c, k - 1) past blocks, and score c candidates where that is a choice
        counts = [(c, size) for c in range(full)] + ([(full, rest)] if rest else [])
        visible += full * size * (size + 1) / 2 + rest * (rest + 1) / 2
        visible += sum(min(c, past) * queries for c, queries in counts) * size
        gate += sum(c * queries for c, queries in counts if c > past)
    forward = 4.0 * s.heads * s.head_dim * visible
    element = DTYPE_BYTES[s.dtype] * s.tokens * s.head_dim
    both = case.pass_ == "fwd+bwd"
    traffic = 2.0 * (s.heads + s.kv_heads) * element
    if both:  # read q, o, dO and k, v; write dq and dk, dv
        traffic += (4.0 * s.heads + 4.0 * s.kv_heads) * element
    return Work(forward * (1 + BACKWARD * both), 2.0 * s.heads * s.head_dim * gate, traffic)


def _cases(shapes: Iterable[Shape], blocks: Iterable[tuple[int, int]], passes: Sequence[str] = PASSES) -> list[Case]:
    return [Case(shape, p, *block) for shape, block, p in product(shapes, blocks, passes)]


ISSUE_TABLE = (
    (8192, 2, (128, 8)),
    (32768, 2, (128, 8)),
    (32768, 2, (512, 3)),
    (131072, 2, (128, 8)),
    (131072, 2, (512, 8)),
    (131072, 2, (2048, 8)),
    (1048576, 1, (128, 8)),
)
"""Length, sequences, (block size, top k)."""

SWEEP_TOKENS = 65536
"""Tokens of each row of the sweeps over length."""
SWEEP = {(128, 8): (2048, 4096, 8192, 16384, 32768, 65536), (512, 3): (3072, 6144, 16384, 32768)}
"""(block size, top k) -> lengths from 2 kB on."""

PACKED_TOKENS, PACKED_LONGEST = 131072, 32768


def mixed_lengths(tokens: int, longest: int, seed: int) -> tuple[int, ...]:
    """Document lengths from 1 to `longest`, uniform in the logarithm, in random order, that fill `tokens` exactly."""
    draw = random.Random(seed)
    lengths = [1, min(longest, tokens - 1)]
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(round(math.exp(draw.uniform(0, math.log(longest)))), left))
    draw.shuffle(lengths)
    return tuple(lengths)


def preset(name: str) -> list[Case]:
    """The MoBA cases of a preset, or of one row of the issue's; every shape among them is also measured dense.

    name    one of PRESETS, or as 128K-128x8: length, block size and top k of a row of "issue"
    """
    single = {row_name(length, block): (length, sequences, block) for length, sequences, block in ISSUE_TABLE}
    if name in single:
        length, sequences, block = single[name]
        return _cases([Shape((length,) * sequences)], [block])
    if name == "issue":
        rows = [(Shape((length,) * sequences), block) for length, sequences, block in ISSUE_TABLE]
        return [case for shape, block in rows for case in _cases([shape], [block])]
    if name in ("gqa", "d64"):
        base = Shape((1,), 32, 4) if name == "gqa" else Shape((1,), head_dim=64)
        rows = [
            (replace(base, lengths=(length,) * (SWEEP_TOKENS // length)), block)
            for block, lengths in SWEEP.items()
            for length in lengths
        ]
        return [case for shape, block in rows for case in _cases([shape], [block])]
    if name == "packed":
        lengths = mixed_lengths(PACKED_TOKENS, PACKED_LONGEST, seed=0)
        shapes = Shape(lengths), Shape(lengths, 32, 4), Shape(lengths, head_dim=64), Shape(lengths, 32, 4, 64)
        return _cases(shapes, ((128, 8), (512, 3)))
    if name == "smoke":
        return _cases([Shape((1024, 1024), 4, 2, 64), Shape((700, 1, 324), 4, 2, 64)], ((64, 3),))
    raise ValueError(f"--rows {name} is not known; choose among {', '.join((*PRESETS, *single))}")


def row_name(length: int, block: tuple[int, int]) -> str:
    """What --rows calls a row of the issue's table: 8K-128x8, ..., 1M-128x8."""
    size = f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K"
    return f"{size}-{block[0]}x{block[1]}"


PRESETS = ("issue", "gqa", "d64", "packed", "smoke")


LENGTH, BLOCKS = 8192, (128, 8)
"""What `grid` takes where nothing is given."""


def grid(wanted: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Every combination of the given values; raises ValueError if head counts do not fit.

    wanted  columns of Shape, "blocks" [(block size, top k)], "pass", "length" and "sequences", or "documents" for one
            packing of documents of these lengths; the default is one row of the issue table
    """
    if "documents" in wanted:
        all_lengths = [tuple(wanted["documents"])]
    else:
        sequences, lengths = wanted.get("sequences", [2]), wanted.get("length", [LENGTH])
        all_lengths = [(length,) * count for length, count in product(lengths, sequences)]
    shapes = []
    for doc_lengths, heads in product(all_lengths, wanted.get("heads", [16])):
        for kv_heads, dim, dtype in product(
            wanted.get("kv_heads", [heads]), wanted.get("head_dim", [128]), wanted.get("dtype", ["bf16"])
        ):
            if heads % kv_heads:
                raise ValueError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
            shapes.append(Shape(doc_lengths, heads, kv_heads, dim, dtype))
    return _cases(shapes, wanted.get("blocks", [BLOCKS]), wanted.get("pass", PASSES))


def dense_cases(cases: Iterable[Case]) -> list[Case]:
    """Dense attention once for every shape and pass among the cases."""
    return list(dict.fromkeys(replace(case, block_size=None, top_k=None) for case in cases))


def check_case(case: Case) -> Case:
    """A smaller case that meets the same code: same head dim, ratio of heads, blocks and dtype, more blocks than top k.

    Its documents end inside a block unless all documents of the case have one length that does not.
    """
    s = case.shape
    block, k = case.block_size or 128, case.top_k or 1
    enough = max((k + 2) * block, 1024)
    ratio = s.heads // s.kv_heads
    kv_heads = min(s.kv_heads, max(1, 4 // ratio))
    if s.mixed:
        lengths = tuple(min(length, s.length) for length in (enough + 17, 1, enough // 3 + 5))
    else:
        lengths = (min(enough, s.length),) * min(2, len(s.lengths))
    shape = Shape(lengths, kv_heads * ratio, kv_heads, s.head_dim, s.dtype)
    return replace(case, shape=shape)


def narrowed(cases: list[Case], wanted: Mapping[str, Sequence[Any]]) -> list[Case]:
    """The cases whose columns have one of the wanted values; ValueError names what there is if none is left."""
    kept = cases
    for column, values in wanted.items():
        before = kept
        kept = [case for case in kept if _value(case, column) in values]
        if not kept:
            have = sorted({str(_value(case, column)) for case in before})
            raise ValueError(f"no row has {column} in {list(values)}; the chosen rows have {', '.join(have)}")
    return kept


def _value(case: Case, column: str) -> Any:
    return case.blocks if column == "blocks" else case.columns()[column]
