"""Where the programs in this folder write their results files: bench/results/<device>/<name>.json of this checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pithwood.bench import results

FOLDER = Path(__file__).parent / "results"


def write_results(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write `<folder>/<name>.json` (default bench/results/<device>) with this process's command; returns the path."""
    return results.write_results(name, rows, folder or FOLDER / results.device_name())
