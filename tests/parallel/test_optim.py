"""The optimizer on a mesh: three steps equal one process's, whatever holds which piece of what."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from pithwood.optim.groups import ParamRole, WeightDecayRule
from pithwood.optim.layout import Division, Place
from pithwood.optim.muon import MuonRule, MuonSlice, muon_update
from pithwood.optim.offload import HostState, in_place
from pithwood.optim.optimizer import Optimizer
from pithwood.optim.owners import Stack
from pithwood.optim.schedule import Cosine
from pithwood.optim.shared_muon import SharedMuon
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece
from tests.numerics import assert_close
from tests.optim.helpers import assert_same_bits
from tests.processes import run_on

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (20, 8),
    "layers.0.q_proj.weight": (12, 8),
    "layers.0.kv_proj.weight": (12, 8),
    "layers.0.odd.weight": (5, 7),
    "layers.0.experts.gate_up": (4, 16, 8),
    "layers.0.norm.weight": (8,),
    "layers.1.o_proj.weight": (8, 12),
    "layers.1.experts.down": (4, 8, 8),
    "layers.1.experts.small": (4, 3, 3),
    "layers.1.experts.odd": (2, 5, 7),
    "layers.1.router.weight": (4, 8),
    "layers.1.bias": (13,),
}
ROLES = {
    "embed.weight": ParamRole("embedding"),
    "layers.0.q_proj.weight": ParamRole("matrix"),
    "layers.0.kv_proj.weight": ParamRole("matrix", (2, 6, 8)),
    "layers.0.odd.weight": ParamRole("matrix"),
    "layers.0.experts.gate_up": ParamRole("experts", (8, 8, 8)),
    "layers.0.norm.weight": ParamRole("norm"),
    "layers.1.o_proj.weight": ParamRole("matrix"),
    "layers.1.experts.down": ParamRole("experts"),
    "layers.1.experts.small": ParamRole("experts"),
    "layers.1.experts.odd": ParamRole("experts"),
    "layers.1.router.weight": ParamRole("router"),
    "layers.1.bias": ParamRole("bias"),
}
MESHES = {
    "dp_shard": MeshConfig(dp_shard=2),
    "dp_replicate": MeshConfig(dp_replicate=2),
    "cp": MeshConfig(cp=2),
    "ep": MeshConfig(dp_shard=2, ep=2),
    "pp": MeshConfig(pp=2),
    "hybrid": MeshConfig(dp_replicate=2, dp_shard=2),
    "shards_of_experts": MeshConfig(dp_shard=2, cp=2, ep=2),
    "shards_of_stages": MeshConfig(pp=2, dp_shard=2),
}
CONFIGS: dict[str, OptimizerConfig] = {
    "muon": MuonConfig(lr=0.02, adamw_lr=0.01, ns_dtype="fp32", ema_decay=0.9, schedule=Cosine(2), clip_norm=2.0),
    "adamw": AdamWConfig(lr=0.02, ema_decay=0.9, clip_norm=2.0, weight_decay_rules=(WeightDecayRule("embed*", 0.3),)),
}
STEPS = 3


def values(number: int) -> dict[str, Tensor]:
    """Whole tensors like the parameters; number 0 are these, the others gradients."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def divided(mesh: Mesh) -> dict[str, Piece]:
    """This process's piece of each parameter of its pipeline stage, cut wherever that gives equal parts."""
    place, found = Place.on(mesh), {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        if number * mesh.pp.size // len(SHAPES) != mesh.pp.rank:
            continue
        experts = ROLES[name].kind == "experts"
        parts = place.folds // place.ep if experts else place.folds
        part = math.prod(shape) // (place.ep if experts else 1)
        found[name] = Division(shape, experts, cut=part % parts == 0).piece(place, place.fold)
    return found


def cut(whole: Tensor, piece: Piece) -> Tensor:
    return whole.reshape(-1)[piece.start : piece.stop].clone()


def on_mesh(mesh: Mesh, cfg: OptimizerConfig, **options: Any) -> tuple[Optimizer, dict[str, Piece]]:
    """An optimizer of the pieces; experts keep their shape where they are whole, all else is flat."""
    pieces, whole = divided(mesh), values(0)
    params = {}
    for name, piece in pieces.items():
        value = cut(whole[name], piece).to(mesh.device)
        params[name] = torch.nn.Parameter(value.view(piece.shape) if piece.is_whole else value)
    return Optimizer(cfg, params, ROLES, 6, mesh=mesh, pieces=pieces, **options), pieces


def take(optimizer: Optimizer, pieces: dict[str, Piece], step: int) -> dict[str, float]:
    """One step from the gradients that a reduction over the mesh would leave here."""
    grads = values(1 + step)
    for name, param in optimizer.params.items():
        param.grad = cut(grads[name], pieces[name]).view_as(param).to(param.device) if param.requires_grad else None
    return {name: value.item() for name, value in optimizer.step(step).items()}


def held(optimizer: Optimizer) -> dict[str, tuple[Piece, bool, Tensor]]:
    """What this process holds of parameters and state, and whether it is their writer."""
    found = {}
    for key, (piece, writes) in optimizer.state_pieces().items():
        found[key] = (piece, writes, optimizer.state_dict()[key].detach().reshape(-1).clone().cpu())
    for name, param in optimizer.params.items():
        writes = optimizer.divisions[name].counts_here(optimizer.place)
        found["param." + name] = (optimizer.pieces[name], writes, param.detach().reshape(-1).clone().cpu())
    return found


def three_steps(mesh: Mesh, cfg: OptimizerConfig) -> tuple[list[dict[str, float]], Any]:
    optimizer, pieces = on_mesh(mesh, cfg)
    return [take(optimizer, pieces, step) for step in range(STEPS)], held(optimizer)


def assembled(results: list[dict[str, tuple[Piece, bool, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from what their writers hold; everybody else must hold the same, and every element one writer."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for result in results:
        for key, (piece, writes, value) in result.items():
            size = math.prod(piece.shape)
            if writes:
                whole.setdefault(key, torch.full((size,), math.nan))[piece.start : piece.stop] = value.float()
                times.setdefault(key, torch.zeros(size))[piece.start : piece.stop] += 1
    assert all(bool((count == 1).all()) for count in times.values())
    for result in results:
        for key, (piece, _, value) in result.items():
            assert torch.equal(whole[key][piece.start : piece.stop], value.float()), key
    return whole


def of_one_process(cfg: OptimizerConfig, device: str = "cpu") -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    metrics, result = three_steps(Mesh.single(device), cfg)
    return metrics, assembled([result])


def check_three_steps(mesh: MeshConfig, cfg: OptimizerConfig, device: str = "cpu") -> None:
    expected_metrics, expected = of_one_process(cfg, device)
    results = run_on(mesh, three_steps, cfg, device=device)
    for metrics, _ in results:
        assert metrics == results[0][0]
        for ours, theirs in zip(metrics, expected_metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
            assert ours["clipped"] == 1.0
    whole = assembled([result for _, result in results])
    assert whole.keys() == expected.keys()
    start = values(0)
    for key, value in whole.items():
        assert_close(value, expected[key], tol=1e-5, what=key)
        if key.startswith("param."):
            first = start[key.removeprefix("param.")].reshape(-1)
            assert_close(value - first, expected[key] - first, tol=1e-5, what=key)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_three_steps_equal_one_process(mesh, kind):
    check_three_steps(MESHES[mesh], CONFIGS[kind])


def test_matrices_travel_in_bf16_where_newton_schulz_runs_in_it():
    """Without clipping owners get the very bits of one process; products of other batch sizes round otherwise."""
    cfg = MuonConfig(lr=0.02, weight_decay=0.0, ns_dtype="bf16", clip_norm=None)
    _, expected = of_one_process(cfg)
    whole = assembled([result for _, result in run_on(MESHES["hybrid"], three_steps, cfg)])
    for name, start in values(0).items():
        moved, theirs = (found["param." + name] - start.reshape(-1) for found in (whole, expected))
        assert_close(moved, theirs, tol=1e-2, what=name)


LOW = {
    "muon": MuonConfig(lr=0.02, ns_dtype="fp32", momentum_dtype="bf16", adam_state_dtype="bf16", clip_norm=None),
    "adamw": AdamWConfig(lr=0.02, adam_state_dtype="bf16", clip_norm=None),
}


@pytest.mark.parametrize("kind", LOW)
def test_state_in_bf16_is_rounded_as_on_one_process(kind):
    _, expected = of_one_process(LOW[kind])
    whole = assembled([result for _, result in run_on(MESHES["shards_of_experts"], three_steps, LOW[kind])])
    state = [key for key in whole if not key.startswith("param.")]
    assert_same_bits({key: whole[key] for key in state}, {key: expected[key] for key in state})


def with_a_bad_gradient(mesh: Mesh, cfg: OptimizerConfig, rank: int, name: str, bad: float) -> bool:
    optimizer, pieces = on_mesh(mesh, cfg)
    take(optimizer, pieces, 0)
    before = {
        key: value.view(torch.int32).clone()
        for key, (_, _, value) in held(optimizer).items()
        if value.is_floating_point()
    }
    grads = values(2)
    for key, param in optimizer.params.items():
        param.grad = cut(grads[key], pieces[key]).view_as(param)
        if key == name and mesh.rank == rank:
            param.grad.view(-1)[0] = bad
    assert optimizer.step(1)["skipped"].item() == 1.0
    after = held(optimizer)
    assert after.pop("consecutive_skips")[2].item() == 1
    return all(torch.equal(value.view(torch.int32), before[key]) for key, (_, _, value) in after.items())


@pytest.mark.parametrize(
    ("mesh", "rank", "name"),
    [("dp_shard", 1, "embed.weight"), ("dp_replicate", 1, "layers.0.q_proj.weight"), ("pp", 1, "layers.1.bias")],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(mesh, rank, name, kind):
    bad = math.inf if kind == "muon" else math.nan
    assert all(run_on(MESHES[mesh], with_a_bad_gradient, CONFIGS[kind], rank, name, bad))


def in_phases(mesh: Mesh) -> Any:
    """Globs of which one pipeline stage matches none, state that waits, a parameter that comes back."""
    optimizer, pieces = on_mesh(mesh, CONFIGS["muon"], trainable=("layers.0.*",), lr_scales={"layers.1.*": 0.5})
    take(optimizer, pieces, 0)
    params = {name: torch.nn.Parameter(value.detach().clone()) for name, value in optimizer.params.items()}
    optimizer.set_phase(params, ROLES, trainable=("*", "!embed.weight"), lr_scales={"layers.1.*": 0.5})
    take(optimizer, pieces, 1)
    return held(optimizer)


@pytest.mark.parametrize("mesh", ["pp", "hybrid"])
def test_phases_equal_one_process(mesh):
    expected = assembled([in_phases(Mesh.single())])
    whole = assembled(run_on(MESHES[mesh], in_phases))
    assert whole.keys() == expected.keys()
    for key, value in whole.items():
        assert_close(value, expected[key], tol=1e-5, what=key)


def resumed(mesh: Mesh, saved: dict[str, Tensor]) -> Any:
    optimizer, pieces = on_mesh(mesh, CONFIGS["muon"])
    own = {}
    for key, (piece, _) in optimizer.state_pieces().items():
        own[key] = cut(saved[key], piece).to(optimizer.state_dict()[key].dtype)
        own[key] = own[key] if piece.shape else own[key].view(())
    optimizer.load_state_dict(own)
    with torch.no_grad():
        for name, param in optimizer.params.items():
            param.copy_(cut(saved["param." + name], pieces[name]).view_as(param))
    for step in range(STEPS, STEPS + 2):
        take(optimizer, pieces, step)
    return held(optimizer)


def test_state_of_one_mesh_goes_on_on_another():
    _, first = zip(*run_on(MESHES["ep"], three_steps, CONFIGS["muon"]), strict=True)
    saved = assembled(list(first))
    expected = assembled([resumed(Mesh.single(), saved)])
    for key, value in assembled(run_on(MESHES["hybrid"], resumed, saved)).items():
        assert_close(value, expected[key], tol=1e-5, what=key)


def test_a_piece_that_the_mesh_does_not_give_is_refused():
    params = {"w": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"w: .* holds elements 0:4 of shape \(4, 2\), but as number 0 of 1 .* 0:8"):
        Optimizer(AdamWConfig(), params, {"w": ParamRole("matrix")}, 1, pieces={"w": Piece((4, 2), 0, 4)})
    with pytest.raises(ValueError, match=r"w has 4 elements, but its piece 0:8"):
        Optimizer(AdamWConfig(), params, {"w": ParamRole("matrix")}, 1, pieces={"w": Piece.whole((4, 2))})


STACKS = {"cut": (1, 6, 10), "half": (3, 4, 6), "whole": (2, 4, 6)}


def whole_slices() -> dict[str, MuonSlice]:
    found = {}
    for seed, (name, shape) in enumerate(STACKS.items()):
        generator = torch.Generator().manual_seed(seed)
        param, grad, momentum = (torch.randn(shape, generator=generator) for _ in range(3))
        copy = param.half() if name == "half" else None
        found[name] = MuonSlice(param, grad, momentum, 0.1, 0.2, copy)
    return found


def on_flat_pieces(mesh: Mesh, impl: str, away: bool) -> dict[str, Tensor]:
    """Two steps of Muon on cut stacks, of which one has copies in fp16; what this process holds afterwards."""
    place = Place.on(mesh)
    stacks = [Stack(name, *shape, Division(shape, False, True)) for name, shape in STACKS.items()]
    shared = SharedMuon(mesh, place, stacks, torch.float32)
    host = HostState(mesh.device)
    rule = MuonRule(0.9, True, 3, torch.float32, torch.tensor(0.5), torch.tensor(True))
    flats = {}
    for name, whole in whole_slices().items():
        piece = Piece.whole(STACKS[name]).part(place.fold, place.folds)
        tensors = {key: cut(getattr(whole, key), piece) for key in ("param", "grad", "momentum")}
        copy = None if whole.copy is None else cut(whole.copy, piece)
        flats[name] = replace(whole, **tensors, copy=copy, first=piece.start)
    forced: Any = impl
    for _ in range(2):
        shared.start(flats, rule, residence=host if away else in_place, impl=forced)()
    assert shared.rounds
    found = {name: item.param for name, item in flats.items()} | {f"{n}.m": item.momentum for n, item in flats.items()}
    return found | {f"{name}.copy": item.copy for name, item in flats.items() if item.copy is not None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize(("impl", "away"), [("torch", False), ("torch", True), ("triton", False)])
def test_pieces_of_matrices_move_as_whole_ones(impl, away):
    expected = whole_slices()
    rule = MuonRule(0.9, True, 3, torch.float32, torch.tensor(0.5), torch.tensor(True))
    for _ in range(2):
        muon_update(list(expected.values()), rule, impl="torch")
    results = run_on(MESHES["dp_shard"], on_flat_pieces, impl, away)
    for name, item in expected.items():
        whole = {key: torch.cat([result[key] for result in results]) for key in results[0] if key.startswith(name)}
        assert_close(whole[name], item.param.reshape(-1), tol=1e-5, what=name)
        assert_close(whole[f"{name}.m"], item.momentum.reshape(-1), tol=1e-6, what=name)
        if item.copy is not None:
            assert_same_bits({"copy": whole[f"{name}.copy"]}, {"copy": whole[name].half()})
