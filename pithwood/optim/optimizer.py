"""The optimizer of a run: one step from gradients to weights, on the device from the norm to the average.

    optimizer = Optimizer(MuonConfig(lr=2e-3), dict(model.named_parameters()), roles, total_steps=run.steps)
    loss.backward(); metrics = optimizer.step(step); optimizer.zero_grad()

All state is keyed by parameter name and knows neither mesh nor order: `state_dict` is a flat dictionary of tensors. On
a mesh parameters are pieces, and so is their state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pithwood.optim.adamw import AdamWSlice, adamw_update
from pithwood.optim.clip import clip_scale, global_norm, global_norm_over
from pithwood.optim.config import STATE_DTYPES, MuonConfig, OptimizerConfig
from pithwood.optim.ema import WeightAverage
from pithwood.optim.groups import ParamPlan, ParamRole, check_parameters, plan_parameters
from pithwood.optim.layout import Division, Place, find_division
from pithwood.optim.muon import MuonRule, MuonSlice, muon_update, resolve_ns_dtype
from pithwood.optim.offload import HostState, Residence, in_place
from pithwood.optim.owners import Stack
from pithwood.optim.rounding import RoundingKey, rounding_key
from pithwood.optim.schedule import schedule_factor, schedule_spans
from pithwood.optim.shared_muon import SharedMuon
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece

MOMENTUM, EXP_AVG, EXP_AVG_SQ, COUNT = "muon.momentum.", "adamw.exp_avg.", "adamw.exp_avg_sq.", "adamw.step."
AVERAGE, AVERAGE_UPDATES, SKIPS = "ema.", "ema_updates", "consecutive_skips"


class Optimizer:
    """Clips, skips, updates and averages a named set of parameters.

    named_parameters  fp32 parameters, contiguous, on one device; none twice. On a mesh this process's pieces of them,
                      flat or in any shape, in the same order in all processes of a pipeline stage
    roles             one per name, of whole parameters
    total_steps       length of the run, for the schedule
    trainable         globs of the names that train, with "!" for exceptions; the others get requires_grad False
    lr_scales         glob -> multiple of the learning rate, the last match deciding
    seed              of the chances by which state in bf16 is rounded
    mesh              None: one process. Else all processes make their optimizer, change phases and step together, and
                      gradients are those of the whole mesh
    pieces            on a mesh, which elements each of named_parameters is; a parameter that has none is whole
    raises            ValueError for anything that does not fit, before any parameter is touched
    """

    def __init__(
        self,
        cfg: OptimizerConfig,
        named_parameters: Mapping[str, Tensor],
        roles: Mapping[str, ParamRole],
        total_steps: int,
        *,
        trainable: tuple[str, ...] = ("*",),
        lr_scales: Mapping[str, float] | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
        pieces: Mapping[str, Piece] | None = None,
    ) -> None:
        schedule_spans(cfg.schedule, total_steps)
        self.cfg, self.total_steps, self.seed = cfg, total_steps, seed
        self.mesh = mesh if mesh is not None and mesh.world.size > 1 else None
        self.place = Place() if self.mesh is None else Place.on(self.mesh)
        self.divisions: dict[str, Division] = {}
        """How each parameter known so far is divided between processes."""
        self.pieces: dict[str, Piece] = {}
        """Which of its elements are here."""
        self._shared: SharedMuon | None = None
        """How matrices are shared out between processes in this phase."""
        self.state: dict[str, Tensor] = {}
        """Moments and counts by key. Where they live on the host, call `state_dict` to read them."""
        self.host: HostState | None = None
        """Where momentum and moments live if not on the device."""
        self.average: WeightAverage | None = None
        """The averaged weights, None unless cfg.ema_decay is above 0."""
        self.set_phase(named_parameters, roles, trainable=trainable, lr_scales=lr_scales, pieces=pieces)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=self.device)
        """Device scalar: skipped steps since the last accepted one. Reading it on the host waits for the device."""

    def set_phase(
        self,
        named_parameters: Mapping[str, Tensor],
        roles: Mapping[str, ParamRole],
        *,
        trainable: tuple[str, ...] = ("*",),
        lr_scales: Mapping[str, float] | None = None,
        drop: bool = False,
        pieces: Mapping[str, Piece] | None = None,
    ) -> None:
        """Change what trains, and how fast, at a phase boundary; state follows the names.

        A name known before keeps its state, also while it is frozen, and also when its tensor is a new one of the same
        shape. A new name starts fresh. The state of names that are gone is kept for their return, and saved, unless
        `drop`. To resume in a later phase, go through the same phases first, then load. A name known before is the same
        piece as before where `pieces` does not give one.
        """
        device = check_parameters(named_parameters)
        divisions = self._divisions(named_parameters, roles, pieces)
        plans = plan_parameters(
            named_parameters,
            roles,
            muon=isinstance(self.cfg, MuonConfig),
            weight_decay=self.cfg.weight_decay,
            decay_embeddings=self.cfg.decay_embeddings,
            weight_decay_rules=self.cfg.weight_decay_rules,
            lr_scales=lr_scales or {},
            trainable=trainable,
            shapes={name: division.shape for name, division in divisions.items()},
            elsewhere=self._names_elsewhere(named_parameters),
        )
        averaged = self.average.average if self.average is not None else {}
        for name, param in named_parameters.items():
            for held in (self.state.get(MOMENTUM + name), self.state.get(EXP_AVG + name), averaged.get(name)):
                if held is not None and held.shape != param.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(param.shape)} but its optimizer state {tuple(held.shape)}; "
                        "a parameter that changes its shape between phases needs a new name"
                    )
        self.device, self.plans = device, plans
        self.divisions = divisions if drop else self.divisions | divisions
        self.pieces = {name: each.piece(self.place, self.place.fold) for name, each in self.divisions.items()}
        self._shared = None
        if self.cfg.offload_state and device.type == "cuda" and self.host is None:
            self.host = HostState(device)
        self.params: dict[str, Tensor] = dict(named_parameters)
        for name, plan in plans.items():
            param = named_parameters[name]
            param.requires_grad_(plan.trainable)
            if not plan.trainable:
                param.grad = None
            elif plan.muon and MOMENTUM + name not in self.state:
                self.state[MOMENTUM + name] = self._zeros(MOMENTUM, param)
            elif not plan.muon and EXP_AVG + name not in self.state:
                self.state[EXP_AVG + name] = self._zeros(EXP_AVG, param)
                self.state[EXP_AVG_SQ + name] = self._zeros(EXP_AVG_SQ, param)
                self.state[COUNT + name] = torch.zeros((), dtype=torch.float32, device=device)
        if self.average is not None:
            self.average.add(self.params)
        elif self.cfg.ema_decay > 0.0:
            self.average = WeightAverage(self.cfg.ema_decay, self.cfg.ema_warmup, self.params, device)
        if drop:
            self.state = {key: value for key, value in self.state.items() if _split_key(key)[1] in plans}
            if self.average is not None:
                self.average.average = {name: self.average.average[name] for name in plans}

    def _divisions(
        self, named_parameters: Mapping[str, Tensor], roles: Mapping[str, ParamRole], pieces: Mapping[str, Piece] | None
    ) -> dict[str, Division]:
        found = {}
        for name, param in named_parameters.items():
            if pieces is not None and name in pieces:
                piece = pieces[name]
            elif self.mesh is not None and name in self.pieces:
                piece = self.pieces[name]
            else:
                piece = Piece.whole(tuple(param.shape))
            if param.numel() != piece.numel:
                raise ValueError(f"{name} has {param.numel()} elements, but its piece {piece.start}:{piece.stop}")
            found[name] = find_division(name, piece, roles[name].kind if name in roles else "other", self.place)
        return found

    def _names_elsewhere(self, named_parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """What other pipeline stages hold."""
        if self.mesh is None:
            return ()
        return tuple(name for names in self.mesh.pp.all_gather_objects(list(named_parameters)) for name in names)

    def _state_dtype(self, prefix: str) -> torch.dtype:
        """What state of this kind is kept in."""
        if prefix == MOMENTUM and isinstance(self.cfg, MuonConfig):
            return STATE_DTYPES[self.cfg.momentum_dtype]
        return STATE_DTYPES[self.cfg.adam_state_dtype] if prefix in (EXP_AVG, EXP_AVG_SQ) else torch.float32

    def _zeros(self, prefix: str, param: Tensor) -> Tensor:
        dtype = self._state_dtype(prefix)
        if self.host is not None:
            return self.host.zeros_like(param, dtype)
        # not torch.zeros_like, which imports sympy for a tensor without memory: half a second of every run's start
        return torch.zeros(param.shape, dtype=dtype, device=param.device)

    @torch.no_grad()
    def step(self, step: int, grad_norm: Tensor | None = None) -> dict[str, Tensor]:
        """Update the parameters from their `.grad`, whose content is spent; return device scalars, no host sync.

        step       from 0, sets the learning rate
        grad_norm  norm of the whole gradient where these parameters are only a part of it; None computes it here
        returns    fp32 grad_norm (before clipping), clipped, skipped (0 or 1), lr (of cfg.lr); int64 consecutive_skips

        If the norm is not finite, every parameter, moment, count and average keeps every bit. Parameters without a
        gradient are left alone, as torch's optimizers do; on a mesh they count as having one of zeros, since others may
        have one. Kept copies of parameters (`ops.master`) are renewed on the way.
        """
        factor = schedule_factor(self.cfg.schedule, step, self.total_steps)
        active: list[tuple[ParamPlan, Tensor, Tensor]] = []
        for name, plan in self.plans.items():
            grad = self.params[name].grad
            if grad is None and self.mesh is not None and plan.trainable:
                grad = torch.zeros_like(self.params[name])
            if plan.trainable and grad is not None:
                if grad.dtype != torch.float32 or grad.is_sparse:
                    raise ValueError(
                        f"{name}: its gradient is {grad.dtype}, {grad.layout}; the optimizer needs dense fp32 ones"
                    )
                active.append((plan, self.params[name].detach(), grad.detach()))
        norm = self._norm(active) if grad_norm is None else grad_norm.detach().float()
        ok = torch.isfinite(norm)
        scale = clip_scale(norm, self.cfg.clip_norm)
        finish = self._step_muon([item for item in active if item[0].muon], step, scale, ok)
        self._step_adamw([item for item in active if not item[0].muon], step, scale, ok)
        finish()
        self._note_changes([plan.name for plan, _, _ in active])
        if self.average is not None:
            self.average.update(self.params, ok)
        self.consecutive_skips.add_(1).mul_(~ok)
        return {
            "grad_norm": norm,
            "clipped": ((scale < 1.0) & ok).float(),
            "skipped": (~ok).float(),
            "consecutive_skips": self.consecutive_skips.clone(),
            # Filled on the device: copying a host number there would wait for it.
            "lr": torch.full_like(norm, self.cfg.lr * factor),
        }

    def counted(self) -> set[str]:
        """Names of the parameters that this process counts in sums over all processes, every element once."""
        return {name for name in self.params if self.divisions[name].counts_here(self.place)}

    def _norm(self, active: list[tuple[ParamPlan, Tensor, Tensor]]) -> Tensor:
        if self.mesh is None:
            return global_norm([grad for _, _, grad in active])
        here = self.counted()
        counted = [grad for plan, _, grad in active if plan.name in here]
        others = [grad for plan, _, grad in active if plan.name not in here]
        return global_norm_over(self.mesh.world, counted, others, self.device)

    def _step_muon(
        self, active: list[tuple[ParamPlan, Tensor, Tensor]], step: int, scale: Tensor, ok: Tensor
    ) -> Callable[[], None]:
        """Returns what finishes the update: see `SharedMuon.start`."""
        cfg = self.cfg
        if not isinstance(cfg, MuonConfig):
            return _nothing
        lr = cfg.lr * schedule_factor(cfg.schedule, step, self.total_steps)
        ns_dtype = resolve_ns_dtype(cfg.ns_dtype, self.device)
        rule = MuonRule(cfg.momentum, cfg.nesterov, cfg.ns_steps, ns_dtype, scale, ok)
        flat = not self.place.alone
        slices = []
        for plan, param, grad in active:
            copy, shape = self._kept_copy(plan.name), (-1,) if flat else plan.matrix_shape
            slices.append(
                MuonSlice(
                    param.view(shape),
                    grad.reshape(shape),
                    self.state[MOMENTUM + plan.name].view(shape),
                    lr * plan.lr_scale,
                    plan.weight_decay,
                    None if copy is None else copy.view(shape),
                    self._rounding_key(MOMENTUM, plan.name, step),
                    self.pieces[plan.name].start,
                )
            )
        if self.mesh is None or not flat:
            muon_update(slices, rule, residence=self._residence())
            return _nothing
        if self._shared is None:
            stacks = [Stack(plan.name, *plan.matrix_shape, self.divisions[plan.name]) for plan, _, _ in active]
            self._shared = SharedMuon(self.mesh, self.place, stacks, ns_dtype)
        flats = {plan.name: item for (plan, _, _), item in zip(active, slices, strict=True)}
        return self._shared.start(flats, rule, residence=self._residence())

    def _step_adamw(self, active: list[tuple[ParamPlan, Tensor, Tensor]], step: int, scale: Tensor, ok: Tensor) -> None:
        cfg = self.cfg
        peak = cfg.lr if not isinstance(cfg, MuonConfig) or cfg.adamw_lr is None else cfg.adamw_lr
        lr = peak * schedule_factor(cfg.schedule, step, self.total_steps)
        slices = []
        for plan, param, grad in active:
            copy = self._kept_copy(plan.name)
            slices.append(
                AdamWSlice(
                    param.view(-1),
                    # Kernels walk memory and need the gradient laid out as the parameter.
                    grad.contiguous().view(-1),
                    self.state[EXP_AVG + plan.name].view(-1),
                    self.state[EXP_AVG_SQ + plan.name].view(-1),
                    self.state[COUNT + plan.name],
                    lr * plan.lr_scale,
                    plan.weight_decay,
                    None if copy is None else copy.view(-1),
                    self._rounding_key(EXP_AVG, plan.name, step),
                    self.pieces[plan.name].start,
                )
            )
        adamw_update(slices, betas=cfg.betas, eps=cfg.eps, grad_scale=scale, ok=ok, residence=self._residence())

    def _rounding_key(self, prefix: str, name: str, step: int) -> RoundingKey:
        return (0, 0) if self._state_dtype(prefix) == torch.float32 else rounding_key(self.seed, name, step)

    def _residence(self) -> Residence:
        return in_place if self.host is None else self.host

    def _kept_copy(self, name: str) -> Tensor | None:
        kept: tuple[Tensor, int] | None = getattr(self.params[name], "kept_copy", None)
        return None if kept is None else kept[0]

    def _note_changes(self, names: list[str]) -> None:
        """Tell autograd of writes that kernels made, and that kept copies are those of the parameters as they are."""
        for name in names:
            param, copy = self.params[name], self._kept_copy(name)
            torch.autograd.graph.increment_version(param)
            if copy is not None:
                param.kept_copy = (copy, param._version)  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        """Drop all gradients; the next backward pass allocates them anew."""
        for param in self.params.values():
            param.grad = None

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the context the parameters hold their running averages; ValueError if no average is kept."""
        if self.average is None:
            raise ValueError(
                f"there are no averaged weights: ema_decay={self.cfg.ema_decay}; set it above 0, for instance to 0.999"
            )
        with self.average.swap(self.params):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return all state by key: the live tensors, which the next step changes; copy them to keep them. Where state
        lives on the host, this waits until it is there."""
        if self.host is not None:
            self.host.settle()
        flat = {**self.state, SKIPS: self.consecutive_skips}
        if self.average is not None:
            flat |= {AVERAGE + name: value for name, value in self.average.average.items()}
            flat[AVERAGE_UPDATES] = self.average.updates
        return flat

    def state_pieces(self) -> dict[str, tuple[Piece, bool]]:
        """Return, for each key of `state_dict`, which elements this process holds and whether it is the one who writes
        them: over all processes every element has one writer.
        """
        first = self.mesh is None or self.mesh.is_first
        found = {}
        for key, value in self.state_dict().items():
            prefix, name = _split_key(key)
            if prefix == COUNT:
                found[key] = (Piece.whole(()), self.place.replica == self.place.fold == 0)
            elif self.mesh is not None and name in self.divisions:
                found[key] = (self.pieces[name], self.divisions[name].counts_here(self.place))
            else:
                found[key] = (Piece.whole(tuple(value.shape)), first)
        return found

    @torch.no_grad()
    def load_state_dict(self, flat: Mapping[str, Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
        """Copy saved state in; returns the keys (missing, unexpected).

        Moments of a parameter that is frozen here are expected: they wait for its next phase. With `strict` any other
        missing or unexpected key raises ValueError and nothing is changed. Without it, missing keys keep what they
        hold, and unexpected moments and averages are kept for names to come. A wrong shape or dtype always raises;
        flat values fit any shape. On a mesh each process gives its own pieces.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in flat]
        foreign = [key for key in flat if key not in own]
        unexpected = [key for key in foreign if not self._waits(key)]
        if strict and (missing or unexpected):
            raise ValueError(
                f"optimizer state does not fit: missing {_some(missing)}; unexpected {_some(unexpected)}. "
                "The optimizer's kind, ema_decay and the model must be those that saved it, or load with strict=False"
            )
        wanted = {key: (own[key].shape, own[key].dtype) for key in own if key in flat}
        for key in foreign:
            prefix, name = _split_key(key)
            if name in self.params:
                wanted[key] = (torch.Size() if prefix == COUNT else self.params[name].shape, self._state_dtype(prefix))
        for key, (shape, dtype) in wanted.items():
            if flat[key].shape not in (shape, (shape.numel(),)) or flat[key].dtype != dtype:
                raise ValueError(
                    f"{key} is {flat[key].dtype} {tuple(flat[key].shape)}, but {dtype} {tuple(shape)} is needed; "
                    "momentum_dtype, adam_state_dtype and the model must be those that saved it"
                )
        for key, value in flat.items():
            if key in wanted:
                value = value.view(wanted[key][0])
            if key in own:
                own[key].copy_(value)
                continue
            prefix, name = _split_key(key)
            if prefix == AVERAGE and self.average is not None:
                self.average.average[name] = value.detach().to(self.device, copy=True)
            elif prefix in (MOMENTUM, EXP_AVG, EXP_AVG_SQ) and self.host is not None:
                self.state[key] = self.host.zeros_like(value, value.dtype).copy_(value)
            elif prefix not in ("", AVERAGE):
                self.state[key] = value.detach().to(self.device, copy=True)
        return missing, unexpected

    def _waits(self, key: str) -> bool:
        prefix, name = _split_key(key)
        plan = self.plans.get(name)
        return (
            plan is not None
            and not plan.trainable
            and prefix not in ("", AVERAGE)
            and plan.muon == (prefix == MOMENTUM)
        )


def _nothing() -> None:
    """What is left to do of an update that is done."""


def _split_key(key: str) -> tuple[str, str]:
    """Return (prefix, parameter name) of a state key; the prefix is empty for state that belongs to no parameter."""
    for prefix in (MOMENTUM, EXP_AVG, EXP_AVG_SQ, COUNT, AVERAGE):
        if key.startswith(prefix):
            return prefix, key[len(prefix) :]
    return "", key


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)})" if keys else "nothing"
