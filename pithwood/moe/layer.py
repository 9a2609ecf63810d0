"""A mixture-of-experts feed-forward layer in the pieces that a block's stages call.

`route` belongs to the first stage of a block, `experts` is the second, and the third adds `shared` to the combined
rows. Between them stand dispatch and combine, which may be replaced by a transport between processes. Parameter names
are those of transformers: gate.weight, experts.gate_up_proj, experts.down_proj, shared_experts.gate_proj.weight.

Legend: T packed tokens, D model width, E experts, F expert width, k experts per token, R rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from pithwood.attention.base import Cost, LayerContext
from pithwood.moe.config import MoEConfig
from pithwood.moe.dispatch import combine_tokens, dispatch_tokens
from pithwood.moe.experts import DenseMLP, GroupedExperts
from pithwood.moe.router import Router


class MoELayer(nn.Module):
    """Router, experts and shared experts. Parameters are made without values: the model's initialisation sets them."""

    def __init__(self, cfg: MoEConfig, model_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.model_dim = model_dim
        self.gate = Router(cfg, model_dim)
        self.experts = GroupedExperts(cfg.num_experts, model_dim, cfg.expert_dim)
        self.shared_experts = DenseMLP(model_dim, cfg.shared_width) if cfg.num_shared_experts else None

    def route(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [T, k] int64, weight [T, k] fp32, x_TD with loss terms attached); see `Router.route`."""
        return self.gate.route(x_TD, ctx)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """[T, D] sum of the shared experts, or None if the layer has none."""
        return None if self.shared_experts is None else self.shared_experts(x_TD)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Tensor:
        """Route, dispatch, experts, combine, plus the shared experts: [T, D] -> [T, D], all in this process."""
        ids_Tk, weight_Tk, x_TD = self.route(x_TD, ctx)
        rows_RD, offsets, handle = dispatch_tokens(x_TD, ids_Tk, self.cfg.num_experts)
        out_TD = combine_tokens(self.experts(rows_RD, offsets), weight_Tk, handle, x_TD.shape[0])
        shared_TD = self.shared(x_TD)
        return out_TD if shared_TD is None else out_TD + shared_TD

    @property
    def counts_E(self) -> Tensor:
        """[E] int64: (token, slot) pairs per expert since `reset_step`, counted in training mode."""
        return self.gate.counts_E

    def reset_step(self) -> None:
        """Zero the counts; call before each optimizer step's first forward."""
        self.gate.reset_step()

    def update_bias(self, counts_E: Tensor | None = None) -> None:
        """Move the selection bias after an optimizer step; counts_E defaults to this process's own counts."""
        self.gate.update_bias(self.counts_E if counts_E is None else counts_E)

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        """How Muon sees the parameters, by local name; the router goes to AdamW."""
        shapes: dict[str, tuple[int, int, int] | None] = {"gate.weight": None}
        shapes.update({f"experts.{name}": shape for name, shape in self.experts.optimizer_shapes().items()})
        return shapes

    def cost(self, num_tokens: int, element_size: int = 4) -> Cost:
        """Cost of one forward over num_tokens tokens whose activations take element_size bytes each."""
        cfg, dim = self.cfg, self.model_dim
        pairs = num_tokens * cfg.top_k
        router = 2.0 * num_tokens * dim * cfg.num_experts
        experts = 6.0 * dim * (pairs * cfg.expert_dim + num_tokens * cfg.shared_width)
        # Saved per pair: the dispatched row, gate and up, their product and the expert's output; for the shared experts
        # gate, silu(gate), up and their product. The router's input and scores are fp32 at any element_size, so a
        # narrower input of the shared experts is one more copy.
        saved = pairs * (2 * dim + 3 * cfg.expert_dim) + num_tokens * 4 * cfg.shared_width
        if cfg.shared_width and element_size != 4:
            saved += num_tokens * dim
        routing = num_tokens * 4 * (dim + cfg.num_experts) + pairs * 16
        return Cost(
            model_flops=router + experts,
            executed_flops=router + experts,
            saved_bytes=float(saved * element_size + routing),
            workspace_bytes=float(pairs * 2 * cfg.expert_dim * element_size),
        )
