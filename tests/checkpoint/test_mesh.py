"""What one mesh saves any other loads, and all processes of a mesh succeed or fail together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pithwood.checkpoint import together
from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints, load_checkpoint, verify_checkpoint
from pithwood.checkpoint.ranges import Chunk, Held, Listing, StoredTensor, merge_listings
from pithwood.checkpoint.save import check_can_save, save_checkpoint
from pithwood.checkpoint.storage import MANIFEST
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece
from tests import processes
from tests.checkpoint.synthetic import LAYER, NUM_LAYERS, as_format_1, held_on, rewrite_manifest, whole_tensor, wrong

MESHES = {
    "one": MeshConfig(),
    "shard": MeshConfig(dp_shard=2),
    "replicate": MeshConfig(dp_replicate=2),
    "cp": MeshConfig(cp=2),
    "ep": MeshConfig(dp_shard=2, ep=2),
    "pp": MeshConfig(pp=2),
    "v": MeshConfig(pp=2, schedule="zero_bubble_v", layers_per_stage=(1, 1, 1, 1)),
    "shard4": MeshConfig(dp_shard=4),
    "hybrid": MeshConfig(dp_replicate=2, dp_shard=2, ep=2),
    "cp_ep": MeshConfig(dp_shard=2, cp=2, ep=2),
    "pp_ep": MeshConfig(pp=2, dp_shard=2, ep=2),
}
PAIRS = [
    ("one", "shard"),
    ("shard", "one"),
    ("shard", "cp"),
    ("shard", "pp_ep"),
    ("replicate", "ep"),
    ("cp", "replicate"),
    ("ep", "shard"),
    ("ep", "v"),
    ("pp", "v"),
    ("v", "pp"),
    ("shard4", "ep"),
    ("hybrid", "shard4"),
    ("cp_ep", "pp"),
    ("cp_ep", "one"),
    ("pp_ep", "cp_ep"),
    ("pp_ep", "one"),
]


def run_on(cfg: MeshConfig, job: Callable[..., Any], *args: Any) -> list[Any]:
    """As `processes.run_on`; a mesh of one process is this one."""
    return [job(Mesh.single(), *args)] if cfg.size == 1 else processes.run_on(cfg, job, *args)


def saved(mesh: Mesh, run_dir: Path, step: int = 3) -> str:
    tensors = {**held_on(mesh, filled=True), "optim.step": torch.tensor(7)}
    return str(save_checkpoint(run_dir, step, tensors, {"tokens": 100 + mesh.rank}, mesh=mesh))


def loaded(mesh: Mesh, run_dir: Path) -> tuple[list[str], int, int]:
    path = latest_checkpoint(run_dir, mesh)
    assert path is not None
    held = held_on(mesh, filled=False)
    count = torch.tensor(0)
    _, state = load_checkpoint(path, {**held, "optim.step": count}, mesh=mesh, verify=False)
    return wrong(held), int(count), state["tokens"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the run folder with what a mesh saved, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            paths = run_on(MESHES[name], saved, made[name])
            assert set(paths) == {str(made[name] / "checkpoints" / "step-00000003")}
            assert [path.name for path in (made[name] / "checkpoints").iterdir()] == ["step-00000003"]
        return made[name]

    return folder


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_what_one_mesh_saves_another_loads_bit_for_bit(written, before, after):
    assert run_on(MESHES[after], loaded, written(before)) == [([], 7, 100)] * MESHES[after].size


def test_every_process_writes_its_share_and_replicas_write_nothing(written):
    for name, files in (("shard", 2), ("replicate", 1), ("hybrid", 2), ("pp_ep", 4), ("cp_ep", 4)):
        path = written(name) / "checkpoints" / "step-00000003"
        manifest = verify_checkpoint(path)
        assert manifest.files == [f"tensors-{rank:05d}.safetensors" for rank in range(files)], name
        assert len(manifest.tensors) == NUM_LAYERS * len(LAYER) + 1
        sizes = [(path / file).stat().st_size for file in manifest.files]
        assert max(sizes) < 2 * min(sizes), name


def test_a_checkpoint_of_a_mesh_is_read_whole_without_one(written):
    tensors, _ = load_checkpoint(written("cp_ep") / "checkpoints" / "step-00000003")
    for layer in range(NUM_LAYERS):
        for kind in LAYER:
            assert tensors[f"{layer}.{kind}"].equal(whole_tensor(f"{layer}.{kind}"))


def test_only_the_files_that_hold_a_piece_are_read(written, tmp_path):
    path = shutil.copytree(written("shard4") / "checkpoints" / "step-00000003", tmp_path / "copy")
    for rank in (0, 2, 3):
        (path / f"tensors-{rank:05d}.safetensors").write_bytes(b"damaged")
    piece = Piece((6, 8), 14, 23)
    held = Held(torch.zeros(3, 3), piece)
    load_checkpoint(path, {"0.proj": held}, partial=True, verify=False)
    assert held.tensor.view(-1).equal(whole_tensor("0.proj").view(-1)[14:23])
    with pytest.raises(ValueError, match="tensors-00002"):
        load_checkpoint(path, {"0.proj": Held(torch.zeros(12), Piece((6, 8), 20, 32))}, partial=True, verify=False)


def test_pieces_are_read_into_new_flat_tensors(written):
    path = written("shard") / "checkpoints" / "step-00000003"
    piece = Piece((6, 8), 10, 30)
    read, _ = load_checkpoint(path, names=["0.proj", "0.norm"], pieces={"0.proj": piece})
    assert read["0.proj"].equal(whole_tensor("0.proj").view(-1)[10:30])
    assert read["0.norm"].equal(whole_tensor("0.norm"))
    with pytest.raises(ValueError, match=r"has 0.proj as torch.float32 \[6, 8\], the run needs .* \[8, 6\]"):
        load_checkpoint(path, pieces={"0.proj": Piece((8, 6), 10, 30)})


def failing_save(mesh: Mesh, run_dir: Path, how: str) -> str:
    tensors: dict[str, Any] = dict(held_on(mesh, filled=True))
    last = mesh.rank == mesh.world.size - 1
    if how == "bad input" and last:
        tensors["odd"] = 1.0
    if how == "nobody writes":
        tensors["0.proj"] = Held(tensors["0.proj"].tensor, tensors["0.proj"].piece, writes=mesh.rank == 0)
    if how == "two write" and last:
        tensors["0.norm"] = Held(tensors["0.norm"].tensor, tensors["0.norm"].piece)
    if how == "a shape differs" and last:
        tensors["0.norm"] = Held(torch.zeros(4), Piece.whole((4,)), writes=False)
    if how == "a disk is full" and last:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        tensors["large"] = Held(torch.zeros(100_000), Piece.whole((100_000,)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save_checkpoint(run_dir, 5, tensors, {}, mesh=mesh)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if how == "a disk is full" and last:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "saved"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bad input", "ValueError: rank 1: tensor 'odd' is a float"),
        ("nobody writes", "ValueError: tensor '0.proj': elements 24:48 are missing"),
        ("two write", "ValueError: tensor '0.norm': elements 0:5 are there twice"),
        ("a shape differs", r"ValueError: tensor '0.norm' is torch.float32 [5] on rank 0, but torch.float32 [4] on"),
        ("a disk is full", "OSError: [Errno 27] checkpoint of step 5 was not saved"),
    ],
)
def test_what_fails_on_one_process_fails_on_all_and_leaves_the_earlier_one(tmp_path, how, words):
    run_on(MESHES["shard"], saved, tmp_path)
    first, last = run_on(MESHES["shard"], failing_save, tmp_path, how)
    assert words in first
    assert last.removeprefix("ValueError: ") in first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


def test_a_full_disk_names_the_process_and_the_remedy(tmp_path):
    told = run_on(MESHES["shard"], failing_save, tmp_path, "a disk is full")
    assert told[0] == told[1]
    assert "rank 1: File too large" in told[0]
    assert "earlier checkpoints are intact" in told[0]


def unseen(mesh: Mesh, run_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "VISIBLE_SECONDS", 0.5)
        try:
            save_checkpoint(run_dir / str(mesh.rank), 5, held_on(mesh, filled=True), {}, mesh=mesh)
        except ValueError as error:
            return str(error)
    return "saved"


def test_a_folder_that_processes_do_not_share_is_refused(tmp_path):
    told = run_on(MESHES["shard"], unseen, tmp_path)
    assert all("does not see" in line and "--runs-dir" in line for line in told)
    assert not list((tmp_path / "0" / "checkpoints").iterdir())


def latest_of(mesh: Mesh, run_dir: Path) -> str:
    try:
        path = latest_checkpoint(run_dir, mesh)
    except ValueError as error:
        return str(error)
    return path.name if path else "none"


def test_all_processes_skip_a_damaged_checkpoint_that_one_of_them_finds(tmp_path):
    assert run_on(MESHES["shard"], latest_of, tmp_path) == ["none", "none"]
    for step in (3, 4):
        run_on(MESHES["shard"], saved, tmp_path, step)
    # the second process looks at the second file
    file = tmp_path / "checkpoints" / "step-00000004" / "tensors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_on(MESHES["shard"], latest_of, tmp_path) == ["step-00000003"] * 2


def not_fitting(mesh: Mesh, path: Path) -> tuple[str, float]:
    held = held_on(mesh, filled=False)
    if mesh.rank == 1:
        held["4.proj"] = Held(torch.zeros(48), Piece.whole((6, 8)))
    try:
        load_checkpoint(path, {**held, "optim.step": torch.tensor(0)}, mesh=mesh)
    except ValueError as error:
        return str(error), float(sum(part.tensor.float().abs().sum() for part in held.values()))
    return "loaded", 0.0


def test_a_load_that_one_process_cannot_do_fills_nothing_anywhere(written):
    told = run_on(MESHES["pp"], not_fitting, written("one") / "checkpoints" / "step-00000003")
    assert all("has no tensor 4.proj" in line and filled == 0 for line, filled in told)


def left_out(mesh: Mesh, path: Path) -> str:
    held = {name: part for name, part in held_on(mesh, filled=False).items() if name != "3.proj"}
    try:
        load_checkpoint(path, {**held, "optim.step": torch.tensor(0)}, mesh=mesh)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_tensor_that_no_stage_asks_for_is_named(written):
    told = run_on(MESHES["pp"], left_out, written("one") / "checkpoints" / "step-00000003")
    assert all("also holds 3.proj" in line for line in told)


def no_room(mesh: Mesh, run_dir: Path) -> str:
    try:
        check_can_save(run_dir, 6e17, mesh)
    except ValueError as error:
        return str(error)
    return "fits"


def test_room_for_a_checkpoint_is_that_of_all_processes_together(tmp_path):
    told = run_on(MESHES["shard"], no_room, tmp_path)
    assert all("takes 1,200,000,000.00 GB" in line for line in told)


def test_retention_counts_the_meshs_checkpoints_once(tmp_path):
    for step in (10, 20, 30):
        run_on(MESHES["shard"], saved, tmp_path, step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30]


@pytest.mark.quick
def test_ranges_that_do_not_cover_a_tensor_once_are_told():
    def gap(shape: tuple[int, ...], *ranges: tuple[int, int]) -> str | None:
        return StoredTensor(torch.float32, shape, tuple(Chunk(a, b, 0, "k") for a, b in ranges)).gap()

    assert gap((2, 3), (0, 2), (2, 6)) is None
    assert gap((2, 3), (0, 2), (3, 6)) == "elements 2:3 are missing"
    assert gap((2, 3), (0, 4), (2, 6)) == "elements 2:4 are there twice"
    assert gap((2, 3), (0, 4)) == "elements 4:6 are missing"
    assert gap((2, 3), (0, 4), (4, 7)) == "elements 6:7 do not exist"
    assert gap((2, 3)) == "elements 0:6 are missing"
    assert gap((0, 3), (0, 0)) is None
    assert gap((0, 3)) == "it is missing"
    assert gap((), (0, 1)) is None


@pytest.mark.quick
def test_a_tensor_that_is_held_but_written_by_nobody_is_named():
    listing = Listing({"a": StoredTensor(torch.float32, (2,), ())}, {})
    with pytest.raises(ValueError, match=r"'a': elements 0:2 are missing; .* exactly one must write it"):
        merge_listings([Listing({}, {}), listing])


@pytest.mark.quick
def test_a_piece_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"3 elements cannot be the 4 elements 2:6 of \[2, 3\]"):
        Held(torch.zeros(3), Piece((2, 3), 2, 6))


@pytest.mark.parametrize("name", ["one", "shard"])
def test_the_first_format_is_still_read(written, tmp_path, name):
    path = shutil.copytree(written(name) / "checkpoints" / "step-00000003", tmp_path / "copy")
    as_format_1(path)
    assert verify_checkpoint(path).format_version == 1
    tensors, state = load_checkpoint(path)
    assert state["format_version"] == 1
    assert all(
        tensors[f"{layer}.{kind}"].equal(whole_tensor(f"{layer}.{kind}")) for layer in range(4) for kind in LAYER
    )


def test_a_box_of_the_first_format_that_is_no_range_is_refused(written, tmp_path):
    path = shutil.copytree(written("one") / "checkpoints" / "step-00000003", tmp_path / "copy")
    as_format_1(path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["0.proj"]["chunks"][0].update(offsets=[0, 4], shape=[6, 4])
    rewrite_manifest(path, manifest)
    with pytest.raises(ValueError, match=r"is not a range of the elements of \(6, 8\)"):
        load_checkpoint(path)
