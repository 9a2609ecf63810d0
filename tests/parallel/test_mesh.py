"""The mesh: which process is where, and what its groups do."""

from __future__ import annotations

import gc
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pithwood.parallel.agreement import StopAgreement
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.links import Links
from pithwood.parallel.mesh import Group, Mesh, check_world, coordinates, join_mesh, places, stop_mesh, topology
from pithwood.parallel.pieces import Piece
from tests.processes import run_on

FITTING = {
    "num_layers": 8,
    "num_experts": 8,
    "num_kv_heads": 4,
    "samples_per_step": 16,
    "samples_per_micro_batch": 4,
    "seq_len": 64,
    "tied": False,
}


@pytest.mark.quick
@pytest.mark.parametrize(("pp", "r", "s", "c"), list(product((1, 2), (1, 3), (1, 2), (1, 2))))
def test_every_rank_has_one_place_and_the_groups_of_a_kind_partition_the_world(pp, r, s, c):
    for ep in (e for e in (1, 2, 4) if (s * c) % e == 0):
        cfg = MeshConfig(pp, r, s, c, ep)
        assert len({coordinates(cfg, rank) for rank in range(cfg.size)}) == cfg.size
        for name in places(cfg, 0):
            groups = {places(cfg, rank)[name] for rank in range(cfg.size)}
            assert sorted(rank for group in groups for rank in group) == list(range(cfg.size)), name
            assert all(rank in places(cfg, rank)[name] for rank in range(cfg.size))


@pytest.mark.quick
def test_a_ring_says_at_the_start_what_becomes_of_other_attention():
    group = Group((0, 1), 0)
    said = [
        topology(Mesh(MeshConfig(cp=2, context=how), 0, torch.device("cpu"), *[group] * 9), ["a", "a"])
        for how in ("ring", "auto")
    ]
    assert said[0] == [*said[1], "  mesh.context=ring: full attention by ring, any other as mesh.context=gather"]


@pytest.mark.quick
def test_experts_fold_over_data_and_context_ranks():
    cfg = MeshConfig(dp_shard=2, cp=2, ep=2)
    assert [places(cfg, rank)["ep"] for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [places(cfg, rank)["expert_shard"] for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ep": 2}, "mesh.ep=2 must divide mesh.dp_shard x mesh.cp = 1"),
        ({"pp": 0}, "mesh.pp=0 must be at least 1"),
        ({"pp": 2, "layers_per_stage": (1,)}, "layers_per_stage has 1 entries"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**settings)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"dp_shard": 8}, {}, "set samples_per_micro_batch to a multiple of 8"),
        ({"pp": 16}, {}, "makes 16 stages, but the model has 8 layers"),
        ({"dp_shard": 16, "ep": 16}, {"samples_per_micro_batch": 16}, "mesh.ep=16 must divide model.moe.num_experts=8"),
        ({"cp": 8, "context": "heads"}, {}, "set mesh.context=auto"),
        ({"pp": 2}, {"tied": True}, "model.tie_embeddings"),
        ({"pp": 4, "schedule": "dualpipe_v"}, {}, "needs at least 8 micro-batches"),
        ({"cp": 3}, {}, "mesh.cp=3 must divide the 256 tokens"),
        ({"cp": 2, "context": "ring"}, {"seq_len": 1, "samples_per_micro_batch": 2}, "even number of tokens"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_the_remedy(settings, changes, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**settings).check(**{**FITTING, **changes})


@pytest.mark.quick
def test_stages_take_all_layers_in_order():
    assert MeshConfig(pp=2).layers_of_stages(5) == [range(3), range(3, 5)]
    cfg = MeshConfig(pp=2, schedule="zero_bubble_v")
    assert [cfg.stages_of_process(rank) for rank in (0, 1)] == [[0, 3], [1, 2]]
    assert [list(layers) for layers in cfg.layers_of_stages(6)] == [[0, 1], [2, 3], [4], [5]]
    assert MeshConfig(pp=2, schedule="interleaved").stages_of_process(1) == [1, 3]
    assert MeshConfig(pp=2, layers_per_stage=(1, 3)).layers_of_stages(4) == [range(1), range(1, 4)]


@pytest.mark.quick
def test_a_number_of_processes_that_is_not_the_meshs_is_refused():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        check_world(MeshConfig(cp=2), 3)


@pytest.mark.quick
def test_pieces_are_ranges():
    whole = Piece.whole((4, 6))
    assert whole.part(1, 3) == Piece((4, 6), 8, 16)
    assert whole.part(1, 2).part(0, 2) == Piece((4, 6), 12, 18)
    assert whole.part(0, 2).overlap(Piece((4, 6), 8, 16)) == (8, 12)
    assert whole.part(0, 2).overlap(whole.part(1, 2)) is None
    with pytest.raises(ValueError, match="equal parts"):
        whole.part(0, 5)


def exchanged(mesh: Mesh) -> dict[str, list[float]]:
    rank = float(mesh.rank)
    added = torch.tensor([rank, 1.0])
    mesh.world.all_reduce(added)
    whole = torch.empty(mesh.shard.size * 2)
    mesh.shard.all_gather(whole, torch.tensor([rank, rank + 0.5]))
    part = torch.empty(1)
    mesh.shard.reduce_scatter(part, torch.arange(float(mesh.shard.size)) + rank)
    sent = torch.full((mesh.ep.size, 1), rank)
    got = torch.empty_like(sent)
    mesh.ep.all_to_all(got, sent, None, None)
    late = torch.tensor([rank])
    work = mesh.replicate.all_reduce(late, wait=False)
    if work is not None:
        work.wait()
    several = [torch.tensor([rank]), torch.full((2, 2), 1.0)]
    work = mesh.world.all_reduce_several(several, wait=False)
    work.wait()
    mesh.replicate.all_reduce_several(several)
    return {
        "added": added.tolist(),
        "whole": whole.tolist(),
        "part": part.tolist(),
        "got": got.flatten().tolist(),
        "late": late.tolist(),
        "several": [each.flatten().tolist() for each in several],
    }


def test_groups_exchange_what_they_say():
    results = run_on(MeshConfig(dp_replicate=2, dp_shard=2, ep=2), exchanged)
    for rank, result in enumerate(results):
        first = rank // 2 * 2
        assert result["added"] == [6.0, 4.0]
        assert result["whole"] == [first, first + 0.5, first + 1, first + 1.5]
        assert result["part"] == [2 * (rank % 2) + 2 * first + 1]
        assert result["got"] == [first, first + 1]
        assert result["late"] == [rank % 2 * 2 + 2]
        assert result["several"] == [[12.0], [8.0] * 4]


def stopped(mesh: Mesh, store: str) -> dict[str, int | str]:
    """How many threads gloo has before, in and after a mesh, and what its groups say then."""
    stop_mesh(mesh)
    gc.collect()
    found: dict[str, int | str] = {"before": gloo_threads()}  # of other tests' meshes, whose groups are still held
    mesh = join_mesh(mesh.cfg, mesh.device, mesh.rank, mesh.cfg.size, dist.FileStore(store, mesh.cfg.size))
    links, agreement = Links(mesh, ring=False), StopAgreement(mesh)
    with agreement:
        mesh.shard.all_reduce(torch.ones(1))
        agreement.after_step(0)
    found["within"] = gloo_threads()
    stop_mesh(mesh)
    found["after"] = gloo_threads()
    sends = lambda: links.send(1 - mesh.pp.rank, [torch.ones(1)])  # noqa: E731
    for name, use in (("shard", lambda: mesh.shard.all_reduce(torch.ones(1))), ("links", sends)):
        with pytest.raises(RuntimeError) as told:
            use()
        found[name] = str(told.value)
    mesh.cp.all_reduce(torch.ones(1))  # of one process, as before
    return found


def late(mesh: Mesh, store: str) -> tuple[float, str]:
    """How long this process waited for the first one, and what an exchange said of one that came as late."""
    stop_mesh(mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pithwood.parallel.mesh.STARTUP_SECONDS", 8)
        mesh = join_mesh(mesh.cfg, mesh.device, mesh.rank, mesh.cfg.size, dist.FileStore(store, mesh.cfg.size))
    mesh.world.barrier()
    began = time.monotonic()
    if mesh.is_first:
        time.sleep(11)
    mesh.world.await_first()
    waited = time.monotonic() - began
    mesh.world.barrier()  # of all, as before
    try:
        if mesh.is_first:
            time.sleep(11)
        mesh.world.barrier()
    except RuntimeError as error:
        return waited, str(error)
    finally:
        stop_mesh(mesh)
    return waited, ""


@pytest.mark.slow
def test_the_first_process_is_awaited_for_longer_than_an_exchange_takes(tmp_path):
    _, *others = run_on(MeshConfig(dp_shard=3), late, str(tmp_path / "again"))
    for waited, told in others:
        assert waited > 9
        assert "imed out" in told or "losed" in told  # by the one that gave up first


def gloo_threads() -> int:
    return sum("gloo" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are not told here")
def test_a_mesh_that_is_stopped_leaves_no_thread_and_its_groups_refuse(tmp_path):
    # a thread of gloo that is at work when the interpreter ends can abort the process
    for found in run_on(MeshConfig(pp=2, dp_shard=2), stopped, str(tmp_path / "again")):
        assert found["within"] >= found["before"] + 8
        assert found["after"] <= found["before"]
        assert "the mesh was stopped" in found["shard"]
        assert "the mesh was stopped" in found["links"]


def failing(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise RuntimeError("this one was meant to fail")


def test_a_process_that_fails_is_named_and_the_next_job_runs():
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*meant to fail"):
        run_on(MeshConfig(dp_shard=2), failing)
    assert len(run_on(MeshConfig(dp_shard=2), exchanged)) == 2


def exchanged_at_once(mesh: Mesh) -> dict[str, list]:
    """What gathering, scattering and adding up several tensors at once gives, and one exchange of rows."""
    make = lambda *values, dtype=torch.float32: torch.tensor(values, dtype=dtype, device=mesh.device)  # noqa: E731
    first, group = 10.0 * mesh.rank, mesh.shard
    parts = [make(first, first + 1), make(first + 2, dtype=torch.bfloat16)]
    wholes = [part.new_empty(group.size * len(part)) for part in parts]
    work = group.all_gather_several(wholes, parts)
    grads = [make(1, 2, 3, 4), make(first, first + 1)]
    sums = [grad.new_empty(len(grad) // group.size) for grad in grads]
    scattered = group.reduce_scatter_several(sums, grads)
    totals = [make(first), make(1, first)]
    added = group.all_reduce_several(totals, wait=False)
    rows = make(first, first + 1)
    got = torch.empty_like(rows)
    sent = group.all_to_all(got, rows, None, None, wait=False)
    for one in (work, scattered, added, sent):
        if one is not None:
            one.wait()
    found = {"gathered": wholes, "scattered": sums, "added": totals, "rows": [got]}
    return {name: [tensor.tolist() for tensor in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.multi_gpu])])
def test_several_tensors_travel_at_once(device):
    first, second = run_on(MeshConfig(dp_shard=2), exchanged_at_once, device=device)
    assert first == {
        "gathered": [[0, 1, 10, 11], [2, 12]],
        "scattered": [[2, 4], [10]],
        "added": [[10], [2, 10]],
        "rows": [[0, 10]],
    }
    assert second == {
        "gathered": [[0, 1, 10, 11], [2, 12]],
        "scattered": [[6, 8], [12]],
        "added": [[10], [2, 10]],
        "rows": [[1, 11]],
    }
    alone = exchanged_at_once(Mesh.single())
    assert alone["gathered"] == [[0, 1], [2]]
    assert alone["rows"] == [[0, 1]]
