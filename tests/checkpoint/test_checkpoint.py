"""What is saved comes back bit for bit, and what is damaged, foreign or newer is refused by name."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pithwood.checkpoint.files import DTYPES
from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints, load_checkpoint, verify_checkpoint
from pithwood.checkpoint.rng import capture_rng, restore_rng
from pithwood.checkpoint.save import check_can_save, clean_leftovers, save_checkpoint
from pithwood.checkpoint.storage import SUMS
from tests.checkpoint.synthetic import as_format_1, rewrite_manifest


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert (
            actual[name]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        ), name


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "model.w": torch.randn(3, 5),
        "model.w_bf16": torch.randn(7).bfloat16(),
        "step": torch.tensor(12, dtype=torch.int64),
        "scale": torch.tensor(float("nan")),
        "nothing": torch.empty(0),
        "no_rows": torch.empty(0, 4, dtype=torch.bfloat16),
        "transposed": torch.randn(4, 6).t(),
        "strided": torch.randn(8, 8)[::2, 1::3],
        "special": torch.tensor([float("inf"), -0.0, float("-inf"), 1e-45]),
    }


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


def test_tensors_and_state_come_back_bitwise(tmp_path):
    tensors, state = some_tensors(), {"tokens": 2**53 + 1, "lr": 0.1 + 0.2, "nested": {"a": [1, None, True, "ü"]}}
    path = save_checkpoint(tmp_path, 1200, tensors, state)
    assert path == tmp_path / "checkpoints" / "step-00001200"
    loaded, back = load_checkpoint(path)
    assert_bitwise(loaded, tensors)
    assert back == {**state, "format_version": 2, "step": 1200, "torch_version": torch.__version__}


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_comes_back_bitwise(tmp_path, code):
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (6 * DTYPES[code].itemsize,), dtype=torch.uint8)
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": raw.view(DTYPES[code]).reshape(2, 3)}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 0, tensors, {}))
    assert_bitwise(loaded, tensors)


def test_every_tensor_on_disk_is_aligned_to_its_item_size(tmp_path):
    tensors = {code: torch.zeros(3, dtype=dtype) for code, dtype in sorted(DTYPES.items(), reverse=True)}
    file = save_checkpoint(tmp_path, 0, tensors, {}) / "tensors-00000.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    assert header.keys() == DTYPES.keys()
    assert {
        name: (8 + size + entry["data_offsets"][0]) % DTYPES[name].itemsize for name, entry in header.items()
    } == dict.fromkeys(DTYPES, 0)


def test_a_checkpoint_may_hold_no_tensors(tmp_path):
    tensors, state = load_checkpoint(save_checkpoint(tmp_path, 3, {}, {"a": 1}))
    assert tensors == {}
    assert state["a"] == 1


def test_two_names_of_one_tensor_are_both_saved(tmp_path):
    weight = torch.randn(4, 4)
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 0, {"embed": weight, "head": weight, "row": weight[1]}, {}))
    assert_bitwise(loaded, {"embed": weight, "head": weight, "row": weight[1]})


def test_loading_fills_the_given_tensors_in_place(tmp_path):
    tensors = some_tensors()
    path = save_checkpoint(tmp_path, 5, tensors, {})
    into = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    into["model.w"] = torch.nn.Parameter(into["model.w"])
    same = {name: tensor.data_ptr() for name, tensor in into.items()}
    loaded, _ = load_checkpoint(path, into)
    assert_bitwise({name: tensor.detach() for name, tensor in into.items()}, tensors)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == same


def test_some_tensors_can_be_read_alone(tmp_path):
    tensors = some_tensors()
    path = save_checkpoint(tmp_path, 5, tensors, {})
    loaded, _ = load_checkpoint(path, names=["step", "model.w"])
    assert_bitwise(loaded, {name: tensors[name] for name in ("step", "model.w")})
    into = {"model.w": torch.zeros(3, 5)}
    load_checkpoint(path, into, partial=True)
    assert_bitwise(into, {"model.w": tensors["model.w"]})


def test_what_does_not_fit_is_refused_before_anything_is_filled(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"a": torch.ones(2), "b": torch.ones(3)}, {})
    a = torch.zeros(2)
    with pytest.raises(ValueError, match=r"b as torch.float32 \[3\], the run needs torch.float32 \[4\]"):
        load_checkpoint(path, {"a": a, "b": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"the run needs torch\.bfloat16"):
        load_checkpoint(path, {"a": a, "b": torch.zeros(3, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="has no tensor c"):
        load_checkpoint(path, {"a": a, "b": torch.zeros(3), "c": a})
    with pytest.raises(ValueError, match="also holds b"):
        load_checkpoint(path, {"a": a})
    with pytest.raises(ValueError, match="has no tensor c"):
        load_checkpoint(path, names=["c"])
    assert a.equal(torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": -1}, "step=-1"),
        ({"keep": 0}, "keep=0"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"tensors": {"a": 1.0}}, "'a' is a float"),
        ({"tensors": {"__metadata__": torch.ones(1)}}, "cannot name a tensor"),
        ({"tensors": {"a": torch.ones(1, dtype=torch.complex64)}}, "complex64, which cannot be stored"),
        ({"tensors": {"a": torch.ones(2, device="meta")}}, "no plain data"),
        ({"tensors": {"a": torch.eye(2).to_sparse()}}, "no plain data"),
        ({"state": {"a": {1: 2}}}, r"state\['a'\] has the key 1"),
        ({"state": {"a": [0, torch.ones(1)]}}, r"state\['a'\]\[1\] is a Tensor"),
        ({"state": {"format_version": 1}}, "format_version"),
        ({"state": {"step": 3}}, "state says step 3"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, change, match):
    arguments = {"step": 1, "tensors": {}, "state": {}, **change}
    with pytest.raises(ValueError, match=match):
        save_checkpoint(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_rotation_keeps_the_newest_and_every_nth(tmp_path):
    for step in range(0, 130, 10):
        save_checkpoint(tmp_path, step, {"a": torch.tensor(step)}, {}, keep=2, keep_every=50)
    assert steps_of(tmp_path) == [0, 50, 100, 110, 120]
    save_checkpoint(tmp_path, 130, {}, {}, keep=1)
    assert steps_of(tmp_path) == [130]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000130"]


def test_rotation_never_removes_the_good_one_before_a_damaged_later_one(tmp_path, capsys):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {"a": torch.tensor(step)}, {}, keep=2)
    flip_byte(tmp_path / "checkpoints" / "step-00000020" / "state.json", 0)
    for step in (12, 14):
        path = save_checkpoint(tmp_path, step, {"a": torch.tensor(step)}, {}, keep=1)
        assert steps_of(tmp_path) == [step, 20]
        assert latest_checkpoint(tmp_path) == path
    assert "step-00000020 is damaged: state.json" in capsys.readouterr().err


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 10, {"a": torch.tensor(1)}, {"try": 1})
    path = save_checkpoint(tmp_path, 10, {"a": torch.tensor(2)}, {"try": 2})
    tensors, state = load_checkpoint(path)
    assert tensors["a"] == 2
    assert state["try"] == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_leftovers_of_dead_writers_are_cleaned(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = save_checkpoint(tmp_path, 10, {"a": torch.tensor(1)}, {})
    parent = path.parent
    shutil.copytree(path, parent / f".old-step-00000005-{dead.pid}")
    shutil.copytree(path, parent / f".old-step-00000010-{dead.pid}")
    gone = [f".tmp-step-00000020-{dead.pid}", f".trash-step-00000001-{os.getpid()}", f".old-step-00000010-{dead.pid}"]
    kept = [f".tmp-step-00000020-{os.getppid()}", ".tmp-mine", "notes", f".tmp-step-2-{dead.pid}"]
    for name in gone[:2] + kept:
        (parent / name).mkdir()
        (parent / name / "file").write_text("x")
    clean_leftovers(tmp_path)
    left = {p.name for p in parent.iterdir()}
    assert left == {"step-00000010", "step-00000005", *kept}
    # The one whose replacement never came has its name back, whole.
    verify_checkpoint(parent / "step-00000005")


def test_latest_of_nothing_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    assert clean_leftovers(tmp_path / "absent") == []


def flip_byte(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_any_altered_byte_is_detected_and_the_file_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_tensors(), {"tokens": 5})
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for at in {0, 8, size - 1, *(rng.randrange(size) for _ in range(12))}:
            flip_byte(file, at)
            with pytest.raises(ValueError, match="is damaged: ") as caught:
                verify_checkpoint(path)
            assert file.name in str(caught.value), (file.name, at)
            flip_byte(file, at)
    verify_checkpoint(path)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_files_are_named_at_load(tmp_path, verify):
    path = save_checkpoint(tmp_path, 1, {"a": torch.randn(100)}, {"tokens": 5})
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for part in (content[:-1], content[: len(content) // 2], b"", None):
            file.unlink() if part is None else file.write_bytes(part)
            with pytest.raises(ValueError, match="is damaged") as caught:
                load_checkpoint(path, verify=verify)
            assert file.name in str(caught.value)
            file.write_bytes(content)
    load_checkpoint(path, verify=verify)


def test_a_damaged_checkpoint_is_skipped_with_a_report(tmp_path, capsys):
    good = save_checkpoint(tmp_path, 1, {"a": torch.zeros(9)}, {})
    bad = save_checkpoint(tmp_path, 2, {"a": torch.zeros(9)}, {})
    assert latest_checkpoint(tmp_path) == bad
    assert capsys.readouterr().err == ""
    flip_byte(bad / "tensors-00000.safetensors", -1)
    assert latest_checkpoint(tmp_path) == good
    report = capsys.readouterr().err
    assert str(bad) in report
    assert "tensors-00000.safetensors: content does not match" in report
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert "step-00000003 is not a Pithwood checkpoint" in capsys.readouterr().err
    flip_byte(good / "manifest.json", 5)
    with pytest.raises(ValueError, match=r"all 3 checkpoints .* are damaged"):
        latest_checkpoint(tmp_path)


def test_a_newer_format_is_refused_and_never_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {})
    path = save_checkpoint(tmp_path, 2, {}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3, "tensors": "elsewhere"}))
    sums = [line for line in (path / SUMS).read_text().splitlines() if "manifest" not in line]
    (path / SUMS).write_text("\n".join(sums) + "\n")
    for read in (verify_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match=r"format 3, this version of Pithwood reads up to 2; upgrade"):
            read(path)
    with pytest.raises(ValueError, match="upgrade"):
        latest_checkpoint(tmp_path)


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint folder"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a Pithwood checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x/tensors-00000.safetensors", "state.json"])
def test_a_manifest_cannot_point_outside_its_tensor_files(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {})
    as_format_1(path)
    rewrite_manifest(path, json.loads((path / "manifest.json").read_text().replace("tensors-00000.safetensors", name)))
    with pytest.raises(ValueError, match="is no tensor file"):
        load_checkpoint(path)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_hashes_can_be_checked_without_us(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_tensors(), {})
    subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=path, check=True, capture_output=True)


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(1000)}, {"tokens": 1})
    script = (
        "import sys, pathlib, torch\n"
        "from pithwood.checkpoint.save import save_checkpoint\n"
        "save_checkpoint(pathlib.Path(sys.argv[1]), 2, {'a': torch.zeros(100_000)}, {})\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: limit_file_size(100_000),
    )
    assert failed.returncode == 1
    assert "checkpoint of step 2 was not saved" in failed.stderr.splitlines()[-1]
    assert "raise the limit on file sizes" in failed.stderr.splitlines()[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    tensors, state = load_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    assert tensors["a"].equal(torch.zeros(1000))
    assert state["tokens"] == 1


@pytest.mark.quick
def test_a_checkpoint_without_room_is_refused_with_both_sizes_and_leaves_nothing_behind(tmp_path):
    check_can_save(tmp_path, 1000)
    with pytest.raises(ValueError, match=r"takes 1,000,000,000\.00 GB, but the disk of .* has [\d,.]+ [kMG]B free"):
        check_can_save(tmp_path, 1e18)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_random_state_comes_back_through_json():
    torch.manual_seed(3)
    random.seed(4)
    random.gauss(0, 1)
    saved = json.loads(json.dumps(capture_rng()))
    expected = torch.randn(5), torch.randperm(9), random.random(), random.gauss(0, 1)
    torch.manual_seed(0)
    random.seed(0)
    restore_rng(saved)
    assert torch.equal(torch.randn(5), expected[0])
    assert torch.equal(torch.randperm(9), expected[1])
    assert (random.random(), random.gauss(0, 1)) == expected[2:]
    with pytest.raises(ValueError, match="must come from capture_rng"):
        restore_rng({**saved, "torch": "AAAA"})


def test_saving_and_loading_leave_the_random_state_alone(tmp_path):
    before = capture_rng()
    load_checkpoint(save_checkpoint(tmp_path, 1, {"a": torch.zeros(3)}, {}))
    assert capture_rng() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_and_random_state_on_a_gpu_come_back_bitwise(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in some_tensors().items()}
    torch.cuda.manual_seed(1)
    path = save_checkpoint(tmp_path, 1, tensors, {"rng": capture_rng()})
    expected = torch.randn(100, device="cuda")
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    _, state = load_checkpoint(path, into)
    assert_bitwise(into, tensors)
    fresh, _ = load_checkpoint(path, device="cuda")
    assert_bitwise(fresh, tensors)
    restore_rng(state["rng"])
    assert torch.randn(100, device="cuda").equal(expected)
