"""The part of a model that one process of a mesh holds: its layers, its experts, its pieces of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pithwood.optim.groups import ParamRole
from pithwood.parallel.expert import ExpertExchange
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.shard import Shards

if TYPE_CHECKING:
    from pithwood.models.qwen3_moe import Qwen3MoEConfig


@dataclass
class ModelPart:
    """A runtime object, made once per run and process."""

    mesh: Mesh
    """The processes."""
    layers: tuple[int, ...]
    """Numbers of the layers that are here, ascending."""
    first: bool
    """Whether the embedding is here."""
    last: bool
    """Whether the head is here."""
    shards: Shards
    """The weights."""
    exchange: ExpertExchange | None = None
    """How tokens travel to the experts of other processes; None if every process has them all."""

    @staticmethod
    def of(mesh: Mesh, cfg: Qwen3MoEConfig, low: torch.dtype | None) -> ModelPart:
        """The part of this process. low: dtype in which weights of products are gathered, None for fp32."""
        stages = mesh.cfg.layers_of_stages(cfg.num_layers)
        mine = mesh.cfg.stages_of_process(mesh.pp.rank)
        layers = tuple(sorted(layer for stage in mine for layer in stages[stage]))
        part = ModelPart(mesh, layers, 0 in mine, len(stages) - 1 in mine, Shards(mesh, low))
        if mesh.ep.size > 1:
            how = mesh.cfg.exchange
            if how == "auto":
                how = "bounded" if mesh.device.type == "cuda" else "exact"
            balanced = cfg.moe.routing == "balanced"
            part.exchange = ExpertExchange(mesh.ep, cfg.moe.num_experts, how, balanced=balanced, device=mesh.device)
        return part

    def begin_step(self, micro_batches: int) -> None:
        """Begin an optimizer step of so many micro-batches."""
        self.shards.begin_step(micro_batches)
        if self.exchange is not None:
            self.exchange.reset_step()

    def divide(
        self, key: str, parameters: dict[str, nn.Parameter], roles: Mapping[str, ParamRole], cfg: Qwen3MoEConfig
    ) -> None:
        """Hand the parameters of a block, or of an end of the model, to the shards; nothing if it is not here."""
        if not parameters:
            return
        shapes = {
            name: (cfg.moe.num_experts, *param.shape[1:])
            for name, param in parameters.items()
            if roles[name].kind == "experts"
        }
        # an embedding is looked up in fp32, also where it is the head
        products = {name for name in parameters if roles[name].kind in ("matrix", "experts", "head")}
        self.shards.add(key, parameters, shapes, products)
