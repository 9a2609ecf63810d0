"""How far a long piece of work is: a bar where there is one, otherwise a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with one line of text at each stage."""
Bar = Callable[[str, int, int | None], None]
"""Called with the stage, the bytes of text that are done, and those to do (None if unknown)."""

LINE_EVERY_S = 15.0


class Work:
    """Stages of a piece of work, counted in bytes of text."""

    def __init__(self, tell: Progress, bar: Bar | None = None) -> None:
        self.tell = tell
        self._bar = bar
        self.begin("", None)

    def begin(self, stage: str, total: int | None) -> None:
        """Start a stage; total in bytes, None if unknown."""
        self._stage, self._total, self._done = stage, total, 0
        self._began = self._told = time.monotonic()
        if self._bar is not None and stage:
            self._bar(stage, 0, total)

    def advance(self, size: int) -> None:
        """So many more bytes are done."""
        self._done += size
        if self._bar is not None:
            self._bar(self._stage, self._done, self._total)
            return
        now = time.monotonic()
        if now - self._told >= LINE_EVERY_S:
            self._told = now
            of_all = f" of {self._total / 1e6:.0f} MB, {self._done / self._total:.0%}" if self._total else " MB"
            speed = self._done / 1e6 / (now - self._began)
            self.tell(f"corpus: {self._stage} {self._done / 1e6:.0f}{of_all}, {speed:.1f} MB/s")
