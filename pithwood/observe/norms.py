"""Norms of every part of a model over the last steps, kept on the device: what to look at when the loss jumps.

A step costs one pass over the gradients, which the optimizer's clipping needs anyway, one over the weights, and a few
thousand elements of each weight before and after the update. Nothing is copied to the host until somebody asks.

Legend: P parameters, L blocks, R rows of the ring.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pithwood.ops.norms import tensor_norms

UPDATE_SAMPLE = 4096
"""Elements of a parameter that its update norm is estimated from: a relative standard error of about 1 %."""


class NormRecorder:
    """A ring of the last `steps` steps' norms.

    parameters  fp32, contiguous, on one device; their storage stays the same while this recorder is in use
    blocks      modules called with (x_TD, LayerContext) whose output, or the first part of it, is the residual stream
    steps       R; rows are reused from the oldest on

    Call `before_update` between backward pass and update, `after_update` after it. `close` takes the hooks off the
    blocks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], blocks: Sequence[nn.Module], steps: int):
        assert steps >= 1
        self.parameters, self.blocks, self.steps = dict(parameters), list(blocks), steps
        self._values = [param.detach() for param in self.parameters.values()]
        device = self._values[0].device
        self._views = [_sampled(value) for value in self._values]
        self._sizes = [view.numel() for view in self._views]
        counts = [value.numel() / size for value, size in zip(self._values, self._sizes, strict=True)]
        self._scale_P = torch.tensor(counts, dtype=torch.float32).sqrt().to(device)
        self._before = torch.empty(sum(self._sizes), dtype=torch.float32, device=device)
        self._nothing = torch.zeros((), dtype=torch.float32, device=device)
        self._gradient_P = torch.zeros(len(self._values), dtype=torch.float32, device=device)
        self._activation_L = torch.zeros(len(self.blocks), dtype=torch.float32, device=device)
        self._ring = torch.full((steps, 3 * len(self._values) + len(self.blocks)), math.nan, device=device)
        self._step_of_row: list[int | None] = [None] * steps
        self._hooks = [
            block.register_forward_hook(lambda module, args, out, layer=layer: self._activation(layer, args[1], out))
            for layer, block in enumerate(self.blocks)
        ]

    @torch.no_grad()
    def before_update(self) -> Tensor | None:
        """Measure the gradients; returns their common norm, as the optimizer computes it, or None if there are none."""
        grads = {i: param.grad for i, param in enumerate(self.parameters.values()) if param.grad is not None}
        if not grads:
            self._gradient_P = torch.zeros_like(self._gradient_P)
            torch.cat(self._views, out=self._before)
            return None
        norms = tensor_norms(list(grads.values()))
        # parameters that do not train have no gradient
        by_place = dict(zip(grads, norms.unbind(), strict=True))
        self._gradient_P = torch.stack([by_place.get(i, self._nothing) for i in range(len(self._values))])
        torch.cat(self._views, out=self._before)
        return torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure the update and keep the row of this step (any number that rises)."""
        change = torch.cat(self._views).sub_(self._before)
        update_P = torch.stack(torch._foreach_norm(list(change.split(self._sizes)))).mul_(self._scale_P)
        weight_P = tensor_norms(self._values)
        row = step % self.steps
        torch.cat([self._gradient_P, weight_P, update_P, self._activation_L], out=self._ring[row])
        self._step_of_row[row] = step
        self._activation_L.zero_()

    def rows(self, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Norms of those of the steps that are still in the ring; waits for the device.

        returns  step -> {"gradient_norms", "weight_norms", "update_norms": part of the model -> 2-norm,
                 "activation_rms": part -> root mean square of the residual stream after it, the largest over the step's
                 micro-batches}
        """
        wanted = [step for step in steps if self._step_of_row[step % self.steps] == step]
        if not wanted:
            return {}
        table = self._ring[[step % self.steps for step in wanted]].double().cpu()
        count = len(self._values)
        names = [part_of(name) for name in self.parameters]
        found = {}
        for step, row in zip(wanted, table, strict=True):
            gradient, weight, update, activation = row.split([count, count, count, len(self.blocks)])
            found[step] = {
                "gradient_norms": _by_part(names, gradient),
                "weight_norms": _by_part(names, weight),
                "update_norms": _by_part(names, update),
                "activation_rms": {f"layers.{layer}": float(value) for layer, value in enumerate(activation)},
            }
        return found

    def watches(self, parameters: Mapping[str, Tensor], blocks: Sequence[nn.Module]) -> bool:
        """Whether these are the very tensors and modules that are being measured."""
        ids, own = (
            [*map(id, p.values()), *map(id, b)] for p, b in ((parameters, blocks), (self.parameters, self.blocks))
        )
        return list(parameters) == list(self.parameters) and ids == own

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _activation(self, layer: int, ctx: Any, out: Any) -> None:
        # Validation and sampling pass through the same blocks, and record no losses. The first pass of a recomputed
        # block has no graph, its second one no value.
        if ctx.ledger is not None and not ctx.recomputing:
            x_TD = (out[0] if isinstance(out, tuple) else out).detach()
            size = torch.linalg.vector_norm(x_TD, dtype=torch.float32) / math.sqrt(max(x_TD.numel(), 1))
            torch.maximum(self._activation_L[layer], size, out=self._activation_L[layer])


def part_of(name: str) -> str:
    """The part that a parameter's norm is counted in: `layers.3.mlp`, `layers.3.self_attn`, `embed_tokens`, ...

    A layer's two small norms go with what they feed.
    """
    name = name.removeprefix("model.")
    block = re.match(r"(layers\.\d+)\.(\w+)", name)
    if block is None:
        return name.partition(".")[0]
    part = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}.get(block[2], block[2])
    return f"{block[1]}.{part}"


def _by_part(names: Sequence[str], norms: Tensor) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, norm in zip(names, norms.tolist(), strict=True):
        squares[name] = squares.get(name, 0.0) + norm * norm
    return {name: math.sqrt(square) if square >= 0 else math.nan for name, square in squares.items()}


def _sampled(value: Tensor) -> Tensor:
    """A view of at most UPDATE_SAMPLE elements, evenly spread; all of a small tensor."""
    flat = value.view(-1)
    return flat[:: sampling_stride(flat.numel())]


def sampling_stride(numel: int) -> int:
    """Which elements of a parameter of this size are sampled: the first, and every so many after it."""
    # odd, so that it does not walk down one column of a matrix whose width is a power of two
    return -(-numel // UPDATE_SAMPLE) | 1
