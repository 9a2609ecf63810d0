"""A run that is saved on one mesh goes on on another as if nothing had happened: the next loss, weights and state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.checkpoint.ranges import Held
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.run import Run
from pithwood.trainer import Trainer
from tests.numerics import rel_error
from tests.parallel.spread import Documents, Pieces, tiny_run
from tests.processes import run_on

SAVED_AFTER = 2
"""Steps."""

MESHES = {
    "one": MeshConfig(),
    "shard2": MeshConfig(dp_shard=2),
    "replicate2": MeshConfig(dp_replicate=2),
    "ep2": MeshConfig(dp_shard=2, ep=2),
    "cp2-ep2": MeshConfig(cp=2, ep=2),
    "pp2-uneven": MeshConfig(pp=2, layers_per_stage=(1, 3)),
    "interleaved": MeshConfig(pp=2, schedule="interleaved"),
    "zero-bubble": MeshConfig(pp=2, schedule="zero_bubble_v"),
    "dualpipe": MeshConfig(pp=2, schedule="dualpipe_v"),
    "pp4": MeshConfig(pp=4),
    "hybrid4-ep2": MeshConfig(dp_replicate=2, dp_shard=2, ep=2),
    "cp4-ep4": MeshConfig(cp=4, ep=4),
    "shard2-cp2-ep2": MeshConfig(dp_shard=2, cp=2, ep=2),
    "pp2-ep2": MeshConfig(pp=2, dp_shard=2, ep=2),
    "all8": MeshConfig(pp=2, dp_shard=2, cp=2, ep=4),
}

QUICK = [("one", "ep2"), ("ep2", "one"), ("replicate2", "pp2-uneven"), ("zero-bubble", "cp2-ep2")]
SLOW = [
    ("one", "all8"),
    ("all8", "one"),
    ("shard2", "interleaved"),
    ("interleaved", "dualpipe"),
    ("dualpipe", "replicate2"),
    ("cp2-ep2", "shard2"),
    ("hybrid4-ep2", "pp4"),
    ("pp4", "shard2-cp2-ep2"),
    ("shard2-cp2-ep2", "hybrid4-ep2"),
    ("pp2-ep2", "cp4-ep4"),
    ("cp4-ep4", "pp2-ep2"),
    ("pp2-uneven", "zero-bubble"),
]


def run_of(before: str, after: str, cfg: MeshConfig) -> Run:
    """Every second pair keeps averaged weights and balances by a selection bias."""
    averaged = ([*QUICK, *SLOW].index((before, after)) % 2) == 0
    moe = {"bias_update_rate": 0.01, "num_shared_experts": 1} if averaged else {}
    mixers = (MoBAConfig(block_size=8, top_k=2), FullAttentionConfig(key_conv=3)) * 2
    # dualpipe_v asks for four micro-batches, and four data ranks for as many samples in each
    samples = 4 if "hybrid4-ep2" in (before, after) else 2
    run = tiny_run({"attention": mixers}, moe, samples_per_micro_batch=samples, mesh=cfg)
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, ema_decay=0.9 if averaged else 0.0))


def train_on(mesh: Mesh, run: Run, folder: Path, until: int, save_after: int) -> tuple[list[float], Pieces]:
    """Train from the folder's checkpoint, or from the start, to a step; (losses of its steps, pieces of all that a
    checkpoint would hold then)."""
    trainer = Trainer(run, mesh.device, None, None if mesh.world.size == 1 else mesh)
    start = trainer.resume(folder, None)
    source, losses = Documents(run), []
    for step in range(start, until):
        values, _ = trainer.train_step(step, source.step(step, trainer.share))
        losses.append(float(values["loss"]))
        if step + 1 == save_after:
            trainer.save(folder)
    return losses, {name: _piece(value) for name, value in trainer.tensors().items()}


def _piece(value: Tensor | Held) -> tuple[int, Tensor]:
    start, tensor = (value.piece.start, value.tensor) if isinstance(value, Held) else (0, value)
    return start, tensor.detach().reshape(-1).clone()


def everywhere(cfg: MeshConfig, *args: Any) -> list[tuple[list[float], Pieces]]:
    """`train_on` in all processes of a mesh."""
    return [train_on(Mesh.single(), *args)] if cfg.size == 1 else run_on(cfg, train_on, *args)


def whole(parts: list[tuple[list[float], Pieces]]) -> dict[str, Tensor]:
    """The tensors that the processes hold pieces of, flat."""
    sizes: dict[str, int] = {}
    for _, pieces in parts:
        for name, (start, values) in pieces.items():
            sizes[name] = max(sizes.get(name, 0), start + len(values))
    found = {name: torch.full((size,), torch.nan, dtype=torch.float64) for name, size in sizes.items()}
    for _, pieces in parts:
        for name, (start, values) in pieces.items():
            found[name][start : start + len(values)] = values.double()
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="checkpoints-") as name:
        yield Path(name)


@pytest.mark.parametrize(("before", "after"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_the_step_after_a_change_of_mesh_is_that_of_an_unchanged_one(before, after, folder):
    first, second = MESHES[before], MESHES[after]
    unchanged = everywhere(first, run_of(before, after, first), folder, SAVED_AFTER + 1, SAVED_AFTER)
    changed = everywhere(second, run_of(before, after, second), folder, SAVED_AFTER + 1, 0)
    for losses, _ in unchanged:
        assert len(losses) == SAVED_AFTER + 1
        assert losses == unchanged[0][0], "processes of a mesh tell different losses"
    for losses, _ in changed:
        assert losses == [pytest.approx(unchanged[0][0][-1], rel=1e-6)]
    wanted, found = whole(unchanged), whole(changed)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert not value.isnan().any(), name
        error = rel_error(found[name], value) if value.norm() > 0 else float(found[name].norm())
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.quick
def test_the_pairs_cover_every_mesh_on_both_sides_of_a_checkpoint():
    assert len({*QUICK, *SLOW}) >= 10
    assert {before for before, _ in [*QUICK, *SLOW]} == set(MESHES) == {after for _, after in [*QUICK, *SLOW]}
