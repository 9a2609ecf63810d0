"""What each parameter gets: which optimizer, its decay, its share of the learning rate, and whether it trains at all.

Globs are those of the shell over full parameter names; `*` also crosses dots. Where several match, the last one given
decides.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

ParamKind = Literal["matrix", "experts", "embedding", "head", "router", "norm", "bias", "other"]
KINDS = ("matrix", "experts", "embedding", "head", "router", "norm", "bias", "other")
MATRIX_KINDS = ("matrix", "experts")


@dataclass(frozen=True)
class ParamRole:
    """What a parameter is to the model."""

    kind: ParamKind
    """matrix and experts are orthogonalised by Muon; all others belong to AdamW."""
    matrix_shape: tuple[int, int, int] | None = None
    """The logical matrices in it, (how many, rows, columns), as a view of its memory: gate and up in one [2F, D]
    weight are (2, F, D). None takes a 2-D parameter as one matrix and a 3-D one as a stack."""


@dataclass(frozen=True)
class WeightDecayRule:
    """Weight decay of the parameters whose names match, in place of what their kind gets."""

    match: str
    """Glob over full parameter names; must match at least one."""
    value: float
    """Weight decay, 0 or more."""

    def __post_init__(self) -> None:
        if self.value < 0.0:
            raise ValueError(f"WeightDecayRule({self.match!r}): value={self.value} must be 0 or more")


@dataclass(frozen=True)
class ParamPlan:
    """All that the optimizer needs to know of one parameter."""

    name: str
    muon: bool
    matrix_shape: tuple[int, int, int]
    """View of the parameter as a stack of matrices; (0, 0, 0) for AdamW."""
    weight_decay: float
    lr_scale: float
    trainable: bool


def match_names(pattern: str, names: list[str], owner: str) -> list[str]:
    """Return the names that the glob matches; ValueError naming close ones if none. `owner` is the config field."""
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        core = max(pattern.split("*"), key=len).strip(".")
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
        close += [name for part in core.split(".") if part for name in names if part in name and name not in close]
        near = ", ".join((close or names)[:3])
        raise ValueError(f"{owner}: {pattern!r} matches no parameter; close names: {near}")
    return matched


def trainable_names(patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """Return the names that train: those matching a plain glob (all names if there is none) and no glob after a "!"."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    barred = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    chosen = {name for pattern in wanted for name in match_names(pattern, names, "trainable")} if wanted else set(names)
    for pattern in barred:
        chosen.difference_update(match_names(pattern, names, "trainable"))
    if not chosen:
        raise ValueError(f"trainable={list(patterns)} leaves no parameter to train")
    return chosen


def logical_shape(name: str, shape: tuple[int, ...], role: ParamRole) -> tuple[int, int, int]:
    """Return the parameter's (matrices, rows, columns); ValueError if the role's own shape does not fit."""
    if role.matrix_shape is not None:
        num, rows, cols = role.matrix_shape
        if min(role.matrix_shape) < 1 or num * rows * cols != math.prod(shape):
            raise ValueError(f"{name}: matrix_shape={role.matrix_shape} does not hold the elements of shape {shape}")
        return num, rows, cols
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ValueError(
        f"{name}: a parameter of kind {role.kind!r} and shape {shape} needs 2 or 3 dimensions, or a matrix_shape; "
        "give it the kind 'other' to train it with AdamW"
    )


def check_parameters(named_parameters: Mapping[str, Tensor]) -> torch.device:
    """Return the one device of the parameters; ValueError for a wrong dtype, layout, device or a tensor twice."""
    seen: dict[int, str] = {}
    devices = {param.device for param in named_parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"parameters lie on several devices: {', '.join(sorted(map(str, devices)))}; move the model to one"
        )
    for name, param in named_parameters.items():
        if param.dtype != torch.float32:
            raise ValueError(
                f"{name} is {param.dtype}; keep parameters in fp32, bf16 training casts them where they are used"
            )
        if not param.is_contiguous():
            raise ValueError(f"{name} is not contiguous: create it with .contiguous()")
        if id(param) in seen:
            raise ValueError(f"{seen[id(param)]} and {name} are one tensor; give it to the optimizer under one name")
        seen[id(param)] = name
    return devices.pop() if devices else torch.device("cpu")


def plan_parameters(
    named_parameters: Mapping[str, Tensor],
    roles: Mapping[str, ParamRole],
    *,
    muon: bool,
    weight_decay: float,
    decay_embeddings: bool,
    weight_decay_rules: tuple[WeightDecayRule, ...],
    lr_scales: Mapping[str, float],
    trainable: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    elsewhere: tuple[str, ...] = (),
) -> dict[str, ParamPlan]:
    """Decide for every parameter; ValueError for a missing role, an impossible shape or a glob that matches nothing.

    shapes     of the whole parameters, where those given are pieces
    elsewhere  names of parameters that other processes hold: a glob may match those alone

    Matrices and experts decay, embeddings and head if `decay_embeddings`, the rest not; then the rules, in order.
    """
    names = list(named_parameters)
    if not names:
        raise ValueError("the optimizer was given no parameters")
    missing = [name for name in names if name not in roles]
    if missing:
        raise ValueError(
            f"no role for {', '.join(missing[:3])} ({len(missing)} in all); the model must give one for each parameter"
        )
    for name in names:
        if roles[name].kind not in KINDS:
            raise ValueError(f"{name}: kind={roles[name].kind!r} must be one of {', '.join(KINDS)}")
    decaying = (*MATRIX_KINDS, "embedding", "head") if decay_embeddings else MATRIX_KINDS
    decay = {name: weight_decay if roles[name].kind in decaying else 0.0 for name in names}
    names += [name for name in elsewhere if name not in named_parameters]
    for rule in weight_decay_rules:
        decay.update(dict.fromkeys(match_names(rule.match, names, "weight_decay_rules"), rule.value))
    scale = dict.fromkeys(names, 1.0)
    for pattern, value in lr_scales.items():
        if value < 0.0:
            raise ValueError(f"lr_scales: {pattern!r}={value} must be 0 or more")
        scale.update(dict.fromkeys(match_names(pattern, names, "lr_scales"), value))
    chosen = trainable_names(trainable, names)
    plans = {}
    for name, param in named_parameters.items():
        by_muon = muon and roles[name].kind in MATRIX_KINDS
        whole = tuple(param.shape) if shapes is None else shapes[name]
        shape = logical_shape(name, whole, roles[name]) if by_muon else (0, 0, 0)
        plans[name] = ParamPlan(name, by_muon, shape, decay[name], scale[name], name in chosen)
    return plans
