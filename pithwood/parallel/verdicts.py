"""What the signs of life of a run's processes say: who is dead, who hangs, who is slower than the others.

Plain functions over what every process tells about itself once in a while (`Beat`); `faults.py` collects it and acts.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

Sign = Literal["alive", "long", "late", "done"]
BOUNDS_VARIABLE = "PITHWOOD_BOUNDS"
_MARKS: dict[Sign, str] = {"alive": ".", "long": ",", "late": "!", "done": "/"}


@dataclass(frozen=True)
class Bounds:
    """How long what may take, in seconds unless said otherwise."""

    beat_s: float = 1.0
    """Between two signs of life of a process."""
    silent_s: float = 18.0
    """Without a sign of life a process counts as dead; one that died on the host of another is seen within a beat."""
    hang_s: float = 30.0
    """Without a new phase a process counts as hanging, at least."""
    hang_steps: float = 5.0
    """The same, in median steps; the longer of the two counts."""
    startup_s: float = 600.0
    """The same, until the first step is done."""
    grace_s: float = 5.0
    """From the news of a failure until a process that has not left by itself is ended."""
    sample_s: float = 0.1
    """Between two looks at what the training thread waits for."""
    window_s: float = 20.0
    """Over which the work of a step is averaged before processes are compared."""
    straggler_share: float = 0.2
    """Work of a step above the median process's at which a process is a straggler."""
    straggler_windows: int = 3
    """Windows in a row for which it must be one before that is told."""

    @staticmethod
    def from_environment() -> Bounds:
        """Those of a run: other numbers than here as the variable PITHWOOD_BOUNDS says, "hang_s=120,silent_s=30".

        raises  ValueError for names that are none, and values that are no positive number
        """
        given, known = os.environ.get(BOUNDS_VARIABLE, ""), asdict(Bounds())
        changes: dict[str, Any] = {}
        for part in filter(None, given.split(",")):
            name, _, text = part.partition("=")
            if name not in known:
                raise ValueError(
                    f"{BOUNDS_VARIABLE} holds {part!r}; write name=number, with a name of {', '.join(known)}"
                )
            try:
                changes[name] = type(known[name])(text)
            except ValueError:
                changes[name] = math.nan
            if not changes[name] > 0:
                raise ValueError(f"{BOUNDS_VARIABLE} holds {part!r}; write a positive number after {name}=")
        return Bounds(**changes)


@dataclass(frozen=True)
class Beat:
    """A sign of life: where a process is."""

    count: int
    """Signs of life so far."""
    sign: Sign
    """long: in a phase that may take long by a limit of its own (it saves, it validates). late: in its phase for longer
    than that may take. done: it left in good order."""
    step: int
    """Optimizer step at work; -1 before the first."""
    phases: int
    """Phases begun."""
    phase: str
    age_s: float
    """Since the phase began."""
    waits: bool
    """Whether its training thread waits for others."""
    place: str
    """Innermost line of the training thread outside libraries."""
    window: int
    """Number of the last window that is complete; 0 before the first."""
    worked_s: float
    """Mean time per step of that window that it did not wait for others."""

    def to_text(self) -> str:
        """The beat as it travels; its first byte tells the sign."""
        return _MARKS[self.sign] + json.dumps(asdict(self))

    @staticmethod
    def from_bytes(text: bytes) -> Beat:
        return Beat(**json.loads(text[1:]))

    @property
    def where(self) -> str:
        """The phase in words, with its step."""
        return self.phase if self.step < 0 else f"step {self.step} {self.phase}"


def is_sign(text: bytes, sign: Sign) -> bool:
    """Whether a beat as it travels has this sign."""
    return text[:1] == _MARKS[sign].encode()


def phase_limit(bounds: Bounds, step_times: Sequence[float], own: float | None) -> float:
    """Seconds that a phase may last: its own limit if it has one, else by the times of the steps done so far."""
    if own is not None:
        return own
    if not step_times:
        return bounds.startup_s
    return max(bounds.hang_s, bounds.hang_steps * statistics.median(step_times))


def awaited(beats: Mapping[int, Beat]) -> int | None:
    """The rank that the others wait for; None if all have left.

    That is one whose training thread does not wait for others; of several the one that is least far.
    """
    left = {rank: beat for rank, beat in beats.items() if beat.sign != "done"}
    return min(left, key=lambda rank: (left[rank].waits, left[rank].phases, -left[rank].age_s), default=None)


def hanging(beats: Mapping[int, Beat], limit_s: float) -> int | None:
    """The rank that the others wait for, if it is late itself; None while it is not, or nobody is.

    limit_s  what a phase may last that has no limit of its own

    One that may take longer (it saves, it validates) excuses those that wait for it. If all wait, all must have done so
    for that time: one that has not has just come, and those that waited for it have not said yet that they go on.
    """
    first = awaited(beats)
    if first is None:
        return None
    if not beats[first].waits:
        return first if beats[first].sign == "late" else None
    stuck = (beat.sign in ("late", "done") or beat.age_s > limit_s for beat in beats.values())
    return first if all(stuck) else None


def hang_line(rank: int, beats: Mapping[int, Beat]) -> str:
    """What is known of a hang, without the rank's name."""
    beat = beats[rank]
    others = sum(1 for other, its in beats.items() if other != rank and (its.waits or its.sign == "late"))
    if beat.waits:
        what = "which waits for others as all do: they have not called the same exchange"
    else:
        what = f"while {others} other{'s' * (others != 1)} wait{'s' * (others == 1)}"
    return f"hangs in {beat.where} for {beat.age_s:.0f} s, at {beat.place}, {what}"


class Stragglers:
    """Who needs longer for the work of a step than the median process, for several windows in a row."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._slow: dict[int, int] = {}
        """Windows in a row, by rank."""
        self._window = 0

    def look(self, beats: Mapping[int, Beat]) -> dict[int, tuple[float, float]]:
        """(its seconds per step, the median's) of every rank that has become a straggler with the latest window that
        all have completed; told once, and again only after it kept up for a window.
        """
        window = min((beat.window for beat in beats.values() if beat.sign != "done"), default=0)
        if window <= self._window or len(beats) < 2:
            return {}
        self._window = window
        median = statistics.median(beat.worked_s for beat in beats.values())
        found = {}
        for rank, beat in beats.items():
            if beat.worked_s > (1 + self._bounds.straggler_share) * median and not math.isclose(median, 0.0):
                self._slow[rank] = self._slow.get(rank, 0) + 1
                if self._slow[rank] == self._bounds.straggler_windows:
                    found[rank] = beat.worked_s, median
            else:
                self._slow.pop(rank, None)
        return found


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that other processes have gone: an exchange that broke off, not what broke it."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        if isinstance(chain, dist.DistError | ConnectionError | BrokenPipeError):
            return True
        if isinstance(chain, RuntimeError) and _BROKEN.search(str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


_BROKEN = re.compile(
    r"gloo/|\bgloo\b|\bNCCL\b|ncclUnhandled|ncclRemote|Connection (closed|reset|refused)|Broken pipe|Socket closed",
    re.I,
)
