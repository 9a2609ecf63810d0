"""Rows of train.json in words."""

from __future__ import annotations

from typing import Any

from pithwood.bench.results import Row
from pithwood.bench.train_rows import measured, profiled_slower
from pithwood.observe.step_parts import EXCHANGE, IDLE


def attention_words(attention: dict[str, Any]) -> str:
    """ "full attention", "MoBA (128, 8)"."""
    if attention["op"] == "moba":
        return f"MoBA ({attention['block_size']}, {attention['top_k']})"
    return f"{attention['op']} attention"


def length_words(tokens: int) -> str:
    """4096 as 4K, 1048576 as 1M; other numbers as they are."""
    if tokens and tokens % 2**20 == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens and tokens % 2**10 == 0 else f"{tokens}"


def mesh_words(mesh: dict[str, int]) -> str:
    """ "dp_shard 2, ep 2"; nothing for one process."""
    return ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)


def workload_words(row: Row) -> str:
    """What a row trains, in a line."""
    settings = f", {' '.join(row['settings'])}" if row["settings"] else ""
    mesh = mesh_words(row["mesh"])
    where = f" on {mesh}" if mesh else ""
    return (
        f"{row['recipe']}{where}: {row['layers']} layers, {row['sequences']} x {length_words(row['seq_len'])} a step "
        f"in micro-batches of {row['micro_batch']}, {attention_words(row['attention'])}, {row['optimizer']}, "
        f"{row['precision']}, {row['routing']} routing, {row['tokens']} tokens{settings}"
    )


def row_lines(row: Row, against: dict[str, Any] | None, where: str) -> list[str]:
    """A row and its comparison with the committed one, a few lines."""
    reserved = "" if row["peak_reserved_gb"] is None else f" ({row['peak_reserved_gb']:.2f} GB reserved)"
    memory = f"peak memory {row['peak_gb']:.2f} GB{reserved}"
    if not measured(row):
        return [workload_words(row), f"no speed: {row['status']}; {memory}"]
    utilisation = ", ".join(
        f"{100 * row[name]:.1f} % {words}"
        for name, words in (("mfu", "MFU"), ("mfu_measured", "of the measured peak"))
        if row.get(name) is not None
    )
    lines = [
        workload_words(row),
        f"{row['tokens_per_s']:,.0f} tokens/s (spread {row['spread']:,.0f}); {row['step_ms']:,.1f} ms a step "
        f"(spread {row['step_spread_ms']:,.1f}), median of {row['steps']} after {row['dropped']} dropped",
        *([utilisation] if utilisation else []),
        f"{memory}; first step done {row['first_step_s']:.1f} s after the command; loss {row['loss']:.4f}",
    ]
    if row["breakdown"] is not None:
        lines += breakdown_lines(row)
    if against is None:
        return [*lines, f"no committed row of this workload to compare with ({where})"]
    memory = "" if against["memory"] is None else f", {100 * (against['memory'] - 1):+.1f} % memory"
    return [
        *lines,
        f"against {against['tokens_per_s']:,.0f} tokens/s of {against['from']}: {100 * (against['speed'] - 1):+.1f} % "
        f"speed{memory}",
    ]


def breakdown_lines(row: Row) -> list[str]:
    """ms of each part of the step, its share and its floor, a line each; where they do not add up to the timed step, a
    line that says of which steps they are."""
    breakdown = row["breakdown"]
    total = breakdown["total_ms"]
    lines = [f"    {'part':<20}{'ms':>10}{'share':>8}{'floor ms':>10}"]
    for part, ms in breakdown["ms"].items():
        floor = breakdown["floor_ms"].get(part)
        lines.append(f"    {part:<20}{ms:>10.2f}{ms / total:>8.1%}" + ("" if not floor else f"{floor:>10.2f}"))
    floors = sum(breakdown["floor_ms"].values())
    lines.append(f"    {'all':<20}{total:>10.2f}{'':>8}{floors:>10.2f}")
    if total != row["step_ms"]:
        slower = ", slower than the timed ones" if profiled_slower(row) else ""
        lines.append(f"    of profiled steps ({breakdown['profiled_ms']:,.1f} ms){slower}")
    if len(everyone := breakdown.get("processes", [])) > 1:
        lines.append(f"    {processes_line(breakdown['rank'], everyone)}")
    exchanged = breakdown.get("communication")
    return lines if exchanged is None else [*lines, f"    {communication_line(exchanged)}"]


def busy_ms(parts: dict[str, float]) -> float:
    """What of a step a process computes."""
    return sum(ms for part, ms in parts.items() if part not in (EXCHANGE, IDLE))


MOST_PROCESSES = 16
"""Processes that a line tells of."""


def processes_line(shown: int, everyone: list[dict[str, Any]]) -> str:
    """Whose parts are shown, and what all processes compute; rows {rank, ms, floor_ms, if they are known}."""
    words = []
    for each in everyone[:MOST_PROCESSES]:
        floor = f" (floor {sum(each['floor_ms'].values()):,.1f})" if "floor_ms" in each else ""
        words.append(f"rank {each['rank']} {busy_ms(each['ms']):,.1f}{floor}")
    more = [f"{len(everyone) - MOST_PROCESSES} more"] if len(everyone) > MOST_PROCESSES else []
    return f"shown is rank {shown}; ms that each computes: {', '.join([*words, *more])}"


def communication_line(found: dict[str, float]) -> str:
    """What was hidden of a step's exchanges."""
    return (
        f"exchanges: {found['ms']:.1f} ms a step in kernels of NCCL (what they wait for partners included), "
        f"{found['hidden_share']:.0%} of it hidden under other kernels"
    )


def comparison_lines(rows: list[Row]) -> list[str]:
    """Estimates beside measurements, a line each."""
    lines = [f"{'workload':<40}{'GB':>8}{'estimate':>10}{'error':>8}{'ms':>10}{'estimate':>10}{'error':>8}{'blind':>8}"]
    for row in rows:
        what = f"{row['sequences']} x {length_words(row['seq_len'])}, {attention_words(row['attention'])}"
        name = f"{what}, {row['routing']}"
        lines.append(
            f"{name:<40}{row['measured_gb']:>8.1f}{row['estimated_gb']:>10.1f}"
            f"{row['memory_error']:>+8.1%}{row['measured_ms']:>10.1f}{row['estimated_ms']:>10.1f}"
            f"{row['time_error']:>+8.1%}{row['others_error']:>+8.1%}"
        )
    return [*lines, "blind: the time by the efficiencies of the other rows alone"]
