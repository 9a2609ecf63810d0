"""Write results files: every published figure comes out of one, with its command, commit, device and versions."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pithwood.observe.events import to_json, write_atomically

FOLDER = Path(__file__).parent / "results"


def _commit() -> str:
    """Hash of HEAD, with "+changes" if tracked files differ from it; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], check=False).returncode
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


def write_results(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write `<folder>/<name>.json` (default bench/results/<device>) with this process's command; returns the path."""
    content = {
        "name": name,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": COMMIT,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(),
        "versions": {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        },
        "rows": rows,
    }
    path = (folder or FOLDER / device_name()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())
    return path


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
