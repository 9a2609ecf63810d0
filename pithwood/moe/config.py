"""The configuration of a mixture-of-experts feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]
Balance = Literal["none", "micro_batch", "sequence", "global_batch"]
Routing = Literal["learned", "balanced"]


@dataclass(frozen=True)
class MoEConfig:
    """Experts, router and load balancing of one layer; raises ValueError on values that cannot work."""

    num_experts: int
    """Routed experts, >= 1."""
    top_k: int
    """Experts per token, 1 to num_experts."""
    expert_dim: int
    """Hidden width of one expert's SwiGLU, >= 1."""
    score: Score = "softmax"
    """How router logits become scores: softmax over the experts, or a sigmoid of each."""
    renormalize: bool = True
    """Divide a token's weights by their sum."""
    scale: float = 1.0
    """Factor on the weights after renormalising (routed_scaling_factor in DeepSeek's configurations), > 0."""
    num_groups: int = 1
    """Equal groups of neighbouring experts; 1 turns group limits off."""
    groups_per_token: int = 1
    """Groups that a token may choose experts from, 1 to num_groups."""
    group_score: GroupScore = "max"
    """What ranks groups: their best expert (DeepSeek-V2), or the sum of their best two (DeepSeek-V3)."""
    num_shared_experts: int = 0
    """Experts that every token passes through; together they are one SwiGLU of num_shared_experts * shared_dim."""
    shared_dim: int = 0
    """Hidden width of one shared expert; 0 means expert_dim."""
    balance: Balance = "none"
    """Where the balance loss takes the experts' load: in this micro-batch, each document, or the optimizer step."""
    balance_coef: float = 0.0
    """Weight of the balance loss, which is 1 per layer at perfect balance; > 0 exactly when balance is not "none"."""
    bias_update_rate: float | None = None
    """Step of the selection bias that balances without a loss; 0 keeps a loaded bias fixed, None has no bias."""
    z_loss_coef: float = 0.0
    """Weight of the mean squared logsumexp of the router logits, >= 0."""
    routing: Routing = "learned"
    """learned: by score. balanced: slot j of token t goes to expert (t * top_k + j) mod num_experts, for benchmarks."""
    save_rows: bool = True
    """Keep the rows that the experts read for the backward pass; false gathers them again from the tokens: top_k times
    the layer's input less memory for one more copy of it."""
    chunk_tokens: int = 0
    """Tokens whose rows exist at a time; 0 means all of a micro-batch. Bounds the top_k rows per token of very long
    sequences; changes no value beyond rounding."""
    chunk_recompute: bool = True
    """With chunk_tokens: compute each chunk's experts again in the backward pass; false keeps what they need of all
    chunks."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("score", Score),
            ("group_score", GroupScore),
            ("balance", Balance),
            ("routing", Routing),
        ):
            value, choices = getattr(self, name), get_args(allowed)
            if value not in choices:
                raise ValueError(f"moe.{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("num_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"moe.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe.top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")
        if self.scale <= 0:
            raise ValueError(f"moe.scale={self.scale} must be positive; 1.0 leaves the weights as they are")
        self._check_groups()
        if self.num_shared_experts < 0 or self.shared_dim < 0:
            raise ValueError(
                f"moe.num_shared_experts={self.num_shared_experts} and moe.shared_dim={self.shared_dim} must be >= 0"
            )
        if self.shared_dim and not self.num_shared_experts:
            raise ValueError(f"moe.shared_dim={self.shared_dim} needs num_shared_experts >= 1")
        if self.balance == "none" and self.balance_coef != 0:
            raise ValueError(
                f"moe.balance_coef={self.balance_coef} does nothing with balance='none'; "
                "set balance_coef=0, or choose a balance"
            )
        if self.balance != "none" and self.balance_coef <= 0:
            raise ValueError(
                f"moe.balance={self.balance!r} needs balance_coef > 0, not {self.balance_coef}; 1e-3 is usual"
            )
        if self.bias_update_rate is not None and self.bias_update_rate < 0:
            raise ValueError(f"moe.bias_update_rate={self.bias_update_rate} must be >= 0 or null; 1e-3 is usual")
        if self.chunk_tokens < 0:
            raise ValueError(f"moe.chunk_tokens={self.chunk_tokens} must be 0 (all tokens at once) or more")
        if self.z_loss_coef < 0:
            raise ValueError(f"moe.z_loss_coef={self.z_loss_coef} must be >= 0; 1e-3 is usual")

    def _check_groups(self) -> None:
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"moe.num_groups={self.num_groups} must divide num_experts={self.num_experts}")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"moe.groups_per_token={self.groups_per_token} must lie between 1 and num_groups={self.num_groups}"
            )
        size = self.num_experts // self.num_groups
        if self.groups_per_token * size < self.top_k:
            raise ValueError(
                f"moe.groups_per_token={self.groups_per_token} groups of {size} experts hold fewer than "
                f"top_k={self.top_k}; raise groups_per_token or lower top_k"
            )
        if self.num_groups > 1 and self.group_score == "top2_sum" and size < 2:
            raise ValueError(
                f"moe.group_score='top2_sum' needs groups of two experts or more; num_groups={self.num_groups}"
            )

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together; 0 if there are none."""
        return self.num_shared_experts * (self.shared_dim or self.expert_dim)
