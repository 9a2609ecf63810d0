"""Where a thread is, told from outside: the line at work, and whether it waits for other processes."""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist

_EXCHANGES = str(Path(dist.__path__[0]))
_LIBRARIES = (sysconfig.get_paths()["stdlib"], str(Path(torch.__file__).parent), "<frozen")
_WAITING = re.compile(
    r"\b(wait|barrier|all_reduce|all_gather\w*|reduce_scatter\w*|all_to_all\w*|synchronize|item|tolist|cpu)\("
)
"""Calls that return when others have done their part: of an exchange, or of one that a device carries out."""


def place_and_waiting(thread: int | None) -> tuple[str, bool]:
    """("folder/file.py:line (function)", whether that thread waits for other processes), from its innermost frames.

    It waits if its innermost Python frame is inside torch.distributed, or stands at a call that waits for an exchange,
    or for a device, whose exchanges are what keeps it. The place is the innermost line outside torch and the standard
    library.
    """
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "unknown", False
    # a frame has no line at instructions that no line stands for
    name, line = frame.f_code.co_filename, frame.f_lineno or 0
    waits = name.startswith(_EXCHANGES) or _WAITING.search(_line(name, line)) is not None
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno or 0} ({frame.f_code.co_name})", waits


def _line(path: str, number: int) -> str:
    lines = _lines(path)
    return lines[number - 1] if 0 < number <= len(lines) else ""


@functools.lru_cache(maxsize=256)
def _lines(path: str) -> list[str]:
    """The lines of a source file; none if there is no such file, as for code that was made at run time."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return []
