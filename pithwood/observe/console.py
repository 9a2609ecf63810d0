"""Progress of a run on stderr: one live line on a terminal, one plain line per log interval anywhere else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pithwood.observe.events import Sink
from pithwood.observe.metrics import finite_mean

_SEPARATOR = " | "
_REFRESH_S = 0.1
_MIN_BAR, _MAX_BAR = 10, 40


class TimeLeft:
    """Estimates the remaining seconds of a run from its step times and the cost of the pauses that are still to come.

    total_steps, start_step   the run goes from start_step (finished) to total_steps
    validate_every            0: never; a run also validates after its last step
    save_every                likewise for checkpoints

    Steps: an exponential mean in which one slow step counts at most threefold, so that a hiccup moves the estimate
    little while a lasting change is followed within some tens of steps. The first step, which compiles and warms up, is
    dropped as soon as there is a second. Pauses: the mean of the last two of their kind; zero until one was seen.
    """

    def __init__(self, total_steps: int, start_step: int = 0, validate_every: int = 0, save_every: int = 0):
        self._total = total_steps
        self._every = {"validation": validate_every, "checkpoint": save_every}
        self._pause_s: dict[str, float] = {}
        self._step_s = math.nan
        self._seen = 0
        self._done = start_step
        self._pauses_at = {"validation": start_step, "checkpoint": start_step}

    def add_step(self, step: int, seconds: float) -> None:
        """A step was finished and took this long."""
        self._done = max(self._done, step)
        if not math.isfinite(seconds) or seconds < 0:
            return
        self._seen += 1
        if self._seen <= 2:
            self._step_s = seconds
            return
        weight = max(0.05, 1.0 / (self._seen - 1))
        self._step_s += weight * (min(seconds, 3 * self._step_s) - self._step_s)

    def add_pause(self, kind: str, step: int, seconds: float) -> None:
        """A "validation" or "checkpoint" after this step took this long."""
        self._pauses_at[kind] = max(self._pauses_at[kind], step)
        if math.isfinite(seconds):
            self._pause_s[kind] = (self._pause_s.get(kind, seconds) + seconds) / 2

    def seconds(self, step: int | None = None) -> float | None:
        """Seconds from the given step (default: the last one added) to the end, or None while nothing is known."""
        step = self._done if step is None else step
        if self._seen == 0:
            return None
        left = max(self._total - step, 0) * self._step_s
        for kind, cost in self._pause_s.items():
            every = self._every[kind]
            if every > 0:
                since = max(self._pauses_at[kind], 0)
                last = 1 if self._total % every and since < self._total else 0
                left += cost * (self._total // every - since // every + last)
        return left


class ConsoleSink(Sink):
    """Shows training on a terminal or in a log file; stdout is left alone.

    total_steps, start_step, validate_every, save_every   see `TimeLeft`
    log_every   steps per line
    stream      default stderr. On a terminal one line is redrawn in place and cut to the width; elsewhere one
                line is printed every log_every steps, and one for a validation, phase or resume.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        log_every: int = 10,
        start_step: int = 0,
        validate_every: int = 0,
        save_every: int = 0,
        stream: TextIO | None = None,
    ):
        stream = sys.stderr if stream is None else stream
        self._stream = stream
        self._total, self._log_every = total_steps, log_every
        self._step = start_step
        self._interval: list[dict[str, Any]] = []
        self._left = TimeLeft(total_steps, start_step, validate_every, save_every)
        self._fields: list[str] = []
        self._skipped = 0
        self._live: Live | None = None
        self._drawn_s = -math.inf
        if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
            console = Console(file=stream, highlight=False)
            # stdout stays as it is: with --json it carries the result.
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()

    def on_step(self, step: int) -> None:
        self._step = step
        if self._live is not None and time.monotonic() - self._drawn_s >= _REFRESH_S:
            self._draw()

    def write(self, events: list[dict[str, Any]]) -> None:
        train = [event for event in events if event["kind"] == "train"]
        for event in train:
            self._left.add_step(event["step"], event.get("step_s", math.nan))
        for event in events:
            if event["kind"] in ("validation", "checkpoint"):
                self._left.add_pause(event["kind"], event["step"], event.get("seconds", math.nan))
            self._skipped += event["kind"] == "skip"
        self._interval.extend(train)
        if train:
            self._step = train[-1]["step"]
        # A validation in the middle of an interval flushes the log too, but prints no line of its steps.
        if self._interval and (self._step % self._log_every == 0 or self._step >= self._total):
            self._fields = interval_fields(self._interval, self._skipped)
            self._interval, self._skipped = [], 0
            if self._live is None:
                self._print(_SEPARATOR.join([self._position(), *self._fields, *self._time_left()]))
        for event in events:
            line = event_line(event, self._total)
            if line is not None:
                self._print(line)
        if self._live is not None:
            self._draw()

    def close(self) -> None:
        if self._live is not None:
            # The live line erases itself; what it said last stays.
            self._live.stop()
            self._print(_SEPARATOR.join([self._position(), *self._fields]))
            self._live = None

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(line), no_wrap=True, overflow="ellipsis", crop=True)
        else:
            print(line, file=self._stream, flush=True)

    def _position(self) -> str:
        return f"step {self._step}/{self._total}"

    def _time_left(self) -> list[str]:
        seconds = self._left.seconds(self._step)
        return [] if seconds is None else [f"{format_duration(seconds)} left"]

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn_s = time.monotonic()
        width = self._live.console.width
        self._live.update(self._render(width), refresh=True)

    def _render(self, width: int) -> RenderableType:
        # Time left stands before the other numbers, so that it survives on a narrow terminal.
        line = fit_line([self._position(), *self._time_left(), *self._fields], width)
        text = Text(line, no_wrap=True, overflow="ellipsis")
        spare = width - len(line) - 1
        if spare < _MIN_BAR:
            return text
        grid = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=min(spare, _MAX_BAR))
        grid.add_row(bar, text)
        return grid


def interval_fields(train: Sequence[dict[str, Any]], skipped: int = 0) -> list[str]:
    """The numbers of one log interval as short texts, most important first: means over its steps."""
    fields = []
    # A mean over the steps that are finite would hide divergence: one that is not shows.
    losses = [event["loss"] for event in train if "loss" in event]
    bits = [event["bits_per_byte"] for event in train if "bits_per_byte" in event]
    if losses:
        fields.append(f"loss {sum(losses) / len(losses):.3f}")
    if bits:
        fields.append(f"{sum(bits) / len(bits):.3f} bits/byte")
    timed = [event for event in train if "tokens_per_s" in event and event.get("step_s", 0) > 0]
    seconds = sum(event["step_s"] for event in timed)
    if seconds > 0:
        fields.append(f"{format_count(sum(e['tokens_per_s'] * e['step_s'] for e in timed) / seconds)} tokens/s")
    utilisation = finite_mean(event["mfu"] for event in train if "mfu" in event)
    if math.isfinite(utilisation):
        fields.append(f"MFU {utilisation:.0%}")
    if skipped:
        fields.insert(0, f"{skipped} skipped")
    return fields


def event_line(event: dict[str, Any], total_steps: int) -> str | None:
    """One line for an event that deserves its own, None for the others."""
    kind, position = event["kind"], f"step {event['step']}/{total_steps}"
    if kind == "validation":
        parts = [position, "validation"]
        if "loss" in event:
            parts.append(f"loss {event['loss']:.3f}")
        if "bits_per_byte" in event:
            parts.append(f"{event['bits_per_byte']:.3f} bits/byte")
        by_part = [name.partition("/")[2] for name in event if name.startswith("bits_per_byte/")]
        if by_part:
            parts.append(", ".join(_part_text(event, name) for name in by_part))
        if "seconds" in event:
            parts.append(f"took {format_duration(event['seconds'])}")
        return _SEPARATOR.join(parts)
    if kind == "resume":
        return _SEPARATOR.join([position, "resumed", *([str(event["checkpoint"])] if "checkpoint" in event else [])])
    if kind == "spike":
        compared = f" (usual {event['usual']:.3g})" if "usual" in event else ""
        return _SEPARATOR.join(
            [position, f"spike: {event['reason']} {event['value']:.4g}{compared}", "see `pithwood report`"]
        )
    if kind == "phase":
        parts = [position, f"phase {event.get('name', event.get('index', ''))}".rstrip()]
        if "seq_len" in event:
            parts.append(f"seq_len {event['seq_len']}")
        if "shares" in event:
            parts.append(", ".join(f"{name} {share:.1%}" for name, share in event["shares"].items()))
        return _SEPARATOR.join(parts)
    return None


def _part_text(event: dict[str, Any], name: str) -> str:
    """Bits per byte of one part of a mixture, and how often its training text was read."""
    epochs = event.get(f"epochs/{name}")
    text = f"{name} {event[f'bits_per_byte/{name}']:.3f}"
    return text if epochs is None else f"{text} after {epochs:.2g} epochs"


def fit_line(parts: Sequence[str], width: int) -> str:
    """As many parts as fit into the width, from the front; the first is always there."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + len(_SEPARATOR) + len(part) > width:
            break
        line += _SEPARATOR + part
    return line


def format_duration(seconds: float) -> str:
    """Short text for a time: 0.42s, 8.1s, 45s, 3m20s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.995:
        return f"{seconds:.2f}s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(count: float) -> str:
    """Short text for a count: 950, 12.3k, 4.1M, 1.20B."""
    if not math.isfinite(count):
        return "?"
    for limit, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        # 999,960 would otherwise round to 1000.0k.
        if abs(count) >= limit * (1 - 0.5 * 10 ** -(digits + 3)):
            return f"{count / limit:.{digits}f}{unit}"
    return f"{count:.0f}"
