"""Norms of every part of a model on a mesh, where each process has pieces of it: what `observe.norms` keeps of one.

Each process gives the sums of squares of its pieces, every element counted in one process, and of its tokens of the
residual stream. They travel with the losses of the step, in an exchange that there is anyway, and every process keeps
the sums: whoever writes the log asks nobody.

Legend: P parts of the whole model, M micro-batches of a step, L its layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pithwood.observe.norms import part_of, sampling_stride
from pithwood.ops.norms import tensor_norms
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece
from pithwood.parallel.totals import norm_over


class MeshNorms:
    """A ring of the last `steps` steps' norms; all processes of the mesh make one and call it together.

    parameters     this process's pieces, flat or in any shape, fp32, contiguous, on one device
    pieces         which elements of the whole parameters they are
    counted        names of those that this process counts in sums over all processes
    names          of all parameters of the whole model, the same in all processes
    layers         L
    micro_batches  M
    steps          rows of the ring; they are reused from the oldest on

    A step calls `before_update` between backward pass and update, `after_update` after it, and hands what the sum of
    all processes' `shares` is to `added_up`. `activation` is told the output of every layer that is here.
    """

    def __init__(
        self,
        mesh: Mesh,
        parameters: Mapping[str, Tensor],
        pieces: Mapping[str, Piece],
        counted: set[str],
        names: Sequence[str],
        layers: int,
        micro_batches: int,
        steps: int,
    ) -> None:
        self.mesh, self.parameters, self.counted = mesh, dict(parameters), counted
        self.parts = list(dict.fromkeys(part_of(name) for name in names))
        self.layers, self.micro_batches, self.steps = layers, micro_batches, steps
        device = mesh.device
        self._mine = [name for name in self.parameters if name in counted]
        self._values = [self.parameters[name].detach() for name in self._mine]
        place = {part: index for index, part in enumerate(self.parts)}
        self._part = torch.tensor([place[part_of(name)] for name in self._mine], dtype=torch.int64, device=device)
        self._views, counts = [], []
        for name, value in zip(self._mine, self._values, strict=True):
            numel = math.prod(pieces[name].shape)
            # the elements that one process would take
            stride = sampling_stride(numel)
            self._views.append(value.view(-1)[-pieces[name].start % stride :: stride])
            counts.append(numel / len(range(0, numel, stride)))
        self._sizes = [view.numel() for view in self._views]
        self._scale = torch.tensor(counts, dtype=torch.float32, device=device)
        self._before = torch.empty(sum(self._sizes), dtype=torch.float32, device=device)
        self._nothing = torch.zeros((), dtype=torch.float32, device=device)
        self._sums = torch.zeros(3, len(self.parts), dtype=torch.float32, device=device)
        """Squares of this process's gradients, weights and updates."""
        self._activation_ML = torch.zeros(micro_batches, layers, dtype=torch.float32, device=device)
        self._calls = [0] * layers
        self._pending: int | None = None
        """The step whose sums are about to be added up."""
        self._ring = torch.full((steps, self._sums.numel() + self._activation_ML.numel()), math.nan, device=device)
        self._step_of_row: list[int | None] = [None] * steps

    @torch.no_grad()
    def before_update(self) -> Tensor:
        """Measure the gradients; returns their common norm, as the optimizer computes it."""
        grads = {name: param.grad for name, param in self.parameters.items() if param.grad is not None}
        counted = {name: grad for name, grad in grads.items() if name in self.counted}
        others = [grad for name, grad in grads.items() if name not in self.counted]
        norms = tensor_norms(list(counted.values())) if counted else None
        self._sums.zero_()
        if norms is not None:
            found = dict(zip(counted, norms.unbind(), strict=True))
            # parameters that do not train have no gradient
            every = [found.get(name, self._nothing) for name in self._mine]
            self._add(0, torch.stack(every).square())
        if self._views:
            torch.cat(self._views, out=self._before)
        return norm_over(self.mesh.world, norms, tensor_norms(others) if others else None, self.mesh.device)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure the update of this step (any number that rises)."""
        if self._views:
            change = torch.cat(self._views).sub_(self._before)
            update = torch.stack(torch._foreach_norm(list(change.split(self._sizes))))
            self._add(2, update.square().mul_(self._scale))
            self._add(1, tensor_norms(self._values).square())
        self._pending = step

    def shares(self) -> Tensor:
        """What this process adds to the sums, flat; of the same size in all."""
        return torch.cat([self._sums.view(-1), self._activation_ML.view(-1)])

    def added_up(self, sums: Tensor) -> None:
        """Keep the sums of all processes' shares, if an update was made since the last ones."""
        if self._pending is not None:
            row = self._pending % self.steps
            self._ring[row] = sums
            self._step_of_row[row], self._pending = self._pending, None

    def activation(self, layer: int, x_TD: Tensor) -> None:
        """The residual stream after a layer, as far as this process has its tokens; of validation it is left out."""
        if torch.is_grad_enabled():
            micro = self._calls[layer] % self.micro_batches
            self._calls[layer] += 1
            norm = torch.linalg.vector_norm(x_TD.detach(), dtype=torch.float32)
            # every process has as many tokens
            torch.div(
                norm.square(), max(x_TD.numel(), 1) * self.mesh.tokens.size, out=self._activation_ML[micro, layer]
            )

    def rows(self, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
        """As `NormRecorder.rows`, of the whole model, in every process; waits for the device."""
        wanted = [step for step in steps if self._step_of_row[step % self.steps] == step]
        if not wanted:
            return {}
        table = self._ring[[step % self.steps for step in wanted]].double().cpu().sqrt()
        count, found = len(self.parts), {}
        for step, row in zip(wanted, table, strict=True):
            gradient, weight, update, activation = row.split([count, count, count, self._activation_ML.numel()])
            most_L = activation.view(self.micro_batches, self.layers).amax(0)
            found[step] = {
                "gradient_norms": dict(zip(self.parts, gradient.tolist(), strict=True)),
                "weight_norms": dict(zip(self.parts, weight.tolist(), strict=True)),
                "update_norms": dict(zip(self.parts, update.tolist(), strict=True)),
                "activation_rms": {f"layers.{layer}": value for layer, value in enumerate(most_L.tolist())},
            }
        return found

    def _add(self, kind: int, squares: Tensor) -> None:
        self._sums[kind].index_add_(0, self._part, squares)
