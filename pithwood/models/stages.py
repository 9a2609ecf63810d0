"""The stages of a block compiled by torch, each as one unit for all layers of a kind.

A compiled unit must not see what differs from layer to layer, or it would be compiled for each: the first stage gets a
context of layer 0 with a probe, a replay and a ledger of its own, and what it writes there is carried over afterwards.
Inside a compiled unit weights are cast where they are used and their gradients go through autograd: kept copies and
sums in place belong to the kernels that take the place of compilation (`ops.master`).

Legend: T packed tokens, D model width, R dispatched rows, E experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pithwood.attention.base import LayerContext
from pithwood.losses import LossLedger
from pithwood.ops.permute import RowPlan


class CompiledStages:
    """`attend_and_route`, `experts` and `merge` of a class of blocks, compiled at their first call.

    block_class   whose methods these are
    whole         take the mixer into the first stage. Kernels are opaque to the compiler and allow it; the plain
                  attention of a CPU reads offsets on the host, and no graph holds that: there the mixer stays as it is.
    backend       of torch.compile
    """

    def __init__(self, block_class: Any, *, whole: bool, backend: str = "inductor") -> None:
        def unit(method: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(method, fullgraph=True, dynamic=False, backend=backend)

        self._whole = whole
        self._attend_and_route, self._route = unit(block_class.attend_and_route), unit(block_class.route)
        self.experts = unit(block_class.experts)
        self.merge = unit(block_class.merge)

    def of(self, block: Any) -> BoundStages:
        return BoundStages(self, block)

    def attend_and_route(self, block: Any, x_TD: Tensor, ctx: LayerContext) -> Any:
        """The first stage, whose decisions and loss terms end up in `ctx` as without compilation."""
        own, layer = "layers.0.", f"layers.{ctx.layer}."
        replay = ctx.replay
        if replay is not None:
            replay = {own + key[len(layer) :]: value for key, value in replay.items() if key.startswith(layer)}
        ledger = None if ctx.ledger is None else LossLedger(ctx.ledger.totals)
        probe: dict[str, Any] = {}
        local = replace(ctx, layer=0, replay=replay, probe=probe, ledger=ledger)
        if self._whole:
            routed = self._attend_and_route(block, x_TD, local)
        else:
            routed = self._route(block, *block.attend(x_TD, local), local)
        if ctx.probe is not None:
            ctx.probe.update({layer + key[len(own) :]: value for key, value in probe.items()})
        if ctx.ledger is not None and ledger is not None:
            ctx.ledger.add(ledger)
        return routed


@dataclass
class BoundStages:
    """The compiled stages of one block."""

    stages: CompiledStages
    block: Any

    def attend_and_route(self, x_TD: Tensor, ctx: LayerContext) -> Any:
        return self.stages.attend_and_route(self.block, x_TD, ctx)

    def experts(
        self,
        rows_RD: Tensor,
        offsets_E: Tensor,
        weight_R: Tensor,
        source: tuple[Tensor, RowPlan] | None = None,
        unread: bool = False,
    ) -> Tensor:
        """As `Block.experts`. A unit computes the value in any case: told that nobody reads it, another one would be
        compiled.
        """
        return self.stages.experts(self.block, rows_RD, offsets_E, weight_R, source)

    def merge(self, *args: Any) -> Tensor:
        return self.stages.merge(self.block, *args)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if compiled stages could not be built here."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise ValueError(
            "compile=true needs a C++ compiler on a CPU and none was found; install g++ or clang++, name one in CXX, "
            "or set compile=false"
        )
