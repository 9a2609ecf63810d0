"""Does a token mixer keep the contract of `attention/base.py`? Two layers of it, small sizes, random weights, a CPU.

The two layers stand one after the other with a residual between them, so that what a layer hands to the next one (the
carry) is under test too. Documents have 21, 1, 0, 40 and 16 tokens: choose the sizes of the configuration so that its
mechanism shows within them, `block_size=8` for instance.

Legend: T packed tokens, D model width, N documents.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pithwood.attention
from pithwood.attention.base import LayerContext, Mixer, MixerConfig, MixerShape, Mode
from pithwood.check.gates import Gate, GateError, require
from pithwood.check.numerics import poisoned_memory, rel_error, require_close
from pithwood.check.training import tiny_run, train_and_resume
from pithwood.config import apply_overrides, class_names, from_dict, to_dict
from pithwood.generate.cache import Cache
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.ops.packing import Packing
from pithwood.ops.rope import Rope
from pithwood.recipes import import_file
from pithwood.schema import field_docs

WIDTH, HEAD_DIM, LAYERS = 24, 8, 2
LENGTHS = (21, 1, 0, 40, 16)
STARTS = (0, 21, 22, 22, 62, 78)


def mixer_gates(config: MixerConfig, folder: Path) -> list[Gate]:
    """The gates of one mixer, from its configuration; `folder` takes a small training run."""
    return [
        Gate("config", lambda: _config(config)),
        Gate("build", lambda: _build(config)),
        Gate("shape", lambda: _shape(config)),
        Gate("carry", lambda: _carry(config)),
        Gate("gradients", lambda: _gradients(config)),
        Gate("causality", lambda: _causality(config)),
        Gate("documents", lambda: _documents(config)),
        Gate("replay", lambda: _replay(config)),
        Gate("cost", lambda: _cost(config)),
        Gate("decode", lambda: _decode(config)),
        Gate("train", lambda: _train(config, folder)),
    ]


def load_mixer(name: str, overrides: Sequence[str]) -> MixerConfig:
    """A mixer's configuration: a class of the package by its name, or `path/to/file.py:Class`, with overrides.

    raises  ValueError if there is no such class, it is no mixer's configuration, or a field has no default
    """
    for module in pkgutil.iter_modules(pithwood.attention.__path__):
        importlib.import_module(f"pithwood.attention.{module.name}")
    classes: dict[str, Any] = class_names((MixerConfig,), ())
    known = {short: cls for short, cls in classes.items() if cls.build is not MixerConfig.build}
    if ":" in name:
        file, _, wanted = name.rpartition(":")
        cls = getattr(import_file(Path(file)), wanted, None)
        if not (isinstance(cls, type) and issubclass(cls, MixerConfig)):
            raise ValueError(f"{file} has no class {wanted!r} that derives from MixerConfig")
    elif name in known:
        cls = known[name]
    else:
        raise ValueError(f"unknown mixer {name!r}; known are {', '.join(known)}, or path/to/file.py:Class")
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{cls.__name__} is not a dataclass; put @dataclass(frozen=True) above it")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}; give each a default, so that a layer can be named"
        )
    config: Any = cls()
    return apply_overrides(config, overrides)


class _Stack(nn.Module):
    """Two layers of the mixer with residuals; returns both layers' outputs side by side, [T, 2D]."""

    def __init__(self, config: MixerConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([config.build(_layer_shape(layer)) for layer in range(LAYERS)])
        generator = torch.Generator().manual_seed(0)
        self.to(dtype)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # Every parameter is random, norms too, so that no term hides behind a 0 or a 1.
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)

    def forward(
        self, x_TD: Tensor, packing: Packing, mode: Mode = "train", cache: Cache | None = None, **fields: Any
    ) -> Tensor:
        rope = Rope.from_positions(packing.position_T, HEAD_DIM, 100.0)
        carry: dict[str, Tensor] = {}
        outputs = []
        for index, layer in enumerate(self.layers):
            view = None if cache is None else cache.layer(index, packing)
            out = layer(x_TD, LayerContext(packing, rope, mode, index, view, carry=carry, **fields))
            carry = {**carry, **out.carry}
            outputs.append(out.y_TD)
            x_TD = x_TD + out.y_TD
        return torch.cat(outputs, -1)

    def mixers(self) -> list[Mixer]:
        return [layer for layer in self.layers if isinstance(layer, Mixer)]

    @property
    def causality(self) -> str:
        return self.mixers()[0].causality


def _layer_shape(layer: int) -> MixerShape:
    return MixerShape(WIDTH, 4, 2, HEAD_DIM, layer, LAYERS, norm_eps=1e-6, qk_norm=True)


def _input(tokens: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _packing() -> Packing:
    return Packing.from_lengths(LENGTHS)


def _model(config: MixerConfig) -> Qwen3MoEConfig:
    return Qwen3MoEConfig(
        vocab_size=64, model_dim=WIDTH, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM,
        attention=config, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16),
    )  # fmt: skip


def _config(config: MixerConfig) -> str:
    cls = type(config)
    docs = field_docs(cls)
    bare = [field.name for field in dataclasses.fields(cls) if not docs.get(field.name)]
    require(not bare, f"no docstring under the fields {', '.join(bare)} of {cls.__name__}")
    model = _model(config)
    again = from_dict(Qwen3MoEConfig, to_dict(model))
    require(again == model, f"{cls.__name__} comes back from JSON as {again.attention}, not as {config}")
    return f"{cls.__name__}, {len(dataclasses.fields(cls))} fields, the same after a trip through JSON"


def _build(config: MixerConfig) -> str:
    with poisoned_memory():
        model = Qwen3MoE(_model(config))
        model.init_weights(0)
    names = {}
    for name, parameter in model.blocks[0].self_attn.named_parameters():
        names[name] = parameter
        require(bool(torch.isfinite(parameter).all()), f"{name} is not initialised: build() left it, init_std() too")
        require(parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; master weights are fp32")
    mixer = model.blocks[0].self_attn
    require(isinstance(mixer, Mixer), f"build() returned a {type(mixer).__name__}, which is no Mixer")
    assert isinstance(mixer, Mixer)
    require(
        mixer.causality in ("strict", "leaky_selection", "bidirectional"),
        f"causality={mixer.causality!r} is not known; say strict, leaky_selection or bidirectional",
    )
    unknown = set(mixer.optimizer_shapes()) - set(names)
    require(not unknown, f"optimizer_shapes() names parameters that do not exist: {', '.join(sorted(unknown))}")
    for name, view in mixer.optimizer_shapes().items():
        fits = view is None or math.prod(view) == names[name].numel()
        require(fits, f"optimizer_shapes() sees {name} {list(names[name].shape)} as {view}: sizes differ")
    return f"{sum(p.numel() for p in names.values()):,} parameters, all initialised"


def _shape(config: MixerConfig) -> str:
    stack, tokens = _Stack(config), sum(LENGTHS)
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = _input(tokens, dtype=dtype).requires_grad_()
        mixer = stack.mixers()[0]
        packing = _packing()
        rope = Rope.from_positions(packing.position_T, HEAD_DIM, 100.0)
        y_TD = mixer(x_TD, LayerContext(packing, rope)).y_TD
        require(y_TD.shape == x_TD.shape, f"y has shape {list(y_TD.shape)} for x {list(x_TD.shape)}")
        require(y_TD.dtype == dtype, f"y is {y_TD.dtype} for x of {dtype}")
        require(bool(torch.isfinite(y_TD).all()), f"y holds NaN or infinity for x of {dtype}")
        stack.zero_grad()
        y_TD.float().square().sum().backward()
        for name, parameter in mixer.named_parameters():
            kept = parameter.grad is None or parameter.grad.dtype == torch.float32
            require(kept, f"the gradient of {name} is not fp32 under {dtype} activations")
    return f"{list(x_TD.shape)} -> {list(y_TD.shape)} in fp32 and bf16, gradients fp32"


def _carry(config: MixerConfig) -> str:
    stack, packing = _Stack(config), _packing()
    rope = Rope.from_positions(packing.position_T, HEAD_DIM, 100.0)
    carry: dict[str, Tensor] = {}
    for index, mixer in enumerate(stack.mixers()):
        out = mixer(_input(sum(LENGTHS)), LayerContext(packing, rope, layer=index, carry=carry))
        extra = set(out.carry) - set(mixer.carry_fields)
        require(not extra, f"the carry {', '.join(sorted(extra))} is not declared in carry_fields")
        carry = {**carry, **out.carry}
    return f"{', '.join(sorted(carry))} handed on" if carry else "none"


def _gradients(config: MixerConfig) -> str:
    """Directional derivatives by central differences in fp64, decisions replayed, against autograd."""
    stack, packing = _Stack(config, torch.float64), Packing.from_lengths((9, 1, 0, 23, 5))
    x_TD = _input(packing.num_queries, dtype=torch.float64).requires_grad_()
    decisions: dict[str, Any] = {}
    stack(x_TD, packing, probe=decisions)
    upstream = torch.randn(packing.num_queries, 2 * WIDTH, dtype=torch.float64, generator=_generator(2))

    def value() -> Tensor:
        return (stack(x_TD, packing, replay=decisions) * upstream).sum()

    tensors = {"x": x_TD, **dict(stack.named_parameters())}
    found = torch.autograd.grad(value(), list(tensors.values()), allow_unused=True)
    worst, worst_name = 0.0, ""
    for (name, tensor), grad in zip(tensors.items(), found, strict=True):
        if grad is None:
            raise GateError(f"no gradient reaches {name}")
        require(bool(torch.isfinite(grad).all()), f"the gradient of {name} holds NaN or infinity")
        for seed in (3, 4):
            along = torch.randn(tensor.shape, dtype=torch.float64, generator=_generator(seed))
            numeric = _central_difference(value, tensor, along, 1e-5)
            exact = float((grad * along).sum())
            # the size that a directional derivative typically has, so that a near-zero one is not held to itself
            size = max(abs(numeric), float(grad.norm() * along.norm()) / math.sqrt(grad.numel()))
            error = abs(numeric - exact) / size if size > 0 else abs(numeric - exact)
            if not error <= 1e-6:
                raise GateError(
                    f"the gradient of {name} is not that of the output: relative error {error:.1e}, allowed 1e-06 "
                    "(what is computed in fp32 although the input is fp64 shows here too)"
                )
            worst, worst_name = max((worst, worst_name), (error, name))
    return f"{len(tensors)} tensors against finite differences, worst {worst:.0e} of {worst_name}"


def _central_difference(value: Callable[[], Tensor], tensor: Tensor, along: Tensor, step: float) -> float:
    with torch.no_grad():
        tensor += step * along
        above = float(value())
        tensor -= 2 * step * along
        below = float(value())
        tensor += step * along
    return (above - below) / (2 * step)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _causality(config: MixerConfig) -> str:
    stack = _Stack(config)
    if stack.causality == "bidirectional":
        return "bidirectional: a later token may move an earlier one"
    length, packing = 48, Packing.from_lengths((48,))
    x_TD, decisions = _input(length), dict[str, Any]()
    before = stack(x_TD, packing, probe=decisions)
    # a leaky selection may look ahead when it chooses, but the attention that follows must not
    replay = decisions if stack.causality == "leaky_selection" else None
    places = (1, 7, 8, 20, 31, 33, 47)
    for place in places:
        changed = x_TD.clone()
        changed[place] = 3 * _input(1, seed=5)[0]
        after = stack(changed, packing, replay=replay)
        error = rel_error(after[:place], before[:place])
        if not error <= 1e-6:
            first = int((after - before).abs().amax(-1).gt(1e-6).nonzero()[0])
            raise GateError(f"changing token {place} moves token {first} before it (relative error {error:.1e})")
        moved = rel_error(after[place], before[place])
        require(moved > 1e-6, f"token {place} does not see itself: changing it does not change its own output")
    free = "" if replay is None else " with its selection replayed"
    return f"{len(places)} changed tokens move nothing before them{free}"


def _documents(config: MixerConfig) -> str:
    """Another document changes: outputs stay bit for bit, and no gradient comes from there."""
    stack, packing = _Stack(config), _packing()
    x_TD = _input(sum(LENGTHS))
    before = stack(x_TD, packing)
    for number, length in enumerate(LENGTHS):
        if not length:
            continue
        first, end = STARTS[number], STARTS[number + 1]
        changed = x_TD.clone()
        changed[first:end] = 3 * _input(length, seed=6)
        after = stack(changed, packing)
        moved = (after != before).any(-1)
        moved[first:end] = False
        if bool(moved.any()):
            raise GateError(f"changing document {number} moves token {int(moved.nonzero()[0])} of another document")
        watched = x_TD.clone().requires_grad_()
        stack(watched, packing)[first:end].square().sum().backward()
        assert watched.grad is not None
        foreign = watched.grad.abs().amax(-1) > 0
        foreign[first:end] = False
        if bool(foreign.any()):
            token = int(foreign.nonzero()[0])
            raise GateError(f"the loss of document {number} has a gradient at token {token} of another document")
        alone = stack(x_TD[first:end], Packing.from_lengths((length,)))
        require_close(alone, before[first:end], 1e-5, f"document {number} alone against document {number} packed")
    return f"{len(LENGTHS)} documents, none moves another by a bit, each is the same alone"


def _replay(config: MixerConfig) -> str:
    stack, packing, x_TD = _Stack(config), _packing(), _input(sum(LENGTHS))
    decisions: dict[str, Any] = {}
    first = stack(x_TD, packing, probe=decisions)
    require(torch.equal(stack(x_TD, packing), first), "the same input gives another output the second time")
    again: dict[str, Any] = {}
    replayed = stack(x_TD, packing, replay=decisions, probe=again)
    require(torch.equal(replayed, first), "recorded decisions, replayed, give another output")
    require(set(again) == set(decisions), f"replay asks for {sorted(again)}, recorded were {sorted(decisions)}")
    return f"{len(decisions)} decisions recorded and replayed" if decisions else "no decisions"


def _cost(config: MixerConfig) -> str:
    mixer = _Stack(config).mixers()[0]
    cost = mixer.cost(_packing())
    for name, value in dataclasses.asdict(cost).items():
        require(math.isfinite(value) and value >= 0, f"cost().{name}={value} must be a finite number >= 0")
    for name in ("model_flops", "executed_flops", "saved_bytes"):
        require(getattr(cost, name) > 0, f"cost().{name} is 0: MFU and the memory estimate would be wrong")
    require(
        cost.executed_flops >= cost.model_flops,
        f"cost() executes {cost.executed_flops:.0f} FLOPs, fewer than the mathematics needs ({cost.model_flops:.0f})",
    )
    twice = mixer.cost(Packing.from_lengths(LENGTHS * 2)).model_flops
    require(
        abs(twice / cost.model_flops - 2) < 1e-6,
        f"the same documents twice cost {twice / cost.model_flops:.3f} times the FLOPs, not 2",
    )
    return f"{cost.model_flops:.0f} FLOPs for {sum(LENGTHS)} tokens, {cost.saved_bytes:.0f} bytes kept"


def _decode(config: MixerConfig) -> str:
    """Prefill in pieces and decode token by token, two sequences at once, against one forward."""
    stack = _Stack(config)
    if stack.causality != "strict":
        return f"{stack.causality}: decoding is another function than the forward"
    lengths = (23, 40)
    packing = Packing.from_lengths(lengths)
    x_TD = _input(sum(lengths))
    expected = stack(x_TD, packing).detach()
    rows = x_TD.split(lengths)
    cache = Cache([mixer.cache_fields() for mixer in stack.mixers()], len(lengths), max_len=64, decode_attention="moba")
    found: list[list[Tensor]] = [[], []]
    steps = [(9, 17), (5, 0), (0, 3), *[(1, 1)] * 9]
    steps += [(0, 1)] * (lengths[1] - sum(step[1] for step in steps))
    with torch.no_grad():
        for number, new in enumerate(steps):
            held = list(cache.lengths)
            step = cache.begin(new)
            inputs = [row[h : h + n] for row, h, n in zip(rows, held, new, strict=True)]
            y = stack(torch.cat(inputs), step, "decode" if number > 2 else "prefill", cache)
            cache.advance()
            for pieces, piece in zip(found, y.split(new), strict=True):
                pieces.append(piece)
    worst = 0.0
    for number, (pieces, want) in enumerate(zip(found, expected.split(lengths), strict=True)):
        worst = max(worst, require_close(torch.cat(pieces), want, 1e-5, f"sequence {number} decoded from the cache"))
    return f"{len(steps)} steps of prefill and decoding equal one forward, worst {worst:.0e}"


def _train(config: MixerConfig, folder: Path) -> str:
    causality = _Stack(config).causality
    if causality != "strict":
        return f"{causality}: a run with it alone has no perplexity; train it with a strictly causal last phase"
    return train_and_resume(tiny_run(folder, config), folder / "runs")
