"""Passes in pairs without a pipeline: what runs under which exchange, what is held, and that values stay."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.full import FullAttentionConfig
from pithwood.config import apply_overrides
from pithwood.estimate.spread import Spread
from pithwood.moe.layer import MoELayer
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Group, Mesh
from pithwood.recipes import load_recipe
from pithwood.run import Run
from pithwood.trainer import Trainer
from tests.parallel.spread import Documents, _pieces, assert_same, steps_on, tiny_run
from tests.processes import run_on

TWO = MeshConfig(dp_shard=2, ep=2, overlap="pairs")
SHARED = {"num_shared_experts": 1, "balance": "micro_batch", "balance_coef": 0.1}


def run_of(cfg: MeshConfig = TWO, moe: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Four micro-batches of two samples."""
    return tiny_run({"attention": FullAttentionConfig()}, moe, **{"samples_per_micro_batch": 2, "mesh": cfg, **changes})


def deep(run: Run) -> Run:
    """The same with eight layers, all of them with experts."""
    return replace(run, model=replace(run.model, num_layers=8, dense_layers=()))


def started(mesh: Mesh, run: Run) -> tuple[Trainer, list[Any]]:
    """A trainer, and what this process has of the first step's micro-batches."""
    trainer = Trainer(run, mesh.device, None, None if mesh.world.size == 1 else mesh)
    return trainer, trainer.local(Documents(run).step(0, trainer.share))


def direction() -> str:
    return "forward" if torch._C._current_graph_task_id() < 0 else "backward"


@dataclass(frozen=True)
class NotingGroup(Group):
    """A group that writes down when rows leave and land, and for which pass."""

    notes: list[tuple[str, str, int]] = field(default_factory=list)

    def all_to_all(self, out: Tensor, given: Tensor, out_sizes: Any, given_sizes: Any, wait: bool = True) -> Any:
        work = super().all_to_all(out, given, out_sizes, given_sizes, wait)
        if wait:
            return work
        note = direction(), len(self.notes)
        self.notes.append(("leave", *note))
        return NotingWork(work, self.notes, note)


@dataclass
class NotingWork:
    work: Any
    notes: list[tuple[str, str, int]]
    note: tuple[str, int]

    def wait(self) -> None:
        self.notes.append(("land", *self.note))
        self.work.wait()


def noted(mesh: Mesh, run: Run) -> list[tuple[str, str, int]]:
    """(what, in which pass, number of the exchange) in the order of the host: rows that leave or land, work of
    attention, experts and the last norm, and forward passes of shared experts."""
    trainer, here = started(mesh, run)
    assert trainer.part is not None
    exchange = trainer.part.exchange
    assert exchange is not None
    group = NotingGroup(exchange.group.ranks, exchange.group.rank, exchange.group.handle)
    exchange.group = group

    def note(module: Any, args: Any, out: Any) -> None:
        group.notes.append(("work", direction(), -1))
        value = out if isinstance(out, Tensor) else out.y_TD
        value.register_hook(lambda grad: group.notes.append(("work", direction(), -1)))

    def share(*_: Any) -> None:
        group.notes.append(("share", direction(), -1))

    for block in trainer.model.blocks:
        block.self_attn.register_forward_hook(note)
        if isinstance(block.mlp, MoELayer):
            block.mlp.experts.register_forward_hook(note)
            if block.mlp.shared_experts is not None:
                block.mlp.shared_experts.register_forward_hook(share)
    trainer.model.model["norm"].register_forward_hook(note)
    trainer.gradients(0, here)
    return group.notes


def hidden(notes: list[tuple[str, str, int]]) -> dict[str, list[bool]]:
    """By direction, for each exchange in turn: whether the other pass works while it is on its way."""
    found: dict[str, list[bool]] = {"forward": [], "backward": []}
    for at, (what, way, number) in enumerate(notes):
        if what == "leave":
            end = notes.index(("land", way, number))
            found[way].append(any(kind == "work" and other != way for kind, other, _ in notes[at:end]))
    return found


@pytest.mark.parametrize("moe", [{}, SHARED], ids=["plain", "shared"])
def test_every_exchange_of_a_pair_runs_under_the_other_pass(moe: dict[str, Any]):
    # three layers with experts and four micro-batches: three flights to the experts and one back, of gradients two
    # and one
    alone = [False] * 3 * 4, [False] * 3 * 3
    for notes in run_on(TWO, noted, run_of(moe=moe)):
        found = hidden(notes)
        assert found["forward"] == alone[0] + [True] * 3 * 3 * 4
        assert found["backward"] == [True] * 3 * 3 * 3 + alone[1]
    plain = replace(TWO, overlap="none")
    for notes in run_on(plain, noted, run_of(plain, moe)):
        assert not any(hidden(notes)["forward"] + hidden(notes)["backward"])


def test_shared_experts_run_under_the_way_back():
    for notes in run_on(TWO, noted, run_of(moe=SHARED)):
        ways = [number for what, way, number in notes if (what, way) == ("leave", "forward")]
        for number in ways[3::4]:
            back = notes[notes.index(("leave", "forward", number)) : notes.index(("land", "forward", number))]
            assert ("share", "forward", -1) in back


class _Kept:
    """What stands for a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def most_held(mesh: Mesh, run: Run) -> int:
    """Most bytes that graphs hold at a time in a step, without parameters."""
    trainer, here = started(mesh, run)
    own = {param.untyped_storage().data_ptr() for param in trainer.model.parameters()}
    held: dict[int, list[int]] = {}
    most = 0

    def drop(address: int) -> None:
        held[address][0] -= 1
        if not held[address][0]:
            del held[address]

    def pack(tensor: Tensor) -> Any:
        nonlocal most
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held.setdefault(storage.data_ptr(), [0, storage.nbytes()])[0] += 1
            weakref.finalize(kept, drop, storage.data_ptr())
            most = max(most, sum(size for _, size in held.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        trainer.gradients(0, here)
    assert not held
    return most


def test_a_pair_holds_at_most_two_layers_more_than_one_micro_batch():
    run = deep(run_of())
    share = Spread.of(run).in_flight
    assert share == 1 + 2 / 8
    plain = replace(TWO, overlap="none")
    paired, one = (max(run_on(cfg, most_held, replace(run, mesh=cfg))) for cfg in (TWO, plain))
    assert 1 < paired / one < share


def repeated(mesh: Mesh, run: Run) -> dict[str, Any]:
    """Gradients of a step whose buffers were too small at first, and how large they became."""
    trainer, here = started(mesh, run)
    assert trainer.part is not None
    exchange = trainer.part.exchange
    assert exchange is not None
    exchange.rooms = [0.4, 0.4]
    trainer.gradients(0, here)
    return {"gradients": _pieces(trainer, gradients=True), "rooms": exchange.rooms}


def test_a_step_that_overflows_is_repeated_and_exact():
    cfg = replace(TWO, exchange="bounded")
    run = run_of(cfg, SHARED)
    results = run_on(cfg, repeated, run)
    assert_same(results, steps_on(Mesh.single(), replace(run, mesh=MeshConfig()), 0, None), "gradients")
    assert all(min(result["rooms"]) > 0.4 for result in results)


def gathered(mesh: Mesh, run: Run) -> tuple[int, int]:
    """(most blocks whose weights were there at a time in forward passes, blocks that are left after the step)."""
    trainer, here = started(mesh, run)
    assert trainer.part is not None
    units = [unit for key, unit in trainer.part.shards.units.items() if key.startswith("layers.")]
    seen = [0]

    def look(*_: Any) -> None:
        seen.append(sum(unit.gathered for unit in units))

    for block in trainer.model.blocks:
        block.self_attn.register_forward_hook(look)
    trainer.gradients(0, here)
    return max(seen), sum(unit.gathered for unit in units)


def test_weights_that_are_gathered_for_each_pass_are_those_of_two_blocks_a_pass():
    run = deep(run_of(replace(TWO, gather="forward")))
    assert run_on(run.mesh, gathered, run) == [(4, 0)] * 2
    plain = replace(run, mesh=replace(run.mesh, overlap="none"))
    assert run_on(plain.mesh, gathered, plain) == [(2, 0)] * 2


def validated(mesh: Mesh, run: Run) -> dict[str, float]:
    """Validation losses after a step's passes."""
    trainer, here = started(mesh, run)
    trainer.gradients(0, here)
    trainer.optimizer.zero_grad()
    return trainer._evaluate_together(Documents(run).step(1, trainer.share))


def test_validation_is_that_of_runs_without_pairs():
    run = run_of()
    plain = replace(TWO, overlap="none")
    paired, one = (run_on(cfg, validated, replace(run, mesh=cfg)) for cfg in (TWO, plain))
    for each, wanted in zip(paired, one, strict=True):
        assert each == pytest.approx(wanted, rel=1e-6)


ENOUGH = ("mesh.dp_shard=2", "mesh.ep=2", "mesh.overlap=pairs")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mesh.overlap=pairs",), "mesh.ep=1 has none; set mesh.overlap=none"),
        ((*ENOUGH, "mesh.pp=2"), "and mesh.pp=2; in one mesh.schedule=dualpipe_v runs passes in pairs"),
        ((*ENOUGH, "samples_per_micro_batch=8", "samples_per_step=8"), "needs at least 2 micro-batches per step"),
        ((*ENOUGH, "recompute=block"), "recompute='block' repeats them within"),
        ((*ENOUGH, 'recompute=["none", "block"]', "offload_activations=true"), "recompute to none or selective in all"),
        ((*ENOUGH, "model.moe.chunk_tokens=8"), "model.moe.chunk_tokens=8 exchanges them in parts"),
        ((*ENOUGH, "compile=true"), "compile=true runs in one process"),
    ],
)
def test_settings_under_which_nothing_could_be_hidden_are_refused(words: tuple[str, ...], message: str):
    run = load_recipe("debug")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        apply_overrides(run, words).validate()
    fine = (*ENOUGH, "recompute=selective", f"model.moe.chunk_tokens={run.seq_len * run.samples_per_micro_batch // 2}")
    apply_overrides(run, fine).validate()
