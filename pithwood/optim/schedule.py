"""How the learning rate moves over a run: pure functions of the step and the run's length.

Steps count from 0. The first warm-up step has the factor 1 / warm-up steps, its last step the factor 1; the last step
of a decay runs at exactly `final_fraction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DecayShape = Literal["linear", "1-sqrt", "cosine"]
SHAPES = ("linear", "1-sqrt", "cosine")


def _check_span(what: str, steps: int | None, fraction: float | None) -> None:
    if steps is not None and fraction is not None:
        raise ValueError(
            f"{what}_steps={steps} and {what}_fraction={fraction} are both given; keep one and set the other to none"
        )
    if steps is not None and steps < 0:
        raise ValueError(f"{what}_steps={steps} must be 0 or more")
    if fraction is not None and not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{what}_fraction={fraction} must lie between 0 and 1")


def _check_final(final_fraction: float) -> None:
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction={final_fraction} must lie between 0 and 1")


def _span(steps: int | None, fraction: float | None, default: float, total_steps: int) -> int:
    if steps is not None:
        return steps
    return round((default if fraction is None else fraction) * total_steps)


@dataclass(frozen=True)
class Constant:
    """A linear warm-up, then the full rate to the end."""

    warmup_steps: int | None = None
    """Steps of linear warm-up, 0 or more. Give this or warmup_fraction; neither means no warm-up."""
    warmup_fraction: float | None = None
    """Warm-up as a share of the run, 0 to 1."""

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup_steps, self.warmup_fraction)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, and a decay over the last steps (Hu et al. 2024, "MiniCPM", arXiv 2404.06395)."""

    warmup_steps: int | None = None
    """Steps of linear warm-up, 0 or more. Give this or warmup_fraction; neither means no warm-up."""
    decay_steps: int | None = None
    """Steps of the decay at the end of the run, 0 or more. Give this or decay_fraction; neither means 0.2 of it."""
    warmup_fraction: float | None = None
    """Warm-up as a share of the run, 0 to 1."""
    decay_fraction: float | None = None
    """Decay as a share of the run, 0 to 1."""
    final_fraction: float = 0.0
    """Rate of the very last step as a share of the full rate, 0 to 1; at 0 that step changes nothing."""
    shape: DecayShape = "linear"
    """Form of the decay: linear, 1-sqrt (fast first; Hagele et al. 2024, arXiv 2405.18392, section 3) or cosine."""

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup_steps, self.warmup_fraction)
        _check_span("decay", self.decay_steps, self.decay_fraction)
        _check_final(self.final_fraction)
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} must be one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the end of the run (Loshchilov and Hutter 2017, arXiv 1608.03983)."""

    warmup_steps: int | None = None
    """Steps of linear warm-up, 0 or more. Give this or warmup_fraction; neither means no warm-up."""
    warmup_fraction: float | None = None
    """Warm-up as a share of the run, 0 to 1."""
    final_fraction: float = 0.1
    """Rate of the very last step as a share of the full rate, 0 to 1."""

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup_steps, self.warmup_fraction)
        _check_final(self.final_fraction)


Schedule = WarmupStableDecay | Cosine | Constant


def schedule_spans(schedule: Schedule, total_steps: int) -> tuple[int, int]:
    """Return (warm-up steps, decay steps) of a run of `total_steps`; ValueError if they do not fit into it."""
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least one step, not total_steps={total_steps}")
    warmup = _span(schedule.warmup_steps, schedule.warmup_fraction, 0.0, total_steps)
    if isinstance(schedule, Constant):
        decay = 0
    elif isinstance(schedule, Cosine):
        decay = max(total_steps - warmup, 0)
    elif schedule.decay_steps is None:
        # Two shares are rounded apart: 0.5 + 0.5 of an odd run may come out one step too long, so the decay yields.
        decay = _span(None, schedule.decay_fraction, 0.2, total_steps)
        shares = (schedule.warmup_fraction or 0.0) + (
            0.2 if schedule.decay_fraction is None else schedule.decay_fraction
        )
        if schedule.warmup_steps is None and shares <= 1.0:
            decay = min(decay, total_steps - warmup)
    else:
        decay = schedule.decay_steps
    if warmup + decay > total_steps:
        raise ValueError(
            f"{warmup} warm-up steps and {decay} decay steps do not fit into a run of {total_steps} steps; shorten "
            "them, give them as warmup_fraction and decay_fraction, or raise steps"
        )
    return warmup, decay


def idle_end(schedule: Schedule, total_steps: int) -> list[str]:
    """A warning, or none: a decay to 0 makes the last step change nothing, which a short run should know."""
    if schedule_factor(schedule, total_steps - 1, total_steps) > 0 or total_steps >= 20:
        return []
    return [
        f"WARNING: the learning rate of the last of {total_steps} steps is 0, so that step changes nothing; "
        "set optim.schedule.final_fraction above 0 (0.1, for instance) to use it"
    ]


def _decay_factor(shape: DecayShape, progress: float, final_fraction: float) -> float:
    if shape == "linear":
        left = 1.0 - progress
    elif shape == "1-sqrt":
        left = 1.0 - math.sqrt(progress)
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_fraction + (1.0 - final_fraction) * left


def schedule_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Return the multiple of the full learning rate at `step` (from 0); ValueError outside the run."""
    warmup, decay = schedule_spans(schedule, total_steps)
    if not 0 <= step < total_steps:
        raise ValueError(f"step={step} lies outside the run of {total_steps} steps (0 to {total_steps - 1})")
    if step < warmup:
        return (step + 1) / warmup
    decayed = step - (total_steps - decay) + 1
    if decayed <= 0 or isinstance(schedule, Constant):
        return 1.0
    shape = "cosine" if isinstance(schedule, Cosine) else schedule.shape
    return _decay_factor(shape, decayed / decay, schedule.final_fraction)
