"""What there is in a runs folder: every run's state and last numbers, read without loading a model.

A damaged run is a row like any other, with the reason; nothing here raises because of what a run folder holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pithwood.checkpoint.load import checkpoints_folder, list_checkpoints
from pithwood.checkpoint.lock import holds_lock_only
from pithwood.observe.events import EVENTS_FILE, restore_floats
from pithwood.observe.summary import SUMMARY_FILE, read_summary
from pithwood.run_folder import CONFIG_FILE, lock_holder


def list_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """A row per run folder of `runs_dir`, the one that changed last first; [] if there is no such folder."""
    if not runs_dir.is_dir():
        return []
    folders = [path for path in runs_dir.iterdir() if not path.name.startswith(".") and looks_like_run(path)]
    return sorted((describe_run(folder) for folder in folders), key=lambda row: -row["changed"])


def looks_like_run(folder: Path) -> bool:
    """Whether a folder is or was a run: it holds a run's configuration, or traces that only a run leaves together."""
    if not folder.is_dir():
        return False
    if isinstance(read_config(folder), dict) or holds_lock_only(folder):
        return True
    return (folder / ".lock").is_file() and ((folder / EVENTS_FILE).is_file() or checkpoints_folder(folder).is_dir())


def read_config(folder: Path) -> dict[str, Any] | str:
    """The plain content of a run folder's config.json, or in words why there is none."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CONFIG_FILE} is missing"
    except (OSError, ValueError) as error:
        return f"{CONFIG_FILE} cannot be read: {error}"
    if not isinstance(data, dict) or not isinstance(data.get("run"), dict) or "steps" not in data["run"]:
        return f"{CONFIG_FILE} is not the configuration of a run"
    return data


def describe_run(folder: Path) -> dict[str, Any]:
    """What is known of a run folder.

    returns  name; state: running (a process holds its lock), finished, stopped (can be resumed) or broken; reason, if
             broken; recipe, step (last one logged), steps (asked for), tokens, validation_loss,
             validation_bits_per_byte and validation_step; branched_from; checkpoints: their steps; started, changed:
             Unix seconds; bytes on disk. What is not known is None.
    """
    config = read_config(folder)
    problem = config if isinstance(config, str) else None
    if holds_lock_only(folder):
        problem = "it ended before its first step and holds nothing"
    settings = config["run"] if isinstance(config, dict) else {}
    row: dict[str, Any] = {
        "name": folder.name,
        "state": "stopped",
        "reason": None,
        "recipe": settings.get("name"),
        "step": None,
        "steps": settings.get("steps"),
        "tokens": None,
        "validation_loss": None,
        "validation_bits_per_byte": None,
        "validation_step": None,
        "branched_from": config.get("branched_from") if isinstance(config, dict) else None,
        "checkpoints": [step for step, _ in list_checkpoints(folder)],
        "started": None,
        "changed": _changed(folder),
        "bytes": disk_bytes(folder),
    }
    try:
        _add_events(row, folder / EVENTS_FILE)
        done = read_summary(folder).get("steps") if (folder / SUMMARY_FILE).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem, done = problem or f"{error}", None
    if lock_holder(folder) is not None:
        row["state"] = "running"
    elif problem is not None:
        row["state"], row["reason"] = "broken", problem
    elif done is not None and done == row["steps"]:
        row["state"] = "finished"
    return row


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; a file with several names in it counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.stat(os.path.join(root, name), follow_symlinks=False)
            except OSError:
                continue  # a run that is training removes files
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _add_events(row: dict[str, Any], path: Path) -> None:
    """Fill in what the event log says; only the few lines that matter are parsed. ValueError if a line is damaged."""
    if not path.is_file():
        return
    lines = [line.strip(b"\0 \r") for line in path.read_bytes().split(b"\n")]
    # a process that was killed may have left its last line half written
    last = max((number for number, line in enumerate(lines) if line), default=-1)
    lines = [line for number, line in enumerate(lines) if line and (number < last or line.endswith(b"}"))]
    for number, line in enumerate(lines, start=1):
        if not (line.startswith(b"{") and line.endswith(b"}")):
            raise ValueError(f"{path.name} line {number} is not an event")
    if lines:
        row["started"] = restore_floats(json.loads(lines[0])).get("time")
    if (event := _newest(lines, b"train")) is not None:
        row["step"], row["tokens"] = event["step"], event.get("tokens")
    if (event := _newest(lines, b"validation")) is not None:
        row["validation_step"] = event["step"]
        row["validation_loss"] = event.get("loss")
        row["validation_bits_per_byte"] = event.get("bits_per_byte")


def _newest(lines: list[bytes], kind: bytes) -> dict[str, Any] | None:
    mark = b'"kind": "' + kind + b'"'
    line = next((line for line in reversed(lines) if mark in line), None)
    return None if line is None else restore_floats(json.loads(line))


def _changed(folder: Path) -> float:
    """Unix seconds of the last change to the folder's log, else to its configuration, else to itself."""
    for path in (folder / EVENTS_FILE, folder / CONFIG_FILE, folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
