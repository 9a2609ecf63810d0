"""An exponential moving average of the weights, kept in fp32 beside them and swapped in for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Running average of named parameters: avg <- avg + (1 - d) (param - avg) after every accepted update.

    d is `decay`, or (1 + n) / (10 + n) while that is smaller and `warmup` is on, n the updates so far: the average
    forgets the initial weights quickly. Buffers are not averaged. Frozen parameters are, so that their average ends at
    their value.
    """

    def __init__(
        self, decay: float, warmup: bool, named_parameters: Mapping[str, Tensor], device: torch.device
    ) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay={decay} must lie between 0 and 1; 0 turns the average off")
        self.decay, self.warmup = decay, warmup
        self.updates = torch.zeros((), dtype=torch.float32, device=device)
        self.average: dict[str, Tensor] = {}
        self.add(named_parameters)

    @torch.no_grad()
    def add(self, named_parameters: Mapping[str, Tensor]) -> None:
        """Start averaging the parameters that are new here, from their present values; known names keep their
        average."""
        for name, param in named_parameters.items():
            if name not in self.average:
                self.average[name] = param.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self, named_parameters: Mapping[str, Tensor], ok: Tensor) -> None:
        """Move the average towards the parameters; where `ok` (bool scalar on the device) is false, change nothing.
        No host sync."""
        weight = torch.full_like(self.updates, 1.0 - self.decay)
        if self.warmup:
            weight = torch.maximum(weight, 9.0 / (10.0 + self.updates))
        for name, param in named_parameters.items():
            average = self.average[name]
            torch.where(ok, torch.lerp(average, param.detach().float(), weight), average, out=average)
        self.updates.add_(ok.float())

    @contextmanager
    def swap(self, named_parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context the parameters hold their averages; afterwards their own values again, bit for bit,
        errors included."""
        with torch.no_grad():
            own = {name: param.detach().clone() for name, param in named_parameters.items()}
            for name, param in named_parameters.items():
                param.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in named_parameters.items():
                    param.copy_(own[name])
