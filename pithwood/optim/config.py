"""What a run says about its optimizer: Muon with AdamW beside it, or AdamW alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from pithwood.optim.groups import WeightDecayRule
from pithwood.optim.muon import NS_DTYPES, NSDtype
from pithwood.optim.schedule import Constant, Schedule

StateDtype = Literal["fp32", "bf16"]
STATE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _check_at_least_zero(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0.0 <= value < float("inf"):
            raise ValueError(f"{owner}: {name}={value} must be 0 or more, and finite")


def _check_below_one(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{owner}: {name}={value} must be at least 0 and below 1")


def _check_common(cfg: MuonConfig | AdamWConfig) -> None:
    owner = type(cfg).__name__
    _check_at_least_zero(owner, lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.eps)
    if len(cfg.betas) != 2:
        raise ValueError(f"{owner}: betas={cfg.betas} must be two numbers")
    _check_below_one(owner, **{"betas.0": cfg.betas[0], "betas.1": cfg.betas[1]}, ema_decay=cfg.ema_decay)
    if cfg.clip_norm is not None and not cfg.clip_norm > 0.0:
        raise ValueError(f"{owner}: clip_norm={cfg.clip_norm} must be above 0; give null for no clipping")
    _check_state_dtype(owner, "adam_state_dtype", cfg.adam_state_dtype)


def _check_state_dtype(owner: str, name: str, value: str) -> None:
    if value not in STATE_DTYPES:
        raise ValueError(f"{owner}: {name}={value!r} must be one of {', '.join(STATE_DTYPES)}")


@dataclass(frozen=True)
class MuonConfig:
    """Muon for matrices and experts, AdamW for embeddings, head, router, norms, biases and the rest."""

    lr: float = 2e-3
    """Peak learning rate of the matrices, 0 or more. Updates are as large as AdamW's, so AdamW's rates carry over."""
    momentum: float = 0.95
    """Share of the old momentum kept each step, 0 to below 1."""
    nesterov: bool = True
    """Look one step ahead: orthogonalise the gradient drawn towards the momentum, not the momentum itself."""
    ns_steps: int = 5
    """Newton-Schulz rounds, 1 to 20."""
    ns_dtype: NSDtype = "auto"
    """Arithmetic of Newton-Schulz: bf16, fp32, or auto, which is bf16 on CUDA and on CPUs with AMX, fp32 elsewhere."""
    weight_decay: float = 0.1
    """Decoupled decay per step and unit of learning rate, 0 or more, of the kinds that decay."""
    adamw_lr: float | None = None
    """Peak learning rate of the parameters in AdamW; null takes lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's memory of gradients and of their squares, each 0 to below 1."""
    eps: float = 1e-8
    """Added to AdamW's denominator, 0 or more."""
    schedule: Schedule = field(default_factory=Constant)
    """Multiple of the peak rates at each step."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient, above 0; null for no clipping."""
    ema_decay: float = 0.0
    """Memory of the averaged weights per step, 0 to below 1; 0 keeps no average."""
    ema_warmup: bool = True
    """Let the average forget faster at first: after n updates its memory is at most (1 + n) / (10 + n)."""
    decay_embeddings: bool = False
    """Whether embeddings and head decay too."""
    weight_decay_rules: tuple[WeightDecayRule, ...] = ()
    """Exceptions by name, the last match deciding."""
    momentum_dtype: StateDtype = "fp32"
    """What momentum is kept in: fp32, or bf16 rounded up or down by chance, which saves 2 bytes a parameter."""
    adam_state_dtype: StateDtype = "fp32"
    """What AdamW's moments are kept in: fp32, or bf16 rounded up or down by chance, which saves 4 bytes a parameter."""
    offload_state: bool = False
    """Keep momentum and moments in pinned host memory and stream them through a GPU during the update; on a CPU, whose
    memory holds them anyway, it changes nothing."""

    def __post_init__(self) -> None:
        _check_common(self)
        _check_at_least_zero("MuonConfig", adamw_lr=self.adamw_lr)
        _check_below_one("MuonConfig", momentum=self.momentum)
        _check_state_dtype("MuonConfig", "momentum_dtype", self.momentum_dtype)
        if not 1 <= self.ns_steps <= 20:
            raise ValueError(f"ns_steps={self.ns_steps} must lie between 1 and 20")
        if self.ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype={self.ns_dtype!r} must be one of {', '.join(NS_DTYPES)}")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW for every parameter."""

    lr: float = 1e-3
    """Peak learning rate, 0 or more."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Memory of gradients and of their squares, each 0 to below 1."""
    eps: float = 1e-8
    """Added to the denominator, 0 or more."""
    weight_decay: float = 0.1
    """Decoupled decay per step and unit of learning rate, 0 or more."""
    schedule: Schedule = field(default_factory=Constant)
    """Multiple of the peak rate at each step."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient, above 0; null for no clipping."""
    ema_decay: float = 0.0
    """Memory of the averaged weights per step, 0 to below 1; 0 keeps no average."""
    ema_warmup: bool = True
    """Let the average forget faster at first: after n updates its memory is at most (1 + n) / (10 + n)."""
    decay_embeddings: bool = False
    """Whether embeddings and head decay too."""
    weight_decay_rules: tuple[WeightDecayRule, ...] = ()
    """Exceptions by name, the last match deciding."""
    adam_state_dtype: StateDtype = "fp32"
    """What AdamW's moments are kept in: fp32, or bf16 rounded up or down by chance, which saves 4 bytes a parameter."""
    offload_state: bool = False
    """Keep momentum and moments in pinned host memory and stream them through a GPU during the update; on a CPU, whose
    memory holds them anyway, it changes nothing."""

    def __post_init__(self) -> None:
        _check_common(self)


OptimizerConfig = MuonConfig | AdamWConfig
