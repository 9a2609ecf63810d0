"""`pithwood bench attention`: MoBA against dense attention, each checked before it is timed.

Legend: T packed tokens, H query heads, K head dim.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pithwood.bench.breakdown import stages
from pithwood.bench.cases import KEY_COLUMNS, Case, Shape, check_case, dense_cases, work_of
from pithwood.bench.implementations import DENSE, MEAN_DTYPE, MOBA, forced_impl, implementation, misfit, route
from pithwood.bench.inputs import DTYPES, Inputs, random_inputs
from pithwood.bench.reference import masked_attention, selection_errors
from pithwood.bench.results import Row, origin
from pithwood.bench.timing import Peaks, Timer, allocated
from pithwood.ops.select.means import rounded_means
from pithwood.ops.summarise import summarise

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
"""Largest relative error ||a - b|| / ||b|| of o and of each gradient against fp64."""
COMPILE_GUESS_S = {"fa4": 60.0, "flex": 60.0}
"""Guessed seconds until an implementation has compiled its kernels, where it is not 15; for rows under a budget."""
COST_GUESS = {"pithwood": 6.0, "flex": 3.0}
"""Guessed time of a run over its floor (flex: over dense attention's), where it is not 2."""
MEASURED = "ok"


@dataclass(frozen=True)
class Options:
    implementations: tuple[str, ...]
    budget_s: float = float("inf")
    breakdown: bool = False
    command: str | None = None
    """What was called, if not this process as it is."""


@dataclass
class Bench:
    """One invocation: what it runs on, and what it has found out so far."""

    device: torch.device
    options: Options
    tell: Callable[[str], None]
    make_inputs: Callable[[Shape], Inputs]
    save: Callable[[list[Row]], object] = lambda rows: None
    """Called with all rows so far after each one: a benchmark that is cut off loses only the row it was at."""
    timer: Timer = field(init=False)
    started: float = field(default_factory=time.monotonic)
    checks: dict[tuple[str, Case], tuple[Row, str | None]] = field(default_factory=dict)
    misfits: int = 0
    """Cases that an implementation cannot run here: they have no rows."""

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)

    def left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started)

    def run(self, cases: list[Case]) -> list[Row]:
        """The peaks of the device, then a row for every case and implementation that fits it.

        Shapes go from cheap to dear by their MoBA floors, so that a budget ends among the dear ones; a shape's MoBA
        rows come before its dense ones.
        """
        # On a CPU half precision is slower or faster than fp32, as its instructions have it; a GPU's peak is bf16's.
        found = {
            name: self.timer.peaks(DTYPES[name])
            for name in dict.fromkeys(self._peak_dtype(case.shape) for case in cases)
        }
        made = origin(self.options.command)
        rows = [{**row, **made} for row in peak_rows(found)]
        for name, peaks in found.items():
            flops, copied = peaks.flops_per_s / 1e12, peaks.bytes_per_s / 1e12
            self.tell(f"peaks: matmul {flops:.3g} TFLOP/s ({name}), copy {copied:.3g} TB/s")
        # Inputs are made once for a shape: its MoBA cases first, then the dense ones.
        for shape in by_cost(cases, lambda shape: found[self._peak_dtype(shape)]):
            inputs: Inputs | None = None
            base = allocated(self.device)
            peaks = found[self._peak_dtype(shape)]
            for case, name in self._of_shape([case for case in cases if case.shape == shape]):
                row: Row = {**case.columns(), "impl": name, "status": self._reason_to_skip(case, name, peaks)}
                self.tell(f"measuring {' '.join(head_of(row).split())}")
                if row["status"] == MEASURED:
                    try:
                        inputs = self.make_inputs(shape) if inputs is None else inputs
                        row |= self._measure(case, name, inputs, base, peaks)
                    except torch.cuda.OutOfMemoryError:
                        row["status"] = "out of memory"
                    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                        # Of somebody's kernel: the other rows are still worth having.
                        text = " ".join(f"{type(error).__name__}: {error}".split())
                        row["status"] = f"failed: {text[:300]}"
                    self._forget()
                if row["status"] != MEASURED:
                    self.tell(f"no numbers: {row['status']}")
                rows.append({**row, **made})
                self.save(rows)
            del inputs
            self._forget()
        return rows

    def _peak_dtype(self, shape: Shape) -> str:
        return shape.dtype if self.device.type == "cpu" else "bf16"

    def _of_shape(self, cases: list[Case]) -> Iterator[tuple[Case, str]]:
        names = self.options.implementations
        moba = [(case, name) for case in cases for name in MOBA if name in names]
        dense = [(case, name) for name in DENSE if name in names for case in dense_cases(cases)]
        for case, name in (*moba, *dense):
            reason = misfit(name, case, self.device)
            if reason is None:
                yield case, name
                continue
            self.misfits += 1
            if case.pass_ == cases[0].pass_:
                where = f"{case.shape.describe()} {_blocks(case)}".rstrip()
                self.tell(f"not measured: {name} at {where}: {reason}")

    def _reason_to_skip(self, case: Case, name: str, peaks: Peaks) -> str:
        """ "ok", or why there is no time for a row."""
        left = self.left_s()
        if left == float("inf"):
            return MEASURED
        forward = replace(case, block_size=None, top_k=None) if name == "flex" else case
        floor_s = work_of(forward).floor_ms(peaks.flops_per_s, peaks.bytes_per_s) / 1e3
        runs = 4 if self.device.type == "cuda" else 20
        checked = (name, check_case(case)) in self.checks
        compiles_s = 0.0 if checked or self.device.type == "cpu" else COMPILE_GUESS_S.get(name, 15.0)
        need = floor_s * COST_GUESS.get(name, 2.0) * runs + compiles_s
        if need <= left:
            return MEASURED
        return f"skipped: about {need:.0f} s needed, {max(left, 0):.0f} s of --budget-s left"

    def _measure(self, case: Case, name: str, inputs: Inputs, base: int, peaks: Peaks) -> Row:
        check, fault = self._checked(case, name)
        if fault is not None:
            return {"status": f"failed its check: {fault}", "check": check}
        run = self._runner(case, name, inputs)
        run()  # compiles
        peak = self.timer.peak_bytes(run)
        if case.pass_ == "fwd":
            base += inputs.grad_o.nbytes
        timing = self.timer.measure(run, self.left_s())
        work = work_of(case)
        floor_ms = work.floor_ms(peaks.flops_per_s, peaks.bytes_per_s)
        row: Row = {
            "median_ms": timing.median_ms,
            "spread": timing.spread,
            "reps": timing.reps,
            "peak_gb": None if peak is None else (peak - base) / 1e9,
            "floor_ms": floor_ms,
            "over_floor": timing.median_ms / floor_ms,
            "tflops": work.useful_flops / timing.median_ms / 1e9,
            "routing": name.startswith("pithwood") if case.op == "moba" else None,
            "check": check,
        }
        if self.options.breakdown and name.startswith("pithwood"):
            row["breakdown"] = stages(case, forced_impl(name), inputs, self.timer)
        return row

    def _runner(self, case: Case, name: str, inputs: Inputs) -> Callable[[], object]:
        both = case.pass_ == "fwd+bwd"
        q, k, v = (x.detach().requires_grad_(both) for x in (inputs.q, inputs.k, inputs.v))
        forward = implementation(name, case, inputs.packing, (q, k, v))

        def run() -> object:
            with torch.set_grad_enabled(both):
                o = forward(q, k, v)
            return torch.autograd.grad(o, (q, k, v), inputs.grad_o) if both else o

        return run

    def _checked(self, case: Case, name: str) -> tuple[Row, str | None]:
        small = check_case(case)
        if (name, small) not in self.checks:
            self.checks[name, small] = check(small, name, random_inputs(small.shape, self.device))
            self._forget()
        return self.checks[name, small]

    def _forget(self) -> None:
        if self.device.type == "cuda":  # where memory is measured
            gc.collect()
            torch.cuda.empty_cache()


def by_cost(cases: list[Case], peaks_of: Callable[[Shape], Peaks]) -> list[Shape]:
    """The shapes of the cases, those of the cheapest MoBA first; equals stay in order."""
    cost: dict[Shape, float] = {}
    for case in cases:
        peaks = peaks_of(case.shape)
        floor_ms = work_of(case).floor_ms(peaks.flops_per_s, peaks.bytes_per_s)
        cost[case.shape] = max(cost.get(case.shape, 0.0), floor_ms)
    return sorted(cost, key=lambda shape: cost[shape])


def check(case: Case, name: str, inputs: Inputs) -> tuple[Row, str | None]:
    """Errors of an implementation against fp64 (given its own selection), and what is wrong with it, if anything."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    packing, both = inputs.packing, case.pass_ == "fwd+bwd"
    result: Row = {"length": case.shape.length, "sequences": len(case.shape.lengths), "heads": case.shape.heads}
    ids, wrong = None, 0
    if case.op == "moba":
        size, top_k = case.blocks
        ids = route(q, k, packing, case, forced_impl(name)).ids
        if ids.shape[1] != case.shape.heads:
            return result, f"its selection has {ids.shape[1]} sets for {case.shape.heads} heads"
        means = rounded_means(summarise(k, packing, size, impl="ref"), packing, size, MEAN_DTYPE, k.dtype)
        wrong = selection_errors(ids, q, means, packing.cu_q, packing.unit_offsets(size), size, top_k)
        result["wrong_selections"] = wrong
    with torch.set_grad_enabled(both):
        o = implementation(name, case, packing, (q, k, v))(q, k, v)
    grads = torch.autograd.grad(o, (q, k, v), inputs.grad_o) if both else ()
    expected = masked_attention(q, k, v, packing.cu_q, ids, case.block_size or 1, inputs.grad_o if both else None)
    for what, found in zip(("o", "dq", "dk", "dv"), (o, *grads), strict=False):
        result[what] = relative_error(found, expected[what])
    limit = TOLERANCE[case.shape.dtype]
    bad = [
        f"{what} is off by {result[what]:.2g}" for what in ("o", "dq", "dk", "dv") if not result.get(what, 0) <= limit
    ]
    if wrong:
        bad.insert(0, f"{wrong} of {q.shape[0] * q.shape[1]} selections are wrong")
    return result, ", ".join(bad) + f" (allowed {limit})" if bad else None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in fp64; inf if anything is not finite."""
    found = found.detach().double()
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def peak_rows(found: dict[str, Peaks]) -> list[Row]:
    """A row for the products of each dtype, and one for the fastest copy."""
    rows: list[Row] = [
        {"op": "peak", "impl": "matmul", "dtype": name, "tflops": peaks.flops_per_s / 1e12}
        for name, peaks in found.items()
    ]
    copied = max(peaks.bytes_per_s for peaks in found.values())
    rows.append({"op": "peak", "impl": "copy", "tb_per_s": copied / 1e12})
    return [{**row, "status": MEASURED} for row in rows]


def beside_dense(rows: list[Row]) -> list[Row]:
    """The rows, those of MoBA with how they compare with the fastest dense row of the same shape and pass, if there is.

    over_dense         median time / that of the dense row `dense_impl`
    memory_over_dense  peak memory / that row's
    length_over_kb     longest document / (block size x top k): dense attention is exact up to 1
    """
    dense: dict[str, Row] = {}
    for row in rows:
        if row["op"] == "dense" and measured(row):
            key = _same_inputs(row)
            if key not in dense or row["median_ms"] < dense[key]["median_ms"]:
                dense[key] = row
    result = []
    for row in rows:
        if row["op"] == "moba":
            row = {**row, "length_over_kb": row["length"] / (row["block_size"] * row["top_k"])}
            best = dense.get(_same_inputs(row))
            if best is not None and measured(row):
                ratio = row["median_ms"] / best["median_ms"]
                memory = row["peak_gb"] / best["peak_gb"] if row.get("peak_gb") and best.get("peak_gb") else None
                row |= {"dense_impl": best["impl"], "over_dense": ratio, "memory_over_dense": memory}
        result.append(row)
    return result


def _same_inputs(row: Row) -> str:
    return str([row.get(column) for column in KEY_COLUMNS if column not in ("op", "impl", "block_size", "top_k")])


def measured(row: Row) -> bool:
    """True for a row with numbers."""
    return row.get("status") == MEASURED


def head_of(row: Row) -> str:
    """What a row measures, in columns."""
    docs = f"{row['sequences']}x{row['length']}" if row["lengths"] is None else f"{row['sequences']}d<={row['length']}"
    blocks = "dense" if row["op"] == "dense" else f"({row['block_size']},{row['top_k']})"
    heads = f"{row['heads']}/{row['kv_heads']}x{row['head_dim']}"
    layer = "" if row.get("layer") is None else f" layer {row['layer']}"
    return f"{docs:>12} {heads:>10} {blocks:>10} {row['impl']:<16} {row['pass']:<8}{layer}"


def line_of(row: Row) -> str:
    """A row in one line."""
    head = head_of(row)
    if not measured(row):
        return f"{head} {row['status']}"
    memory = "" if row["peak_gb"] is None else f" {row['peak_gb']:7.2f} GB"
    dense = f" {row['over_dense']:6.2f} x {row['dense_impl']}" if "over_dense" in row else ""
    if row.get("memory_over_dense"):
        dense += f", memory {row['memory_over_dense']:.2f} x"
    return (
        f"{head} {row['median_ms']:10.3f} ms (iqr {row['spread']:.3f}) {row['tflops']:7.3g} TFLOP/s "
        f"{row['over_floor']:6.1f} x floor{memory}{dense}"
    )


def _blocks(case: Case) -> str:
    return "" if case.block_size is None else f"({case.block_size}, {case.top_k})"


def predicted(case: Case, peaks: Peaks) -> Row:
    """A case's columns and its floor, without running anything."""
    work = work_of(case)
    return {
        **case.columns(),
        "useful_tflop": work.useful_flops / 1e12,
        "gate_tflop": work.gate_flops / 1e12,
        "gigabytes": work.bytes / 1e9,
        "floor_ms": work.floor_ms(peaks.flops_per_s, peaks.bytes_per_s),
    }
