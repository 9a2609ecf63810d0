"""A model as stages of a pipeline: which layers run where, what travels between them, where a pass may pause.

Legend: T packed tokens of this process, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pithwood.attention.base import LayerContext
from pithwood.models.recompute import cheaply_recomputed
from pithwood.moe.dispatch import combine_tokens, planned_rows
from pithwood.moe.layer import MoELayer
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pipeline import PipelineExecutor, Travels

if TYPE_CHECKING:
    from pithwood.models.qwen3_moe import Block, Qwen3MoE

Outcome = tuple[Tensor, dict[str, Tensor]]
Parts = Generator[Sequence[Tensor], list[Tensor], Any]


@dataclass
class MicroBatch:
    """What every process of a pipeline knows of a micro-batch."""

    tokens_T: Tensor
    """[T] int64."""
    ctx: LayerContext
    """As `Qwen3MoE.context` makes it; `layer` and `carry` are set for each layer."""
    loss: Callable[[Tensor], Any]
    """What the last stage makes of the final hidden states [T, D]: in training the scalar whose gradient is taken."""


@dataclass
class LayersStage:
    """Consecutive layers, with the embedding before the first and the final norm after the last."""

    model: Qwen3MoE
    layers: range
    dtype: torch.dtype
    """Of the activations."""
    pauses: bool
    """Whether passes pause while tokens travel to their experts and back."""
    given: Sequence[MicroBatch] = field(default_factory=list)
    """This step's micro-batches."""

    def __call__(self, micro: int, x_TD: Tensor | None, carry: dict[str, Tensor]) -> Any:
        given = self.given[micro]
        if self.pauses and torch.is_grad_enabled():
            return self._in_parts(given, x_TD, carry)
        if x_TD is None:
            x_TD = self.model.embed(given.tokens_T, self.dtype)
        return self._end(given, *self.model.run_layers(self.layers, x_TD, given.ctx, carry))

    def _in_parts(self, given: MicroBatch, x_TD: Tensor | None, carry: dict[str, Tensor]) -> Parts:
        if x_TD is None:
            x_TD = self.model.embed(given.tokens_T, self.dtype)
        for layer in self.layers:
            x_TD, carry = yield from layer_in_parts(self.model, layer, x_TD, given.ctx, carry)
        return self._end(given, x_TD, carry)

    def _end(self, given: MicroBatch, x_TD: Tensor, carry: dict[str, Tensor]) -> Any:
        if self.layers.stop < self.model.cfg.num_layers:
            return x_TD, carry
        return given.loss(self.model.final_norm(x_TD))


class ModelPipeline:
    """Runs steps of a model whose layers are divided over `mesh.pp`, or are one stage whose passes run in pairs; made
    by all processes of the mesh together."""

    def __init__(self, model: Qwen3MoE, whole: Qwen3MoE, mesh: Mesh, dtype: torch.dtype) -> None:
        """model: this process's part. whole: the model with all layers, perhaps without memory."""
        self.model, self.whole, self.dtype = model, whole, dtype
        self._layers = mesh.cfg.layers_of_stages(model.cfg.num_layers)
        self.stages = {
            stage: LayersStage(model, self._layers[stage], dtype, mesh.cfg.pauses)
            for stage in mesh.cfg.stages_of_process(mesh.pp.rank)
        }
        self.executor = PipelineExecutor(mesh, self.stages, [{} for _ in self._layers[1:]])
        self._known: dict[tuple[Any, ...], list[dict[str, Travels]]] = {}

    def run(self, given: Sequence[MicroBatch]) -> list[Tensor]:
        """Forward and backward passes of a step, see `PipelineExecutor.run`; all of one number of tokens."""
        self._begin(given)
        return self.executor.run(len(given))

    def run_forward(self, given: Sequence[MicroBatch]) -> list[Any]:
        """Forward passes alone: what `loss` makes of the hidden states, in the process that holds the last stage."""
        self._begin(given)
        return self.executor.run_forward(len(given))

    def _begin(self, given: Sequence[MicroBatch]) -> None:
        for stage in self.stages.values():
            stage.given = given
        carried = carried_names(self.whole, self._layers)
        key = given[0].tokens_T.shape[0], tuple(map(tuple, carried))
        if key not in self._known:
            x = Travels((given[0].tokens_T.shape[0], self.model.cfg.model_dim), self.dtype)
            self._known[key] = self._ask(given[0], x, carried) if any(carried) else [{"x": x} for _ in carried]
        self.executor.boundaries = self._known[key]

    @torch.no_grad()
    def _ask(self, given: MicroBatch, x: Travels, carried: list[list[str]]) -> list[dict[str, Travels]]:
        """What travels, x and the carry named, by running each stage once on zeros: only mixers know their carry."""
        found: list[dict[str, Travels]] = []
        mesh = self.executor.mesh
        for stage, names in enumerate(carried):
            mine: dict[str, Travels] = {}
            if stage in self.stages:
                before = {
                    name: torch.zeros(kind.shape, dtype=kind.dtype, device=mesh.device)
                    for name, kind in (found[-1] if found else {}).items()
                }
                own = self.stages[stage]
                x_TD = before.pop("x", None)
                if x_TD is None:
                    x_TD = self.model.embed(given.tokens_T, self.dtype)
                # counted and recorded nowhere: the pass proper does so
                ctx = replace(given.ctx, ledger=None, probe=None, recomputing=True)
                _, carry = self.model.run_layers(own.layers, x_TD, ctx, before)
                mine = {"x": x, **{name: Travels(tuple(carry[name].shape), carry[name].dtype) for name in names}}
            found.append(next(kinds for kinds in mesh.pp.all_gather_objects(mine) if kinds))
        return found


def carried_names(whole: Qwen3MoE, layers: Sequence[range]) -> list[list[str]]:
    """The names of the carry between each two stages: what a layer before writes or reads, and one after does."""
    names = [set(block.self_attn.carry_fields) for block in whole.blocks]
    cuts = [some.start for some in layers[1:]]
    return [sorted(set().union(*names[:cut]) & set().union(*names[cut:])) for cut in cuts]


def layer_in_parts(
    model: Qwen3MoE, layer: int, x_TD: Tensor, ctx: LayerContext, carry: dict[str, Tensor]
) -> Generator[Sequence[Tensor], list[Tensor], Outcome]:
    """One layer, as `Qwen3MoE.run_layers` runs it, with a pause while its tokens travel either way.

    A layer does not pause that is dense, takes its tokens in chunks or is recomputed as a block: its exchanges lie
    within what is computed at once.
    """
    block: Block = model.model["layers"][str(layer)]  # type: ignore[index]
    mlp, recompute = block.mlp, model.activations.recompute[layer]
    at_once = recompute == "block" or block.compiled is not None
    if at_once or not isinstance(mlp, MoELayer) or mlp.exchange is None or 0 < mlp.cfg.chunk_tokens < x_TD.shape[0]:
        return model.run_layers([layer], x_TD, ctx, carry)
    ctx, key = replace(ctx, layer=layer, carry=carry), f"layers.{layer}"
    if model.part is not None:
        (x_TD,) = model.part.shards.enter(key, x_TD)
    routed: Any
    if recompute == "selective":
        routed = cheaply_recomputed(block.attend_and_route, x_TD, ctx, block.norms())  # type: ignore[arg-type]
    else:
        routed = block.attend_and_route(x_TD, ctx)
    coming = mlp.exchange.begin_dispatch(routed.ffn_in_TD, routed.ids_Tk, routed.weight_Tk)
    if mlp.shared_experts is None:
        # nobody reads it again; of a view its memory would stay
        routed.ffn_in_TD = routed.ffn_in_TD.new_empty(0)
    names, later = list(routed.carry), [routed.residual_TD, routed.ffn_in_TD, *routed.carry.values()]
    coming.left, routed.residual_TD, routed.ffn_in_TD, *later = yield [coming.left, *later]
    routed.carry = dict(zip(names, later, strict=True))
    del later
    arrived = coming.wait()
    rows_RD, weight_R, plan = planned_rows(arrived.x_SD, arrived.weight_Sk, arrived.plan)
    rows_RD = block.experts(rows_RD, plan.offsets, weight_R, None if mlp.save_rows else (arrived.x_SD, plan))
    going = mlp.exchange.begin_combine(combine_tokens(rows_RD, plan), arrived.handle)
    # what passes by the experts is cut once
    (going.left,) = yield [going.left]
    # under the way back; and its gradients are made under that of the gradients, which leave first
    block.share(routed)
    out = block.merge(routed, going.wait(routed.residual_TD)), routed.carry
    return out if model.part is None else model.part.shards.leave(key, out)
