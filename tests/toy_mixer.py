"""A token mixer that lives outside the package: a gated linear recurrence with a state, a loss term and a carry.

h_t = a_t * h_{t-1} + (1 - a_t) * x_t W_in, with a_t = sigmoid(x_t w_gate + b + gate logit of the layer below); y_t =
h_t W_out. The recurrence restarts at documents, and goes on where a document lies on several processes.

Legend: T packed tokens, D model width, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pithwood.attention.base import CacheField, Cost, LayerContext, Mixer, MixerConfig, MixerOut, MixerShape
from pithwood.losses import LossTerm, attach_loss
from pithwood.ops.linear import linear
from pithwood.ops.packing import Packing
from pithwood.parallel.context import ContextGroup, prefix_scan


@dataclass(frozen=True)
class ToyRecurrenceConfig(MixerConfig):
    """A gated linear recurrence."""

    gate_coef: float = 0.01
    """Weight of the mean squared gate logit."""

    def build(self, shape: MixerShape) -> Mixer:
        return ToyRecurrence(self, shape)

    def init_std(self, name: str, default: float) -> float | None:
        return 0.0 if name == "gate_bias" else default


class ToyRecurrence(Mixer):
    carry_fields = ("toy_gate",)
    context_parallel = True

    def __init__(self, config: ToyRecurrenceConfig, shape: MixerShape) -> None:
        super().__init__()
        self.config, self.dim = config, shape.model_dim
        self.in_proj = nn.Parameter(torch.empty(self.dim, self.dim))
        self.out_proj = nn.Parameter(torch.empty(self.dim, self.dim))
        self.gate = nn.Parameter(torch.empty(self.dim, self.dim))
        self.gate_bias = nn.Parameter(torch.empty(self.dim))

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        gate_TD = linear(x_TD, self.gate, self.gate_bias)
        if "toy_gate" in ctx.carry:
            gate_TD = gate_TD + ctx.carry["toy_gate"]
        x_TD = attach_loss(
            x_TD,
            LossTerm("toy_gate", gate_TD.float().square().mean(-1).sum(), float(x_TD.shape[0]), self.config.gate_coef),
            ctx.ledger,
        )
        keep_TD, in_TD = gate_TD.sigmoid(), linear(x_TD, self.in_proj)
        if ctx.cp is not None:
            y_TD = self._run_in_context(keep_TD, in_TD, ctx.packing, ctx.cp)
            return MixerOut(linear(y_TD, self.out_proj), {"toy_gate": gate_TD})
        cu = ctx.packing.cu_q.tolist()
        num_docs = len(cu) - 1
        start_ND = torch.zeros(num_docs, self.dim, dtype=x_TD.dtype) if ctx.cache is None else ctx.cache.read("state")
        outputs, finals = [], []
        for doc in range(num_docs):
            state = start_ND[doc]
            for t in range(cu[doc], cu[doc + 1]):
                state = keep_TD[t] * state + (1 - keep_TD[t]) * in_TD[t]
                outputs.append(state)
            finals.append(state)
        if ctx.cache is not None:
            ctx.cache.write("state", torch.stack(finals))
        return MixerOut(linear(torch.stack(outputs), self.out_proj), {"toy_gate": gate_TD})

    def _run_in_context(self, keep_TD: Tensor, in_TD: Tensor, packing: Packing, cp: ContextGroup) -> Tensor:
        """h [T, D] from the state that the processes before this one hand on."""
        factor_TD = keep_TD.masked_fill((packing.position_T == 0)[:, None], 0.0)
        scale, state = torch.ones(self.dim), torch.zeros(self.dim)
        for factor, keep, value in zip(factor_TD, keep_TD, in_TD, strict=True):
            scale, state = factor * scale, factor * state + (1 - keep) * value

        def combine(early: tuple[Tensor, ...], late: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return early[0] * late[0], late[0] * early[1] + late[1]

        _, state = prefix_scan(cp, (scale, state), combine, (torch.ones(self.dim), torch.zeros(self.dim)))
        outputs = []
        for factor, keep, value in zip(factor_TD, keep_TD, in_TD, strict=True):
            state = factor * state + (1 - keep) * value
            outputs.append(state)
        return torch.stack(outputs)

    def cache_fields(self) -> tuple[CacheField, ...]:
        return (CacheField("state", (self.dim,), torch.float32, "sequence"),)

    def cost(self, packing: Packing) -> Cost:
        flops = 6.0 * packing.num_queries * self.dim**2
        return Cost(flops, flops, saved_bytes=16.0 * packing.num_queries * self.dim)
