"""The event log of a run: each step emits one event, sinks read them, and nothing waits for the device between flushes.

An event is a flat dict with `kind`, `step` (optimizer steps finished), `time` (Unix seconds) and its kind's fields;
docs/events.md has them all, with meaning and unit.

run         a run starts at step 0          resume      a run continues after `step`
train       every step                      validation  after a validation
checkpoint  one was saved                   skip        the update of this step was not applied
phase       other settings from the next step on
spike       a step out of the ordinary      spike_step  what a step near a spike was trained on, and its norms
sink        a sink failed and is left out   done        the run reached its last step
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pithwood.errors import naming

EventKind = Literal[
    "run",
    "resume",
    "train",
    "validation",
    "checkpoint",
    "skip",
    "phase",
    "spike",
    "spike_step",
    "straggler",
    "sink",
    "done",
]

EVENTS_FILE = "events.jsonl"

_HISTORY = ("run", "resume")
"""Kinds that tell of the process, not of the training: they stay in the log whatever step is resumed."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Sink(abc.ABC):
    """A reader of events. `write` gets them in order, with host values only, a few steps at a time."""

    @abc.abstractmethod
    def write(self, events: list[dict[str, Any]]) -> None:
        """Take finished events; they must not be changed."""

    def on_step(self, step: int) -> None:
        """A train event for this step was emitted; its values come with a later `write`. Must be cheap."""
        return None

    def sync(self) -> None:
        """Make everything written so far survive a crash."""
        return None

    def close(self) -> None:
        """No more events come."""
        return None


@dataclass
class _Pending:
    """An event that waits for the next flush. Its tensors lie in one stacked copy per (device, dtype)."""

    event: dict[str, Any]
    stacks: list[tuple[list[str], Tensor]] = field(default_factory=list)
    late: dict[str, Callable[[], Any]] = field(default_factory=dict)


class EventLog:
    """Collects events, fetches their device values once every `log_every` steps, and hands them to the sinks.

    run_dir      folder of the run; events go to `events.jsonl` in it. None: keep no file (ranks other than the first)
    sinks        further readers: console, TensorBoard, W&B, trackio; one that fails is left out from there on, which
                 is said once on stderr and in the log, and the training goes on
    log_every    train events are flushed at steps divisible by this; every other kind is flushed at once
    resume_step  None appends to the file as it is. A step s first removes what a run that continues from the checkpoint
                 of step s does again, so that the file reads like that of an unbroken run: events with step > s, events
                 after the line of that checkpoint, and any `done`. `run` and `resume` stay: they tell what happened
                 to the process. Pass -1 to begin again from nothing.
    raises       ValueError if log_every < 1 or if events.jsonl holds something other than events

    A line that a killed process left half written is removed when the file is opened. For the log to be complete up to
    a checkpoint, validate first, and call `sync()` before the checkpoint takes its final name.
    """

    def __init__(
        self,
        run_dir: Path | str | None,
        sinks: Sequence[Sink] = (),
        *,
        log_every: int = 10,
        resume_step: int | None = None,
    ):
        if log_every < 1:
            raise ValueError(f"log_every={log_every} must be at least 1")
        self._log_every = log_every
        self._pending: list[_Pending] = []
        self._file = None if run_dir is None else JsonlSink(Path(run_dir) / EVENTS_FILE, resume_step)
        self._sinks = list(sinks)
        self._step = 0

    def emit(self, kind: EventKind, step: int, **fields: Any) -> list[dict[str, Any]]:
        """Record one event; returns the events that this call flushed (host values), [] while they are held back.

        A field is a JSON value, a tensor of one element on any device (copied on the device at once, so it may be
        overwritten afterwards), or a function without arguments that is called at the flush, when device times can be
        read without waiting. None fields are left out. Raises ValueError for a larger tensor or a reserved name.
        """
        pending = _Pending({"kind": kind, "step": int(step), "time": round(time.time(), 3)})
        self._step = int(step)
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
        for name, value in fields.items():
            if name in ("kind", "step", "time"):
                raise ValueError(f"event field {name!r} is set by the log; choose another name")
            if value is None:
                continue
            pending.event[name] = value
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"event field {name!r} has shape {list(value.shape)}; events hold single numbers")
                names, tensors = groups.setdefault((value.device, value.dtype), ([], []))
                names.append(name)
                tensors.append(value.detach().reshape(()))
            elif callable(value):
                pending.late[name] = value
            else:
                pending.event[name] = _plain(name, value)
        pending.stacks = [(names, torch.stack(tensors)) for names, tensors in groups.values()]
        self._pending.append(pending)
        if kind == "train":
            self._each_sink(lambda sink: sink.on_step(step))
            if step % self._log_every:
                return []
        return self.flush()

    def flush(self) -> list[dict[str, Any]]:
        """Fetch what is held back (one transfer per device), write it to the sinks, and return it."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        _fetch(pending)
        events = []
        for item in pending:
            # Only after the transfer: device times are then known without a further wait.
            for name, compute in item.late.items():
                item.event[name] = _plain(name, compute())
            events.append({name: value for name, value in item.event.items() if value is not None})
        # The file comes first, and is the only one whose failure ends the run: it is what a resume relies on.
        if self._file is not None:
            self._file.write(events)
        self._each_sink(lambda sink: sink.write(events))
        return events

    def sync(self) -> list[dict[str, Any]]:
        """Flush, and return once the file would survive a power cut; call before a checkpoint counts as complete."""
        events = self.flush()
        if self._file is not None:
            self._file.sync()
        self._each_sink(lambda sink: sink.sync())
        return events

    def close(self) -> None:
        """Flush, sync and close all sinks; calling it again does nothing."""
        self.sync()
        self._each_sink(lambda sink: sink.close())
        self._sinks = []
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _each_sink(self, act: Callable[[Sink], None]) -> None:
        """Let every sink act; the log goes on without those that fail."""
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as error:  # networks, disks and foreign packages raise whatever they like
                self._sinks.remove(sink)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                name = type(sink).__name__.removesuffix("Sink").lower()
                with contextlib.suppress(OSError):
                    print(f"logging to {name} failed and is left out from here on ({reason})", file=sys.stderr)
                # It waits for the next flush: to flush here would hide events from whoever asked for this one.
                fields = {"kind": "sink", "step": self._step, "time": round(time.time(), 3)}
                self._pending.append(_Pending({**fields, "name": name, "reason": reason}))


def _fetch(pending: list[_Pending]) -> None:
    """Replace the tensors of all events by Python numbers, with one copy to the host per device."""
    by_device: dict[torch.device, list[tuple[dict[str, Any], list[str], Tensor]]] = {}
    for item in pending:
        for names, stack in item.stacks:
            by_device.setdefault(stack.device, []).append((item.event, names, stack))
    for entries in by_device.values():
        # fp64 holds every fp32 and bf16 value and every integer below 2^53 exactly.
        values = iter(torch.cat([stack.double() for _, _, stack in entries]).tolist())
        for event, names, stack in entries:
            for name in names:
                value = next(values)
                if stack.dtype == torch.bool:
                    event[name] = bool(value)
                else:
                    event[name] = value if stack.dtype.is_floating_point else int(value)


class JsonlSink(Sink):
    """Appends one JSON object per event to a file; NaN and infinities, which JSON lacks, are strings ("nan")."""

    def __init__(self, path: Path | str, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair(self.path, resume_step)
        # Unbuffered: what was written outlives a killed process.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, events: list[dict[str, Any]]) -> None:
        data = "".join(to_json(event) + "\n" for event in events).encode()
        with naming(self.path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """All events of a log, in order; `path` is the file or the run folder. NaN and infinities come back as floats.

    A half-written last line is passed over. Raises FileNotFoundError if there is no log, ValueError if another line is
    broken.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVENTS_FILE
    return [restore_floats(json.loads(line)) for line in _whole_lines(path)]


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text that any parser accepts: NaN and infinities as strings, paths and tuples in their plain form."""
    return json.dumps(_plain("value", value, encode=True), indent=indent, allow_nan=False, ensure_ascii=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader or a crash sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that hold a complete event; a broken one is legal at the very end only."""
    lines = path.read_bytes().split(b"\n")
    whole: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        # After a power cut the end of a file may read as zeros.
        if not line.strip(b"\0 \r"):
            continue
        if _is_event(line):
            whole.append(line)
        elif any(rest.strip(b"\0 \r") for rest in lines[number:]):
            raise ValueError(f"{path} line {number} is not an event; move the file away or restore it from a copy")
    return whole


def _is_event(line: bytes) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and "kind" in event and "step" in event


def _repair(path: Path, resume_step: int | None) -> None:
    """Drop a torn end and, when resuming, all that an unbroken run would not hold at this step."""
    if not path.exists():
        return
    lines = _whole_lines(path)
    if resume_step is not None:
        lines = _unbroken(lines, resume_step)
    content = b"".join(line + b"\n" for line in lines)
    if content != path.read_bytes():
        write_atomically(path, content)


def _unbroken(lines: list[bytes], resume_step: int) -> list[bytes]:
    """The lines that a run continued from the checkpoint of `resume_step` will not write again."""
    events = [json.loads(line) for line in lines]
    saved_at = [i for i, event in enumerate(events) if (event["kind"], event["step"]) == ("checkpoint", resume_step)]
    # What follows the checkpoint's own line at the same step (a phase, the last validation) is done again too.
    end = saved_at[-1] if saved_at else len(events)
    return [
        line
        for i, (line, event) in enumerate(zip(lines, events, strict=True))
        if event["kind"] in _HISTORY or (i <= end and event["kind"] != "done" and event["step"] <= resume_step)
    ]


def _plain(name: str, value: Any, *, encode: bool = False) -> Any:
    """The value in JSON types; with `encode`, floats that JSON lacks become strings. ValueError for other types."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if encode and not math.isfinite(number):
            return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"
        return number
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(key): _plain(f"{name}.{key}", item, encode=encode) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", item, encode=encode) for index, item in enumerate(value)]
    raise ValueError(
        f"{name!r} is a {type(value).__name__}; allowed are numbers, strings, paths, lists and dicts of them"
    )


def restore_floats(value: Any) -> Any:
    """Undo what `to_json` did to NaN and infinities, at any depth."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: restore_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_floats(item) for item in value]
    return value
