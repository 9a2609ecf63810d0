"""When to stop, agreed by all processes: a signal reaches them at different times, or only one of them.

Processes must leave after the same step. Each gives what it knows at the end of a step to an exchange that runs beside
the next one, and looks at its result at the end of that: nobody waits for the device, and for other processes only if
they are a whole step behind.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pithwood.parallel.mesh import Group, Mesh


class StopAgreement:
    """Whether all processes stop now: one step after the first of them was asked to, and at the same step everywhere.

    with StopAgreement(mesh) as agreement:
        for step in steps:
            ...
            if agreement.after_step(stop.signal_number): save and leave

    All processes make it together and call `after_step` after the same steps.
    """

    def __init__(self, mesh: Mesh) -> None:
        world = mesh.world
        # on the host's network whatever the device: the result must not be read from a device
        handle = dist.new_group(backend="gloo") if world.size > 1 else None
        self._group = Group(world.ranks, world.rank, handle)
        mesh.further.append(self._group)
        self._pending: tuple[Any, Tensor] | None = None

    def after_step(self, signal_number: int) -> int:
        """The greatest number that any process gave after the step before; in one process the number itself.

        signal_number  of the signal that asked this process to stop, 0 for none
        """
        if self._group.size == 1:
            return signal_number
        told = torch.tensor([signal_number], dtype=torch.int32)
        before, self._pending = self._pending, (self._group.all_reduce(told, "max", wait=False), told)
        return 0 if before is None else self._result(before)

    def __enter__(self) -> StopAgreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last exchange, unless an error may mean that others are gone."""
        if self._pending is not None and error is None:
            self._result(self._pending)
        self._pending = None

    @staticmethod
    def _result(exchange: tuple[Any, Tensor]) -> int:
        work, told = exchange
        work.wait()
        return int(told)
