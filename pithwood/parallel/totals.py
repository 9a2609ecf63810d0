"""Values for the log, added up over the processes that hold parts of them, without a wait for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pithwood.parallel.mesh import Group, Mesh


class Totals:
    """Adds up named values over all tokens and all stages of a mesh; in one process they stay as they are.

    Values are scalars, or flat tensors that all stages give, of one length.

    Names may differ between stages, not between the processes of a stage. Which there are is asked once for each set of
    values, until `forget`: a stage that has none of them cannot see that those of others have changed.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._names: dict[str, list[str]] = {}

    def forget(self) -> None:
        """Ask for names anew; all processes call it together, when layers or loss terms have changed."""
        self._names.clear()

    def add_up(self, what: str, values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """The sums, by name; those of other stages' names too.

        what    names the set of values, the same in all processes
        """
        device = self.mesh.device
        # gloo adds in fp64; on a GPU fp32 is what the values have
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        own = {name: scalar(value, device, dtype) for name, value in values.items()}
        if self.mesh.world.size == 1:
            return own
        if what not in self._names:
            found = self.mesh.pp.all_gather_objects(list(own))
            self._names[what] = sorted({name for names in found for name in names})
        names, nothing = self._names[what], torch.zeros((), dtype=dtype, device=device)
        assert own.keys() <= set(names), f"{what} has other names than before"
        given = [own.get(name, nothing) for name in names]
        flat = torch.cat([value.view(-1) for value in given])
        self.mesh.tokens.all_reduce(flat)
        self.mesh.pp.all_reduce(flat)
        sums = flat.split([value.numel() for value in given])
        return {name: total.view(value.shape) for name, total, value in zip(names, sums, given, strict=True)}


def norm_over(world: Group, counted: Tensor | None, others: Tensor | None, device: torch.device) -> Tensor:
    """The 2-norm over all processes, from norms of tensors; fp32, the same bits in each of them; no host sync.

    world    every process takes part, also one without tensors
    counted  norms of what no other process counts
    others   norms of what another process counts: nothing of them enters but what is not finite
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    if counted is not None:
        square += counted.double().square().sum()
    if others is not None:
        square += (0.0 * others).sum()
    # one sum over all processes: it is added up once, and the result handed round
    world.all_reduce(square)
    return square.sqrt().float()


def scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A scalar (or a tensor of any shape) on the device, detached."""
    # a host number is filled in on the device: copying it there would make the host wait
    return value.detach().to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
