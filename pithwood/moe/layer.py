"""A mixture-of-experts feed-forward layer in the pieces that a block's stages call.

`route` belongs to the first stage of a block, `experts` is the second, and the third adds `shared` to the combined
rows. Between them stand dispatch and combine: within this process, or by an `ExpertExchange` between those that divide
the experts. Parameter names are those of transformers: gate.weight, experts.gate_up_proj, experts.down_proj,
shared_experts.gate_proj.weight; a process that has some of the experts has a range of the stacked weights.

Legend: T packed tokens, D model width, E experts, F expert width, k experts per token, R rows, S arrived tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pithwood.attention.base import Cost, LayerContext
from pithwood.moe.chunks import in_chunks
from pithwood.moe.config import MoEConfig
from pithwood.moe.dispatch import combine_tokens, plan_tokens, planned_rows
from pithwood.moe.experts import DenseMLP, GroupedExperts
from pithwood.moe.router import Router
from pithwood.ops.permute import RowPlan
from pithwood.parallel.expert import Combining, ExpertExchange


class MoELayer(nn.Module):
    """Router, experts and shared experts. Parameters are made without values: the model's initialisation sets them."""

    def __init__(self, cfg: MoEConfig, model_dim: int, exchange: ExpertExchange | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.model_dim = model_dim
        self.exchange = exchange
        """How tokens travel between the processes that divide the experts; None where this one has them all."""
        self.save_rows = cfg.save_rows
        """Whether the rows that the experts read are kept for the backward pass; a model's activation plan may say no.
        """
        self.gate = Router(cfg, model_dim)
        here = cfg.num_experts if exchange is None else exchange.experts_here
        self.experts = GroupedExperts(here, model_dim, cfg.expert_dim)
        self.shared_experts = DenseMLP(model_dim, cfg.shared_width) if cfg.num_shared_experts else None

    def route(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [T, k] int64, weight [T, k] fp32, x_TD with loss terms attached); see `Router.route`."""
        return self.gate.route(x_TD, ctx)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """[T, D] sum of the shared experts, or None if the layer has none."""
        return None if self.shared_experts is None else self.shared_experts(x_TD)

    def mix(
        self,
        x_TD: Tensor,
        ids_Tk: Tensor,
        weight_Tk: Tensor,
        residual_TD: Tensor | None = None,
        experts: Callable[..., Tensor] | None = None,
        meanwhile: Callable[[], None] | None = None,
        exact: bool = False,
        unread: bool = False,
    ) -> Tensor:
        """Dispatch, experts, combine: [T, D] sum of each token's experts, plus the residual.

        Tokens are taken `chunk_tokens` at a time if the configuration says so: the [R, D] and [R, 2F] rows exist for
        one chunk only, in the backward pass too. `experts` stands in for the layer's own, of the same signature.
        `meanwhile` is called once, where there is an exchange while the first tokens travel. `exact` asks the exchange
        for exact sizes: outside a step nobody asks how full bounded buffers were. `unread` says that the sum's graph is
        wanted, not its value, as in the second pass of a recomputed block: what makes the value alone is then left out
        (the experts' second product, the sums over experts), results do not travel back, and chunks that are computed
        again in the backward pass are computed there only.
        """
        cfg = self.cfg
        run = self.experts if experts is None else experts
        if self.exchange is not None:
            inputs = x_TD, ids_Tk, weight_Tk, residual_TD
            return self._mix_between(self.exchange, *inputs, run, meanwhile, exact, unread)
        if meanwhile is not None:
            meanwhile()

        def part(x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, residual_TD: Tensor | None, unread: bool) -> Tensor:
            plan = plan_tokens(x_TD, ids_Tk, cfg.num_experts)
            return self._compute(run, plan, x_TD, weight_Tk, residual_TD, unread)

        if not 0 < cfg.chunk_tokens < x_TD.shape[0]:
            return part(x_TD, ids_Tk, weight_Tk, residual_TD, unread)
        given, weights = (x_TD, ids_Tk, weight_Tk), tuple(self.experts.parameters())
        return in_chunks(part, cfg.chunk_tokens, given, residual_TD, weights, again=cfg.chunk_recompute, unread=unread)

    def _compute(
        self,
        run: Callable[..., Tensor],
        plan: RowPlan,
        x_TD: Tensor,
        weight_Tk: Tensor,
        residual_TD: Tensor | None,
        unread: bool,
    ) -> Tensor:
        """[T, D]: tokens to their rows, experts, combine; of tokens that may have come from other processes."""
        rows_RD, weight_R, _ = planned_rows(x_TD, weight_Tk, plan)
        rows_RD = run(rows_RD, plan.offsets, weight_R, None if self.save_rows else (x_TD, plan), unread)
        return combine_tokens(rows_RD, plan, residual_TD, unread)

    def _mix_between(
        self,
        exchange: ExpertExchange,
        x_TD: Tensor,
        ids_Tk: Tensor,
        weight_Tk: Tensor,
        residual_TD: Tensor | None,
        run: Callable[..., Tensor],
        meanwhile: Callable[[], None] | None,
        exact: bool,
        unread: bool,
    ) -> Tensor:
        """`mix` between processes. While the experts work on one chunk, the next one's tokens come and the results of
        the last one go; a chunk whose experts are computed again keeps the tokens that arrived.
        """
        cfg = self.cfg
        size = cfg.chunk_tokens or max(x_TD.shape[0], 1)
        chunks = list(zip(x_TD.split(size), ids_Tk.split(size), weight_Tk.split(size), strict=True))
        residuals = [None] * len(chunks) if residual_TD is None else residual_TD.split(size)
        again, weights = len(chunks) > 1 and cfg.chunk_recompute, tuple(self.experts.parameters())

        outs: list[Tensor] = []
        coming = exchange.begin_dispatch(*chunks[0], exact)
        if meanwhile is not None:
            meanwhile()
        going: Combining | None = None
        for index in range(len(chunks)):
            arrived = coming.wait()
            if index + 1 < len(chunks):
                coming = exchange.begin_dispatch(*chunks[index + 1], exact)
            inputs = arrived.x_SD, arrived.weight_Sk
            compute = partial(self._compute, run, arrived.plan)
            everyone = max(len(arrived.x_SD), 1)
            part_SD = in_chunks(compute, everyone, inputs, None, weights, again=again, unread=unread)
            if going is not None:
                outs.append(going.wait(residuals[index - 1]))
            going = exchange.begin_combine(part_SD, arrived.handle, unread)
        assert going is not None
        outs.append(going.wait(residuals[-1]))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Tensor:
        """Route, dispatch, experts, combine, plus the shared experts: [T, D] -> [T, D]."""
        ids_Tk, weight_Tk, x_TD = self.route(x_TD, ctx)
        shared: list[Tensor | None] = []
        share = lambda: shared.append(self.shared(x_TD))  # noqa: E731
        out_TD = self.mix(x_TD, ids_Tk, weight_Tk, meanwhile=share, exact=ctx.ledger is None, unread=ctx.recomputing)
        return out_TD if shared[0] is None else out_TD + shared[0]

    @property
    def counts_E(self) -> Tensor:
        """[E] int64: (token, slot) pairs per expert since `reset_step`, counted in training mode."""
        return self.gate.counts_E

    def reset_step(self) -> None:
        """Zero the counts; call before each optimizer step's first forward."""
        self.gate.reset_step()

    def update_bias(self, counts_E: Tensor | None = None) -> None:
        """Move the selection bias after an optimizer step; counts_E defaults to this process's own counts, and must be
        those of all processes where there are more (`step_counts`).
        """
        self.gate.update_bias(self.counts_E if counts_E is None else counts_E)

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        """How Muon sees the parameters, by local name, all processes' experts together; the router goes to AdamW."""
        shapes: dict[str, tuple[int, int, int] | None] = {"gate.weight": None}
        parts = 1 if self.exchange is None else self.exchange.group.size
        for name, shape in self.experts.optimizer_shapes().items():
            shapes[f"experts.{name}"] = None if shape is None else (parts * shape[0], shape[1], shape[2])
        return shapes

    def cost(self, num_tokens: int, element_size: int = 4) -> Cost:
        """Cost of one forward over num_tokens tokens whose activations take element_size bytes each."""
        cfg, dim = self.cfg, self.model_dim
        pairs: float = num_tokens * cfg.top_k
        router = 2.0 * num_tokens * dim * cfg.num_experts
        experts = 6.0 * dim * (pairs * cfg.expert_dim + num_tokens * cfg.shared_width)
        # Saved per pair: gate and up, the row unless it is gathered again, its weight twice, its id, and where it goes;
        # for the shared experts gate, silu(gate), up and their product. The router keeps its input and fp32 logits.
        # Between processes the rows have room to spare, and tokens that arrived are kept where they are read again.
        row = dim if self.save_rows else 0
        chunked = 0 < cfg.chunk_tokens < num_tokens
        at_once = cfg.chunk_tokens if chunked else num_tokens
        arrived, rows_at_once = 0, at_once * cfg.top_k
        if self.exchange is not None:
            arrived, rows_at_once = self.exchange.room_for(at_once, cfg.top_k)
            pairs = rows_at_once * num_tokens / max(at_once, 1)
        again = chunked and cfg.chunk_recompute
        saved: float = num_tokens * (dim + 4 * cfg.shared_width)
        if not again:
            saved += pairs * (2 * cfg.expert_dim + row)
        if again or not self.save_rows:
            saved += arrived * dim * num_tokens / max(at_once, 1)
        routing = num_tokens * 4 * cfg.num_experts + pairs * 28
        # At its peak the backward pass holds the gradients of the experts' output, of gate and up, and of the rows,
        # and those of tokens that arrived on both ends of their way.
        workspace = rows_at_once * 2 * (dim + cfg.expert_dim) + 2 * arrived * dim
        if again:
            workspace += rows_at_once * (2 * cfg.expert_dim + row)
        return Cost(
            model_flops=router + experts,
            executed_flops=router + experts,
            saved_bytes=float(saved * element_size + routing),
            workspace_bytes=float(workspace * element_size),
        )


def step_counts(layers: Sequence[MoELayer]) -> list[Tensor]:
    """Each layer's [E] int64 counts of the step over all processes, added up in one exchange; for `update_bias` and
    load statistics, once per step.
    """
    if not layers:
        return []
    counts = torch.stack([layer.counts_E for layer in layers])
    layers[0].gate.tokens_group.all_reduce(counts)
    return list(counts.unbind())
