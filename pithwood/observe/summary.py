"""The end of a run: `summary.json`, and a few lines that say what was learned and what to try next."""

from __future__ import annotations

import json
import math
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pithwood.observe.console import format_count, format_duration
from pithwood.observe.events import restore_floats, to_json, write_atomically

SUMMARY_FILE = "summary.json"


def write_summary(run_dir: Path | str, summary: Mapping[str, Any]) -> Path:
    """Write summary.json into the run folder, whole or not at all; returns its path. NaN becomes "nan"."""
    path = Path(run_dir) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (to_json(dict(summary), indent=2) + "\n").encode())
    return path


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was learned, where it lies, and three commands to try next, one line each.

    Keys that are read, all optional but `recipe` and `run_dir`:
    recipe                      as given to `pithwood train`
    run_dir                     the run folder
    steps, tokens, seconds      finished steps, tokens trained on, wall seconds over all sittings
    validation_bits_per_byte, validation_loss
    validation_bits_per_byte/<part>, epochs
                                of a mixture, by part; epochs is an object
    gzip_bits_per_byte          `gzip -9` of the same validation bytes
    interrupted                 number of the signal that stopped the run, None if it ran to its end
    command                     the command of this run without its length: continues it if it was interrupted, and
                                with another length trains on
    program                     how the user calls pithwood; default "pithwood"
    prompt                      a prompt in the language of the corpus
    override                    an override worth trying, such as "model.attention.top_k=4"
    """
    recipe, run_dir = str(summary["recipe"]), str(summary["run_dir"])
    steps = summary.get("steps")
    lines = [_learned(summary), *_by_part(summary)]
    spent = []
    if steps is not None:
        spent.append(f"{steps:,} steps")
    if summary.get("tokens") is not None:
        spent.append(f"{format_count(summary['tokens'])} tokens")
    if summary.get("seconds") is not None:
        spent.append(format_duration(summary["seconds"]))
    lines.append(f"run folder: {run_dir}" + (f" ({', '.join(spent)})" if spent else ""))

    if summary.get("interrupted") is not None:
        name = signal.Signals(summary["interrupted"]).name
        command = summary.get("command") or f"pithwood train {shlex.quote(recipe)}"
        what = "and saved" if steps else "before a step was taken"
        return [f"stopped by {name} {what}; continue with: {command}", *lines[1:]]

    program = str(summary.get("program") or "pithwood")
    train = f"{program} train {shlex.quote(recipe)}"
    prompt = summary.get("prompt") or "def "
    tries = [("sample from it", f"{program} generate {shlex.quote(run_dir)} --prompt {shlex.quote(prompt)}")]
    if summary.get("override"):
        tries.append(("change one thing", f"{train} {shlex.quote(summary['override'])}"))
    elif steps:
        same = summary.get("command") or train
        tries.append(("train on, twice as long", f"{same} steps={2 * int(steps)}"))
    if recipe == "demo":
        tries.append(("compare with full attention", f"{program} train demo_dense"))
    elif recipe == "demo_dense":
        tries.append(("compare with sparse attention", f"{program} train demo"))
    else:
        tries.append(("see the other recipes", f"{program} recipes"))
    width = max(len(what) for what, _ in tries)
    return [*lines, "try next:", *(f"  {what:<{width}}  {command}" for what, command in tries)]


def _learned(summary: Mapping[str, Any]) -> str:
    bits, gzip_bits = summary.get("validation_bits_per_byte"), summary.get("gzip_bits_per_byte")
    if bits is None:
        return "no validation was run"
    if not math.isfinite(bits):
        return f"validation bits per byte is {bits}: training diverged; try a lower learning rate"
    text = f"validation: {bits:.3f} bits per byte"
    if summary.get("validation_loss") is not None:
        text += f" (loss {summary['validation_loss']:.3f})"
    if gzip_bits is None or not math.isfinite(gzip_bits) or gzip_bits <= 0:
        return text
    share = abs(1 - bits / gzip_bits)
    where = (
        f"{share:.0%} below" if bits < gzip_bits else "not below" if bits < gzip_bits * 1.005 else f"{share:.0%} above"
    )
    return f"{text}, {where} gzip -9 of the same bytes ({gzip_bits:.3f})"


def _by_part(summary: Mapping[str, Any]) -> list[str]:
    names = [key.partition("/")[2] for key in summary if key.startswith("validation_bits_per_byte/")]
    epochs = summary.get("epochs") or {}
    parts = [
        f"{name} {summary[f'validation_bits_per_byte/{name}']:.3f}"
        + (f" after {epochs[name]:.2g} epochs" if name in epochs else "")
        for name in names
    ]
    return [f"  bits per byte by part: {', '.join(parts)}"] if parts else []


def read_summary(run_dir: Path | str) -> dict[str, Any]:
    """The summary of a finished run, NaN and infinities as floats. Raises FileNotFoundError if the run has none."""
    return restore_floats(json.loads((Path(run_dir) / SUMMARY_FILE).read_bytes()))
