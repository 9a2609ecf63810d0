"""The estimate of a run as plain data and as lines of text, and beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pithwood.config import apply_overrides
from pithwood.estimate.devices import Device
from pithwood.estimate.efficiency import Efficiency, Row, efficiency
from pithwood.estimate.memory import estimate_memory
from pithwood.estimate.spread import Spread
from pithwood.estimate.time import estimate_time
from pithwood.estimate.work import step_flops
from pithwood.observe.metrics import HOPPER_MEASURED_FLOPS, HOPPER_PEAK_FLOPS, mfu
from pithwood.recipes import load_recipe
from pithwood.run import Run

MESH_SIZES = ("pp", "dp_replicate", "dp_shard", "cp", "ep")
NARROW = 10
"""A model with so many times fewer parameters a layer than any measured one is said to be narrower."""
TOO_NARROW = "efficiencies were measured on far wider models: a narrow one's products reach less, expect a longer step"


def estimate(run: Run, device: Device, rows: Sequence[Row], where: str) -> dict[str, Any]:
    """Memory by kind and time by part of one step of `run` on its mesh of devices, as JSON.

    rows, where  measured rows whose breakdowns say how efficient each part is, and the file that they come from
    """
    spread = Spread.of(run)
    return _estimate(run, device, efficiency(rows, spread.own, where), spread)


def _estimate(run: Run, device: Device, known: Efficiency, spread: Spread) -> dict[str, Any]:
    memory = estimate_memory(run, device, spread)
    time = estimate_time(run, device, known, spread)
    seconds, flops, mesh = time.step_ms / 1e3, step_flops(run, spread.model), run.mesh
    params, wide = spread.model.num_params()["total"], known.layer_parameters
    return {
        "device": device.name,
        "mesh": {name: getattr(mesh, name) for name in MESH_SIZES},
        "devices": mesh.size,
        "parameters": params,
        "memory_gb": {kind: size / 1e9 for kind, size in memory.items()},
        "peak_gb": sum(memory.values()) / 1e9,
        "device_memory_gb": device.memory_bytes / 1e9,
        "fits": sum(memory.values()) < device.memory_bytes,
        "ms": time.parts,
        "floor_ms": time.floors,
        "communication_ms": time.communication,
        "sent_ms": time.sent,
        "step_ms": time.step_ms,
        "tokens_per_s": run.samples_per_step * run.seq_len / seconds,
        "mfu": mfu(flops, seconds, HOPPER_PEAK_FLOPS * mesh.size),
        "mfu_measured": mfu(flops, seconds, HOPPER_MEASURED_FLOPS * mesh.size),
        "efficiency": known.parts,
        "efficiency_from": known.source,
        "narrower_than_measured": wide is not None and params / run.model.num_layers < wide / NARROW,
    }


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """The estimate as two tables and what they come to, in units of its size."""
    letter, count = _unit(found["parameters"], {"B": 1e9, "M": 1e6, "K": 1e3})
    memory, gb = _unit(found["peak_gb"], {"GB": 1.0, "MB": 1e-3})
    time, unit_ms = _unit(found["step_ms"], {"ms": 1.0, "us": 1e-3})
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
    lines = [
        f"{found['parameters'] / count:.2f}{letter} parameters on {found['devices']} x {found['device']}"
        + (f" ({mesh})" if mesh else ""),
        "",
        f"{'memory of a device':<22}{memory:>9}",
        *(f"{kind.replace('_', ' '):<22}{size / gb:>9.2f}" for kind, size in found["memory_gb"].items() if size),
        f"{'peak':<22}{found['peak_gb'] / gb:>9.2f}  of {found['device_memory_gb']:.1f} GB"
        + ("" if found["fits"] else ": it does not fit"),
        "",
        f"{'part of a step':<22}{time:>9}{'floor':>9}",
    ]
    for part, ms in found["ms"].items():
        floor = found["floor_ms"].get(part)
        lines.append(f"{part:<22}{ms / unit_ms:>9.1f}" + (f"{floor / unit_ms:>9.1f}" if floor else ""))
    for kind, ms in found["communication_ms"].items():
        if sent := found["sent_ms"][kind]:
            hidden = f"  of {sent / unit_ms:.1f}, the rest behind compute" if ms < sent else ""
            lines.append(f"{f'sending: {kind}':<22}{ms / unit_ms:>9.1f}{hidden}")
    rate = found["tokens_per_s"]
    each = "" if found["devices"] == 1 else f", {rate / found['devices']:,.0f} on each device"
    return [
        *lines,
        f"{'step':<22}{found['step_ms'] / unit_ms:>9.1f}",
        "",
        f"{rate:,.0f} tokens/s{each}; {found['mfu']:.1%} MFU, {found['mfu_measured']:.1%} of the measured peak",
        f"efficiency: {found['efficiency_from']}",
        *([TOO_NARROW] if found["narrower_than_measured"] else []),
    ]


def _unit(size: float, units: dict[str, float]) -> tuple[str, float]:
    """The first of these units, large ones first, that a size has at least one of, and what it is; else the last."""
    return next(((name, unit) for name, unit in units.items() if size >= unit), list(units.items())[-1])


def compare_rows(rows: Sequence[Row], device: Device, where: str) -> list[dict[str, Any]]:
    """The estimate of every measured row on one device beside its measurement.

    returns  the columns that say what was trained; measured_gb, estimated_gb, measured_ms, estimated_ms; memory_error
             and time_error, estimate over measurement - 1; others_ms and others_error, the time by the efficiencies of
             all other rows alone
    """
    compared = []
    for row in rows:
        if row["status"] != "ok":
            continue
        run = apply_overrides(load_recipe(row["recipe"]), row["overrides"])
        found = _estimate(run, device, efficiency(rows, run, where), Spread.of(run))
        others = [other for other in rows if other is not row]
        blind = estimate_time(run, device, efficiency(others, run, where)).step_ms
        columns = ("recipe", "layers", "seq_len", "sequences", "micro_batch", "attention", "routing", "settings")
        compared.append(
            {
                **{column: row[column] for column in columns},
                "measured_gb": row["peak_gb"],
                "estimated_gb": found["peak_gb"],
                "memory_error": found["peak_gb"] / row["peak_gb"] - 1,
                "measured_ms": row["step_ms"],
                "estimated_ms": found["step_ms"],
                "time_error": found["step_ms"] / row["step_ms"] - 1,
                "others_ms": blind,
                "others_error": blind / row["step_ms"] - 1,
            }
        )
    return compared
