"""`pithwood bench train` by several processes: one row, of all of them; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pithwood.bench.train_profile import timeline_name
from pithwood.bench.train_text import busy_ms, processes_line
from pithwood.cli import main
from pithwood.config import apply_overrides
from pithwood.estimate.work import Peaks, Stages, floors_ms, step_work
from pithwood.parallel.config import MeshConfig
from pithwood.recipes import load_recipe

SMALL = ["seq_len=64", "samples_per_step=4", "samples_per_micro_batch=2", "threads=1"]
STEPS = ["--steps", "3", "--drop", "1"]
ROOT = Path(__file__).parents[2]


def together(*words: str) -> subprocess.CompletedProcess[str]:
    """A command line of pithwood in two processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [*launcher, "-m", "pithwood", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """The row of one process, that of two with all that they printed, and the folder that the two wrote."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    assert main(["bench", "train", "debug", *SMALL, *STEPS, "--out", str(one), "--json"]) == 0
    words = [*SMALL, "mesh.dp_shard=2", "mesh.ep=2", "mesh.gather=forward", *STEPS, "--out", str(two)]
    done = together("bench", "train", "debug", *words, "--breakdown", "--json")
    assert done.returncode == 0, done.stderr
    (alone,) = json.loads((one / "train.json").read_text())["rows"]
    return alone, {"stdout": done.stdout, "stderr": done.stderr}, two


@pytest.mark.slow
def test_two_processes_make_one_row_of_all_that_they_do(alone_and_together):
    alone, printed, folder = alone_and_together
    row = json.loads(printed["stdout"])["row"]
    assert row["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "ep": 2}
    assert row["settings"] == ["mesh.gather=forward", "threads=1"]
    for same in ("training_tflops", "parameters", "active_parameters", "sequences", "steps"):
        assert row[same] == pytest.approx(alone[same]), same
    assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
    assert json.loads((folder / "train.json").read_text())["rows"] == [row]


@pytest.mark.slow
def test_a_breakdown_of_several_processes_adds_up_and_shares_the_floors(alone_and_together):
    found = json.loads(alone_and_together[1]["stdout"])["row"]["breakdown"]
    assert sum(found["ms"].values()) == pytest.approx(found["total_ms"])
    assert found["communication"] is None, "on a CPU there are no kernels to tell it by"
    run = apply_overrides(load_recipe("debug"), SMALL)
    floors = floors_ms(step_work(run), Peaks(**found["peaks"]))
    assert found["floor_ms"] == pytest.approx({part: ms / 2 for part, ms in floors.items()})


@pytest.mark.slow
def test_a_breakdown_of_a_pipeline_has_each_process_beside_the_floors_of_its_own_stage(tmp_path):
    words = ["bench", "train", "debug", *SMALL, "mesh.pp=2", "model.num_layers=3", "mesh.layers_per_stage=2,1"]
    done = together(*words, *STEPS, "--breakdown", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    found = row["breakdown"]
    run = apply_overrides(load_recipe("debug"), [*SMALL, *words[-3:]])
    assert [each["rank"] for each in found["processes"]] == [0, 1]
    for each in found["processes"]:
        wanted = floors_ms(step_work(run, stages=Stages.of(run, each["rank"])), Peaks(**found["peaks"]))
        assert each["floor_ms"] == pytest.approx(wanted)
    computed = [busy_ms(each["ms"]) for each in found["processes"]]
    assert found["rank"] == computed.index(max(computed))
    assert found["processes"][found["rank"]] == {name: found[name] for name in ("rank", "ms", "floor_ms")}
    assert f"shown is rank {found['rank']}; ms that each computes: rank 0 {computed[0]:,.1f} (floor" in done.stdout


@pytest.mark.slow
def test_a_profile_of_several_processes_says_whose_it_is():
    done = together("profile", "debug", *SMALL, "mesh.pp=2", "--steps", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"][found["rank"]] == {"rank": found["rank"], "ms": found["parts"]}
    computed = [busy_ms(each["ms"]) for each in found["processes"]]
    assert computed[found["rank"]] == max(computed)


@pytest.mark.quick
def test_a_line_tells_of_sixteen_processes_at_most():
    line = processes_line(3, [{"rank": rank, "ms": {"experts": 1.0, "idle": 9.0}} for rank in range(20)])
    assert line.startswith("shown is rank 3; ms that each computes: rank 0 1.0, rank 1 1.0, ")
    assert line.endswith("rank 15 1.0, 4 more")


@pytest.mark.slow
def test_the_first_of_several_processes_tells_alone(alone_and_together):
    _, printed, folder = alone_and_together
    assert len(printed["stdout"].splitlines()) == 1
    assert sum(line.startswith("step ") for line in printed["stderr"].splitlines()) == 3
    assert [path.name for path in folder.iterdir()] == ["train.json"]


@pytest.mark.quick
def test_a_mesh_without_its_processes_is_refused(tmp_path, capsys):
    assert main(["bench", "train", "debug", *SMALL, "mesh.dp_shard=2", "--out", str(tmp_path)]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_pictures_are_named_by_the_mesh_and_the_order_of_its_passes():
    assert timeline_name(MeshConfig(dp_shard=2, ep=2)) == "timeline-dp_shard2-ep2.png"
    assert timeline_name(MeshConfig(dp_shard=2, ep=2, overlap="pairs")) == "timeline-dp_shard2-ep2-pairs.png"
    assert timeline_name(MeshConfig(pp=2, schedule="dualpipe_v")) == "timeline-pp2-dualpipe_v.png"


@pytest.mark.quick
def test_a_sweep_by_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "train", "debug", "--sweep", "issue"]) == 2
    assert "on a mesh measure one row per command" in capsys.readouterr().err
