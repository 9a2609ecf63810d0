"""Steps out of the ordinary, found in what the log just fetched, and what is written about them and those around."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn

from pithwood.observe.events import EventLog
from pithwood.observe.mesh_norms import MeshNorms
from pithwood.observe.norms import NormRecorder

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation times this is the standard deviation of a normal distribution."""

_QUIET = 0.01
"""A loss that hardly varies still varies by this share of its median, as far as the threshold goes."""

_ENOUGH = 16
"""Steps that must have been seen before a step can be called unusual."""


@dataclass(frozen=True)
class SpikeConfig:
    """When a step counts as a spike, and how much is written about it."""

    steps_around: int = 5
    """Steps before and after a spike whose batches and norms are logged; in [0, 100]."""
    window: int = 64
    """Latest steps that a step is compared with; at least 16."""
    loss_deviations: float = 6.0
    """A loss this many robust standard deviations (1.4826 x the median absolute deviation) above the window's median is
    a spike; above 0."""
    grad_norm_factor: float = 4.0
    """A gradient norm this many times the window's median is a spike; above 1."""

    def validate(self) -> None:
        """Raise ValueError, in the words of the config, if a field is out of range."""
        if not 0 <= self.steps_around <= 100:
            raise ValueError(f"steps_around={self.steps_around} must be in [0, 100]")
        if self.window < _ENOUGH:
            raise ValueError(f"window={self.window} must be at least {_ENOUGH}")
        if not self.loss_deviations > 0:
            raise ValueError(f"loss_deviations={self.loss_deviations} must be above 0")
        if not self.grad_norm_factor > 1:
            raise ValueError(f"grad_norm_factor={self.grad_norm_factor} must be above 1")


class SpikeDetector:
    """Compares each step with the latest ordinary ones."""

    def __init__(self, cfg: SpikeConfig):
        self.cfg = cfg
        self._loss: deque[float] = deque(maxlen=cfg.window)
        self._grad_norm: deque[float] = deque(maxlen=cfg.window)

    def look(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """None for an ordinary train event, else the fields of a `spike` event: reason, value, usual, threshold.

        The first reason that applies of: a skipped step, a loss that is not finite, a high loss, a high gradient norm.
        Values that are no spikes, and high ones too (or a lasting rise would be reported for ever), enter the window.
        """
        loss, grad_norm = float(event.get("loss", math.nan)), float(event.get("grad_norm", math.nan))
        found: dict[str, Any] | None = None
        if event.get("skipped"):
            found = {"reason": "skipped", "value": grad_norm}
        elif "loss" in event and not math.isfinite(loss):
            found = {"reason": "loss is not finite", "value": loss}
        if found is None and len(self._loss) >= _ENOUGH:
            usual = median(self._loss)
            spread = _MAD_TO_SIGMA * median(abs(value - usual) for value in self._loss)
            limit = usual + self.cfg.loss_deviations * max(spread, _QUIET * abs(usual))
            if loss > limit:
                found = {"reason": "loss", "value": loss, "usual": usual, "threshold": limit}
        if found is None and len(self._grad_norm) >= _ENOUGH:
            usual = median(self._grad_norm)
            limit = self.cfg.grad_norm_factor * usual
            if grad_norm > limit:
                found = {"reason": "gradient norm", "value": grad_norm, "usual": usual, "threshold": limit}
        if math.isfinite(loss):
            self._loss.append(loss)
        if math.isfinite(grad_norm):
            self._grad_norm.append(grad_norm)
        return found


class SpikeWatch:
    """Looks through the events that the log has just written and adds `spike` and `spike_step` events.

    cfg        None does nothing at all
    log_every  most steps between two looks
    """

    def __init__(self, cfg: SpikeConfig | None, log_every: int):
        self.cfg, self._log_every = cfg, log_every
        self._norms: NormRecorder | MeshNorms | None = None
        self._detector = None if cfg is None else SpikeDetector(cfg)
        self._last: tuple[int, str] | None = None
        """Step and reason of the latest unusual step: those that follow it without a gap belong to the same spike."""
        self._told: set[int] = set()
        self._wanted: set[int] = set()

    def measure(self, parameters: Mapping[str, Tensor], blocks: Sequence[nn.Module]) -> None:
        """Keep norms of these from the next step on; those of others are dropped, those of the same stay."""
        if isinstance(self._norms, NormRecorder):
            if self._norms.watches(parameters, blocks):
                return
            self._norms.close()
        if self.cfg is not None:
            self._norms = NormRecorder(parameters, blocks, self._steps_kept(self.cfg))

    def measure_pieces(self, make: Callable[[int], MeshNorms]) -> None:
        """Keep norms on a mesh, whose pieces stay the same in all phases; `make` is given the number of steps."""
        if self.cfg is not None and self._norms is None:
            self._norms = make(self._steps_kept(self.cfg))

    def _steps_kept(self, cfg: SpikeConfig) -> int:
        return self._log_every + 2 * cfg.steps_around + 1

    def activation(self, layer: int, x_TD: Tensor) -> None:
        """On a mesh: what this process has of the residual stream after a layer."""
        if isinstance(self._norms, MeshNorms):
            self._norms.activation(layer, x_TD)

    def shares(self) -> dict[str, Tensor]:
        """On a mesh: what is to be added up over all processes, and then handed to `added_up`."""
        return {"norms": self._norms.shares()} if isinstance(self._norms, MeshNorms) else {}

    def added_up(self, sums: Mapping[str, Tensor]) -> None:
        if isinstance(self._norms, MeshNorms):
            self._norms.added_up(sums["norms"])

    def before_update(self) -> Tensor | None:
        """The norm of all gradients, for the optimizer; None if it should compute it itself."""
        return None if self._norms is None else self._norms.before_update()

    def after_update(self, step: int) -> None:
        """The update of `step` (finished steps) was made."""
        if self._norms is not None:
            self._norms.after_update(step)

    def remember(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Earlier events of the run, so that a resumed run knows what is usual."""
        for event in events:
            if event["kind"] == "train" and self._detector is not None:
                self._detector.look(event)

    def look(
        self, events: EventLog, written: Sequence[Mapping[str, Any]], origins_of: Callable[[int], list[Any]]
    ) -> None:
        """Find the spikes among events just written, and log them with those of their neighbours that are done.

        origins_of  step (finished steps) -> what it was trained on, one entry per micro-batch
        """
        train = [event for event in written if event["kind"] == "train"]
        if self.cfg is None or self._detector is None or not train:
            return
        for event in train:
            found = self._detector.look(event)
            if found is None:
                continue
            step, reason = event["step"], found["reason"]
            if self._last != (step - 1, reason):
                first, last = max(step - self.cfg.steps_around, 1), step + self.cfg.steps_around
                self._wanted |= set(range(first, last + 1)) - self._told
                events.emit("spike", step, **found, first_step=first, last_step=last)
            self._last = step, reason
        due = sorted(step for step in self._wanted if step <= train[-1]["step"])
        norms = {} if self._norms is None else self._norms.rows(due)
        for step in due:
            events.emit("spike_step", step, batches=origins_of(step), **norms.get(step, {}))
        self._told |= set(due)
        self._wanted -= set(due)
