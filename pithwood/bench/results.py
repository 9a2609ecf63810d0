"""Results files: every published figure comes out of one, with its command, commit, device and versions."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pithwood.observe.events import to_json, write_atomically

Row = dict[str, Any]

COMMIT_VARIABLE = "PITHWOOD_COMMIT"
"""Environment variable that names the commit of code that was copied to where it runs, such as a GPU machine."""


def _commit() -> str:
    """What the environment says; else the hash of HEAD of the checkout that this code lies in, with "+changes" if
    tracked files differ from it; outside a checkout "unknown"."""
    named = os.environ.get(COMMIT_VARIABLE)
    if named:  # the copy may have brought along a checkout's folder that knows only older commits
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        if tracked.returncode:  # an installed copy inside somebody else's checkout
            return "unknown"
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed else "")


COMMIT = _commit()
"""What was checked out when the program began: the code that runs, whatever is committed meanwhile."""


def device_name() -> str:
    """Folder of this machine's results: cpu, nvidia-h200, nvidia-h200-x2, ..."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    count = torch.cuda.device_count()
    return name if count == 1 else f"{name}-x{count}"


def told(command: str) -> str:
    """The command line as results files tell it: without the folders that it used on its machine."""
    return re.sub(r" --(out|logs|runs-dir)(=| )('[^']*'|\S+)", "", command)


def origin(command: str | None = None) -> Row:
    """Where a row comes from, as columns of it: the command (default: this process's), the commit, the day."""
    command = command or shlex.join(["python", *sys.orig_argv[1:]])
    return {"command": told(command), "commit": COMMIT, "date": datetime.now(UTC).date().isoformat()}


def write_results(
    name: str, rows: list[Row], folder: Path, command: str | None = None, device: str | None = None
) -> Path:
    """Write `<folder>/<name>.json` with the command (default: this process's); returns the path.

    device  what the rows are about, if it is not the device of this machine
    """
    content = {
        "name": name,
        **origin(command),
        "device": device or device_name(),
        "versions": {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        },
        "rows": rows,
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())
    return path


def read_results(path: Path) -> dict[str, Any] | None:
    """The content of a results file, None if there is none; ValueError if it is something else or of another device."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        device, rows = content["device"], content["rows"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file ({error}); move it away or choose another --out") from None
    if device != device_name() or not isinstance(rows, list):
        raise ValueError(
            f"{path} holds results of {device}, this machine is {device_name()}; choose another --out, or leave out "
            "--append to write a new file"
        )
    return content


def merge_rows(old: list[Row], new: list[Row], key: Callable[[Row], Hashable], measured: Callable[[Row], bool]):
    """`old` with rows of equal key replaced by their `new` ones, and new keys after them.

    A new row without a measurement (skipped, out of memory) replaces no measured one.
    """
    merged = {key(row): row for row in old}
    for row in new:
        if measured(row) or not measured(merged.get(key(row), {})):
            merged[key(row)] = row
    return list(merged.values())


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
