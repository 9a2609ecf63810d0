"""Qwen3-MoE: a decoder of pre-norm blocks, grouped-query attention with QK-norm, and a mixture of SwiGLU experts.

Source: Qwen3 technical report (arXiv 2505.09388) and the Hugging Face class `Qwen3MoeForCausalLM`, whose names the
parameters bear; experts are stacked: `mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]. Wider
than the original where the configuration asks: any token mixer per layer, dense layers, shared experts, sigmoid scores,
group-limited routing, a selection bias. A block is three stages, `attend_and_route`, `experts`, `merge`; the exchange
of tokens between them belongs to the caller, so that it can be overlapped with other work.

Legend: T packed tokens, D model width, H query heads, G KV heads, K head dim, E experts, F expert width, R dispatched
rows, k experts per token, X vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from pithwood.attention.base import CacheField, Cost, LayerContext, Mixer, MixerConfig, MixerOut, MixerShape, Mode
from pithwood.attention.full import FullAttentionConfig
from pithwood.losses import LossLedger
from pithwood.models.hf_form import hf_config
from pithwood.models.init import fill_normal
from pithwood.models.part import ModelPart
from pithwood.models.recompute import ActivationPlan, BlockCost
from pithwood.models.stages import CompiledStages
from pithwood.moe.config import MoEConfig
from pithwood.moe.experts import DenseMLP
from pithwood.moe.layer import MoELayer
from pithwood.ops.embed import embed
from pithwood.ops.linear import linear
from pithwood.ops.linear_logprob import linear_logprob
from pithwood.ops.linear_nll import linear_nll, workspace_bytes
from pithwood.ops.packing import Packing
from pithwood.ops.permute import RowPlan
from pithwood.ops.rms_norm import add_rms_norm, branch_rms_norm, rms_norm
from pithwood.ops.rope import Rope
from pithwood.optim.groups import ParamRole

_MOST = {
    "vocab_size": 2**24,
    "model_dim": 2**20,
    "num_layers": 2**10,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**14,
    "dense_dim": 2**22,
    "num_experts": 2**14,
    "expert_dim": 2**20,
    "num_shared_experts": 2**10,
}
"""Largest sizes that are taken for meant: beyond them, describing the model alone would take minutes or overflow."""


@dataclass(frozen=True)
class Qwen3MoEConfig:
    """Architecture of one model; every size in elements."""

    vocab_size: int = 151_936
    """Rows of the embedding and the head; at least the tokenizer's size."""
    model_dim: int = 2048
    """Width D of the residual stream."""
    num_layers: int = 48
    """Decoder blocks."""
    num_heads: int = 32
    """Query heads; a multiple of num_kv_heads."""
    num_kv_heads: int = 4
    """Key/value heads."""
    head_dim: int = 128
    """Size of one head; even (RoPE)."""
    qk_norm: bool = True
    """RMSNorm of each query and key head before RoPE."""
    attention_bias: bool = False
    """Biases in the four attention projections."""
    attention: MixerConfig | tuple[MixerConfig, ...] = field(default_factory=FullAttentionConfig)
    """Token mixer of every layer, or one per layer."""
    moe: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=128, top_k=8, expert_dim=768))
    """Routed experts of every layer that is not dense."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a plain SwiGLU instead of experts."""
    dense_dim: int = 6144
    """Hidden width of the dense layers."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square inside every RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding as the head."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections (o_proj, down_proj) get init_std / sqrt(2 *
    num_layers)."""

    def mixers(self) -> tuple[MixerConfig, ...]:
        """One mixer configuration per layer."""
        return (self.attention,) * self.num_layers if isinstance(self.attention, MixerConfig) else tuple(self.attention)

    def validate(self) -> None:
        """Raise ValueError in the words of the configuration if the sizes do not fit together."""
        sizes = {name: getattr(self, name) for name in _MOST if hasattr(self, name)}
        sizes |= {
            f"moe.{name}": getattr(self.moe, name) for name in ("num_experts", "expert_dim", "num_shared_experts")
        }
        for name, size in sizes.items():
            if size < 1 and name != "moe.num_shared_experts":
                raise ValueError(f"{name}={size} must be at least 1")
            if size > (most := _MOST[name.removeprefix("moe.")]):
                raise ValueError(f"{name}={size} is beyond any model; at most {most}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (RoPE rotates pairs)")
        if len(self.mixers()) != self.num_layers:
            raise ValueError(
                f"attention has {len(self.mixers())} entries but num_layers={self.num_layers}; "
                "give one mixer for all layers, or exactly one per layer"
            )
        for mixer in self.mixers():
            if type(mixer).build is MixerConfig.build:
                raise ValueError(
                    f"attention={type(mixer).__name__} is only a base of mixers; "
                    "choose FullAttentionConfig, SlidingWindowConfig, MoBAConfig or one of your own"
                )
        bad = [layer for layer in self.dense_layers if not 0 <= layer < self.num_layers]
        if bad:
            raise ValueError(f"dense_layers={self.dense_layers} names layers outside 0..{self.num_layers - 1}: {bad}")


@dataclass
class Routed:
    """What `attend_and_route` hands to the exchange and to `merge`."""

    residual_TD: Tensor
    ffn_in_TD: Tensor
    ids_Tk: Tensor | None
    """Expert ids, -1 for none; None in a dense layer, whose tokens stay where they are."""
    weight_Tk: Tensor | None
    carry: dict[str, Tensor]
    shared_TD: Tensor | None = None
    """What the shared experts make of ffn_in_TD, where that was computed while tokens travelled."""


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, add: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, x: Tensor, *, branch: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, add: Tensor | None = None, *, branch: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with something to add, (x + add, the norm of that); as a branch, (x, its norm)."""
        if add is not None:
            return add_rms_norm(x, add, self.weight, self.eps)
        norm = branch_rms_norm if branch else rms_norm
        return norm(x, self.weight, self.eps)


class Block(nn.Module):
    """One decoder layer in three stages."""

    compiled: CompiledStages | None = None
    """The stages compiled, for passes that record losses; None runs them as they are."""

    def __init__(self, cfg: Qwen3MoEConfig, layer: int, part: ModelPart | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.model_dim, cfg.norm_eps)
        self.self_attn = cfg.mixers()[layer].build(_mixer_shape(cfg, layer))
        self.post_attention_layernorm = RMSNorm(cfg.model_dim, cfg.norm_eps)
        self.mlp: DenseMLP | MoELayer
        if layer in cfg.dense_layers:
            self.mlp = DenseMLP(cfg.model_dim, cfg.dense_dim)
            return
        self.mlp = MoELayer(cfg.moe, cfg.model_dim, None if part is None else part.exchange)
        if part is not None:
            self.mlp.gate.tokens_group, self.mlp.gate.cp_group = part.mesh.tokens, part.mesh.cp

    def norms(self) -> tuple[nn.Module, ...]:
        """The modules whose output is cheap to compute again."""
        return self.input_layernorm, self.post_attention_layernorm

    def attend_and_route(self, x_TD: Tensor, ctx: LayerContext) -> Routed:
        x_TD, out = self.attend(x_TD, ctx)
        return self.route(x_TD, out, ctx)

    def attend(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, MixerOut]:
        """The mixer's part of the first stage: (x_TD, what the mixer makes of its norm)."""
        x_TD, normed_TD = self.input_layernorm(x_TD, branch=True)
        return x_TD, self.self_attn(normed_TD, ctx)

    def route(self, x_TD: Tensor, out: MixerOut, ctx: LayerContext) -> Routed:
        """What follows the mixer in the first stage."""
        residual_TD, ffn_in_TD = self.post_attention_layernorm(x_TD, out.y_TD)
        carry = {**ctx.carry, **out.carry}
        if isinstance(self.mlp, DenseMLP):
            return Routed(residual_TD, ffn_in_TD, None, None, carry)
        ids_Tk, weight_Tk, ffn_in_TD = self.mlp.route(ffn_in_TD, ctx)
        return Routed(residual_TD, ffn_in_TD, ids_Tk, weight_Tk, carry)

    def experts(
        self,
        rows_RD: Tensor,
        offsets_E: Tensor,
        weight_R: Tensor,
        source: tuple[Tensor, RowPlan] | None = None,
        unread: bool = False,
    ) -> Tensor:
        """Routed experts over rows grouped by expert, each row times its weight; see `GroupedExperts.forward`."""
        assert isinstance(self.mlp, MoELayer)
        return self.mlp.experts(rows_RD, offsets_E, weight_R, source, unread)

    def merge(self, routed: Routed, out_TD: Tensor | None) -> Tensor:
        """The block's output: out_TD (None in a dense layer), which is the residual plus the routed rows as combine
        adds them in one pass, plus what every token computes at home.
        """
        if isinstance(self.mlp, DenseMLP):
            return routed.residual_TD + self.mlp(routed.ffn_in_TD)
        assert out_TD is not None
        shared_TD = self.mlp.shared(routed.ffn_in_TD) if routed.shared_TD is None else routed.shared_TD
        return out_TD if shared_TD is None else out_TD + shared_TD

    def share(self, routed: Routed) -> None:
        """Compute the shared experts' part ahead of `merge`."""
        assert isinstance(self.mlp, MoELayer)
        routed.shared_TD = self.mlp.shared(routed.ffn_in_TD)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The three stages with the exchange between them; returns the output and the carry for the next layer."""
        stages = self if self.compiled is None or ctx.ledger is None else self.compiled.of(self)
        routed = stages.attend_and_route(x_TD, ctx)
        out_TD = None
        if routed.ids_Tk is not None:
            assert isinstance(self.mlp, MoELayer)
            assert routed.weight_Tk is not None
            travelling = None if self.mlp.exchange is None else partial(self.share, routed)
            out_TD = self.mlp.mix(
                routed.ffn_in_TD, routed.ids_Tk, routed.weight_Tk, routed.residual_TD, stages.experts, travelling,
                exact=ctx.ledger is None, unread=ctx.recomputing,
            )  # fmt: skip
        return stages.merge(routed, out_TD), routed.carry


class Qwen3MoE(nn.Module):
    """The whole model, or the part of it that a process of a mesh holds. Parameters are uninitialised until
    `init_weights` or a loaded checkpoint fills them.
    """

    def __init__(self, cfg: Qwen3MoEConfig, part: ModelPart | None = None) -> None:
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        self.part = part
        """What of the model is here, and with whom it is shared; None in one process."""
        self.layers = tuple(range(cfg.num_layers)) if part is None else part.layers
        """Numbers of the layers that are here."""
        self.activations = ActivationPlan.keep_all(cfg.num_layers)
        """How the blocks keep what their backward pass needs; `keep_activations` changes it."""
        self.model = nn.ModuleDict()
        if part is None or part.first:
            self.model["embed_tokens"] = nn.Embedding(
                cfg.vocab_size, cfg.model_dim, _weight=torch.empty(cfg.vocab_size, cfg.model_dim)
            )
        self.model["layers"] = nn.ModuleDict()
        self._divide("embed")
        for layer in self.layers:
            self.model["layers"][str(layer)] = Block(cfg, layer, part)  # type: ignore[operator]
            self._divide(f"layers.{layer}")
        if part is None or part.last:
            self.model["norm"] = RMSNorm(cfg.model_dim, cfg.norm_eps)
            if not cfg.tie_embeddings:
                self.lm_head = nn.Linear(1, 1, bias=False)
                self.lm_head.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.model_dim))
            self._divide("head")

    def _divide(self, key: str) -> None:
        """Hand the parameters that were just made, a block's for instance, to those that divide them."""
        if self.part is not None:
            roles = self.parameter_roles()
            taken = self.part.shards.names()
            made = {name: param for name, param in self.named_parameters() if name not in taken}
            self.part.divide(key, made, roles, self.cfg)

    @property
    def blocks(self) -> list[Block]:
        """Of the layers that are here, in order."""
        return list(self.model["layers"].values())  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        return self.model["embed_tokens"].weight if self.cfg.tie_embeddings else self.lm_head.weight  # type: ignore[return-value]

    def hidden(
        self,
        tokens_T: Tensor,
        packing: Packing,
        *,
        dtype: torch.dtype = torch.float32,
        mode: Mode = "train",
        ledger: LossLedger | None = None,
        cache: Any = None,
        replay: dict[str, Any] | None = None,
        probe: dict[str, Any] | None = None,
        cp: Any = None,
    ) -> Tensor:
        """[T, D] final normalised hidden states in `dtype`.

        tokens_T  [T] int64 ids below vocab_size, packed as `packing` says
        ledger    where losses that arise inside layers are recorded and scaled; None drops them
        cache     a `generate.cache.Cache` in modes prefill and decode
        replay    decisions to reuse, probe: where decisions are collected (see LayerContext.decide)
        cp        the other processes' tokens of the same samples, see `parallel.context`
        """
        ctx = self.context(packing, mode=mode, ledger=ledger, replay=replay, probe=probe, cp=cp)
        x_TD, _ = self.run_layers(self.layers, self.embed(tokens_T, dtype), ctx, {}, cache)
        return self.final_norm(x_TD)

    def context(self, packing: Packing, **fields: Any) -> LayerContext:
        """What all layers read in one pass over a micro-batch."""
        rope = Rope.from_positions(packing.position_T, self.cfg.head_dim, self.cfg.rope_theta)
        return LayerContext(packing, rope, **fields)

    def embed(self, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, D] in `dtype`: the first stage's beginning."""
        if self.part is not None:
            self.part.shards.available("embed")
        return embed(tokens_T, self.model["embed_tokens"].weight, dtype)  # type: ignore[arg-type]

    def run_layers(
        self, layers: Iterable[int], x_TD: Tensor, ctx: LayerContext, carry: dict[str, Tensor], cache: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Some consecutive layers: (their output, the carry for the layer after them)."""
        for layer in layers:
            block = self.model["layers"][str(layer)]  # type: ignore[index]
            layer_cache = None if cache is None else cache.layer(layer, ctx.packing)
            here = replace(ctx, layer=layer, cache=layer_cache, carry=carry)
            if self.part is None:
                x_TD, carry = self.activations.run(block, x_TD, here)
            else:
                run = partial(self.activations.run, block)
                x_TD, carry = self.part.shards.run(f"layers.{layer}", run, x_TD, here)
        return x_TD, carry

    def final_norm(self, x_TD: Tensor) -> Tensor:
        """[T, D] normalised hidden states: what the heads read."""
        if self.part is not None:
            self.part.shards.available("head")
        return self.model["norm"](x_TD)

    def forward_cached(self, tokens_T: Tensor, packing: Packing, cache: Any, mode: Mode) -> Tensor:
        """[T, D] hidden states of tokens appended to a cache, in the cache's dtype."""
        return self.hidden(tokens_T, packing, dtype=cache.dtype, mode=mode, cache=cache)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, X] fp32 (fp64 for fp64 input)."""
        logits = linear(hidden_TD, self.head_weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def logprob(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """[T] fp32 log-probability of each target, in chunks."""
        return linear_logprob(hidden_TD, self.head_weight, target_T)

    def nll_sum(self, hidden_TD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
        """Scalar, fp32: the sum of weight * -log p(target), in chunks."""
        return linear_nll(hidden_TD, self.head_weight, target_T, weight_T)

    @torch.no_grad()
    def init_weights(self, seed: int, only: set[str] | None = None) -> None:
        """Fill parameters (all, or those named) from (seed, name, element index); norms start at 1, biases at 0. Of
        divided ones this process's pieces are filled."""
        roles = self.parameter_roles()
        mixers = self.cfg.mixers()
        pieces = {} if self.part is None else {weight.name: weight for weight in self.part.shards.weights()}
        for name, param in self.named_parameters():
            if only is not None and name not in only:
                continue
            start = 0
            if name in pieces:
                param, start = pieces[name].kept, pieces[name].piece.start
            kind = roles[name].kind
            if kind == "norm":
                param.fill_(1.0)
                continue
            residual_out = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            std: float | None = (
                self.cfg.init_std / (2 * self.cfg.num_layers) ** 0.5 if residual_out else self.cfg.init_std
            )
            if kind == "bias":
                std = 0.0
            layer, local = _mixer_name(name)
            if local is not None:
                std = mixers[layer].init_std(local, std or 0.0)
            if std is not None:
                fill_normal(param, seed, name, std, start)

    def parameter_roles(self) -> dict[str, ParamRole]:
        """How the optimizer should treat each parameter: its kind, and for Muon the [matrices, rows, cols] it consists
        of.
        """
        overrides: dict[str, tuple[int, int, int] | None] = {}
        for layer, block in zip(self.layers, self.blocks, strict=False):
            for local, shape in block.self_attn.optimizer_shapes().items():
                overrides[f"model.layers.{layer}.self_attn.{local}"] = shape
            if isinstance(block.mlp, MoELayer):
                for local, shape in block.mlp.experts.optimizer_shapes().items():
                    overrides[f"model.layers.{layer}.mlp.experts.{local}"] = shape
        return {name: _role(name, param, overrides) for name, param in self.named_parameters()}

    def keep_activations(self, plan: ActivationPlan) -> None:
        """Keep activations as the plan says; selective blocks gather the rows of their experts again."""
        self.activations = plan
        for layer, block in zip(self.layers, self.blocks, strict=True):
            recompute = plan.recompute[layer]
            if isinstance(block.mlp, MoELayer):
                block.mlp.save_rows = self.cfg.moe.save_rows and recompute != "selective"

    def compile_stages(self, *, whole: bool, backend: str = "inductor") -> None:
        """Compile the stages of all blocks for training, each once for all layers of a kind; see `CompiledStages`."""
        stages = CompiledStages(Block, whole=whole, backend=backend)
        for block in self.blocks:
            block.compiled = stages

    def product_weights(self) -> dict[str, Tensor]:
        """The weights that matrix products take in the activations' dtype, by name: all matrices, experts and the head.

        The router's is used in fp32, and an embedding that is no head has its rows cast after they are looked up.
        """
        kinds = ("matrix", "experts", "head", *(("embedding",) if self.cfg.tie_embeddings else ()))
        roles = self.parameter_roles()
        return {name: param for name, param in self.named_parameters() if roles[name].kind in kinds}

    def set_attention(self, attention: MixerConfig | tuple[MixerConfig, ...]) -> tuple[set[str], dict[str, Tensor]]:
        """Replace every layer's mixer; parameters whose names and shapes both have stay the same tensors.

        Returns the names of parameters that are new (uninitialised) and the old parameters that no layer uses now.
        Attention mixers of equal `key_conv` have equal parameters: an exchange among them leaves both empty.
        """
        cfg = replace(self.cfg, attention=attention)
        cfg.validate()
        before = dict(self.named_parameters())
        with self.device:
            for layer, block in zip(self.layers, self.blocks, strict=True):
                block.self_attn = cfg.mixers()[layer].build(_mixer_shape(cfg, layer))
        self.cfg = cfg
        new = set()
        for name, param in list(self.named_parameters()):
            old = before.get(name)
            if old is not None and old.shape == param.shape:
                _set_parameter(self, name, old)
            else:
                new.add(name)
        after = dict(self.named_parameters())
        return new, {name: p for name, p in before.items() if after.get(name) is not p}

    def cache_fields(self) -> list[tuple[CacheField, ...]]:
        return [block.self_attn.cache_fields() for block in self.blocks]

    def num_params(self) -> dict[str, int]:
        """total, active (per token: k of E experts), and embedding (embedding and head) parameter counts."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for block in self.blocks:
            if isinstance(block.mlp, MoELayer):
                routed = sum(p.numel() for p in block.mlp.experts.parameters())
                idle += routed - routed * block.mlp.cfg.top_k // block.mlp.cfg.num_experts
        embedding = self.head_weight.numel() * (1 if self.cfg.tie_embeddings else 2)
        return {"total": total, "active": total - idle, "embedding": embedding}

    def cost(self, packing: Packing, element_size: int = 4) -> Cost:
        """Cost of one forward over a packing with offsets on the CPU, the loss of all tokens (`nll_sum`) included.

        Its bytes are those that `activations` leaves on the device: a recomputed block keeps its input and decisions,
        and the largest of them, whole for its backward pass, counts as workspace.

        element_size  bytes per activation: 4 for fp32, 2 for bf16; what is fp32 in either counts 4
        """
        tokens, dim = packing.num_queries, self.cfg.model_dim
        row = float(tokens * dim * element_size)
        head = 2.0 * tokens * dim * self.cfg.vocab_size
        # half precision is what GPUs train in; the model may not be on its device yet
        device = torch.device("cuda" if element_size == 2 else "cpu")
        # the head's gradients are made in its forward pass and gone before the blocks' backward passes begin
        at_head = sum(workspace_bytes(tokens, self.cfg.vocab_size, dim, element_size, device))
        # fp32 cos and sin for all layers, the final norm's input and the head's
        cost = Cost(head, head, saved_bytes=8.0 * tokens * self.cfg.head_dim + 2 * row, workspace_bytes=float(at_head))
        # layers of one kind cost the same, and a long packing takes milliseconds to price
        known: dict[tuple[MixerConfig, bool, str], BlockCost] = {}
        blocks = []
        for layer, mixer in enumerate(self.cfg.mixers()):
            kind = mixer, layer in self.cfg.dense_layers, self.activations.recompute[layer]
            if kind not in known:
                known[kind] = self.block_cost(layer, packing, element_size)
            blocks.append(known[kind])
        return cost + self.activations.costs(blocks)

    def first_block_cost(self, packing: Packing, element_size: int = 4) -> Cost:
        """Cost of the first block alone, as `activations` keeps it: what is left when its backward pass begins."""
        plan = ActivationPlan(self.activations.recompute[:1], self.activations.offload)
        return plan.costs([self.block_cost(0, packing, element_size)])

    def block_cost(self, layer: int, packing: Packing, element_size: int = 4) -> BlockCost:
        """Cost of one block's forward, and what it is made of."""
        block, tokens = self.blocks[layer], packing.num_queries
        row = float(tokens * self.cfg.model_dim * element_size)
        assert isinstance(block.self_attn, Mixer)
        # a shallow copy shares the parameters: asking at one size leaves no trace in the mixer
        mixer = copy.copy(block.self_attn)
        mixer.activation_bytes = element_size
        # with the inputs of the two norms
        cost = mixer.cost(packing) + Cost(saved_bytes=2 * row)
        inputs, cheap = row + mixer.decision_bytes(packing), 2 * row
        if isinstance(block.mlp, DenseMLP):
            dense_dim = self.cfg.dense_dim
            flops = 6.0 * tokens * self.cfg.model_dim * dense_dim
            # the input; gate, silu(gate), up and their product
            mlp = Cost(flops, flops, saved_bytes=row + 4.0 * tokens * dense_dim * element_size)
            return BlockCost(cost + mlp, inputs, cheap)
        inputs += 8.0 * tokens * block.mlp.cfg.top_k
        return BlockCost(cost + block.mlp.cost(tokens, element_size), inputs, cheap)

    def hf_config(self) -> dict[str, Any]:
        """config.json of the Hugging Face form; raises ValueError if Qwen3-MoE cannot express this model."""
        return hf_config(self.cfg)


def _mixer_shape(cfg: Qwen3MoEConfig, layer: int) -> MixerShape:
    return MixerShape(
        model_dim=cfg.model_dim,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        layer=layer,
        num_layers=cfg.num_layers,
        norm_eps=cfg.norm_eps,
        qk_norm=cfg.qk_norm,
        bias=cfg.attention_bias,
    )


def _mixer_name(name: str) -> tuple[int, str | None]:
    """(layer, local name) of a mixer's parameter; local is None for other parameters."""
    prefix, found, local = name.partition(".self_attn.")
    return (int(prefix.rsplit(".", 1)[1]), local) if found else (-1, None)


def _role(name: str, param: Tensor, overrides: dict[str, tuple[int, int, int] | None]) -> ParamRole:
    if name == "model.embed_tokens.weight":
        return ParamRole("embedding", None)
    if name == "lm_head.weight":
        return ParamRole("head", None)
    if name.endswith("mlp.gate.weight"):
        return ParamRole("router", None)
    if name.endswith(("layernorm.weight", "norm.weight")):
        return ParamRole("norm", None)
    if name.endswith(".bias"):
        return ParamRole("bias", None)
    if name in overrides:
        shape = overrides[name]
        kind = "experts" if ".experts." in name else "matrix"
        return ParamRole("other", None) if shape is None else ParamRole(kind, shape)  # type: ignore[arg-type]
    if param.ndim == 2:
        return ParamRole("matrix", (1, param.shape[0], param.shape[1]))
    if param.ndim == 3:
        return ParamRole("matrix", (param.shape[0], param.shape[1], param.shape[2]))
    return ParamRole("other", None)


def _set_parameter(root: nn.Module, name: str, param: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, param)
