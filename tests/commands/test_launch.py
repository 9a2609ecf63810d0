"""`pithwood launch`: the line for torchrun and the script for SLURM, both understood by what they are for; refusals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from pithwood.cli import main

DEBUG = ["debug", "device=cpu", "mesh.dp_shard=2", "--gpus-per-node", "2"]


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def launched(capsys, *words: str) -> dict:
    assert main(["launch", *words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.quick
def test_torchrun_understands_the_line_for_one_node(capsys):
    found = launched(capsys, *DEBUG, "--nodes", "1")
    words = shlex.split(found["command"])
    assert words[:2] == ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "OMP_NUM_THREADS=1"]
    assert words[3:5] == ["-m", "torch.distributed.run"]
    parsed = get_args_parser().parse_args(words[5:])
    assert (parsed.standalone, parsed.nproc_per_node, parsed.max_restarts) == (True, "2", 3)
    assert parsed.module
    assert [parsed.training_script, *parsed.training_script_args] == [
        "pithwood", "train", "debug", "device=cpu", "mesh.dp_shard=2",
    ]  # fmt: skip


@pytest.mark.quick
def test_torchrun_understands_the_line_for_several_nodes(capsys):
    words = [
        "debug",
        "mesh.dp_shard=4",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--head",
        "node0",
        "--runs-dir",
        "there",
    ]
    found = launched(capsys, *words, "--max-restarts", "0")
    parsed = get_args_parser().parse_args(shlex.split(found["command"])[5:])
    assert (parsed.nnodes, parsed.rdzv_backend, parsed.rdzv_endpoint) == ("2", "c10d", "node0:29400")
    assert parsed.max_restarts == 0
    assert parsed.training_script_args[-2:] == ["--runs-dir", "there"]


@pytest.mark.quick
def test_the_groups_say_what_crosses_nodes(capsys):
    words = ["qwen3_30b_8l", "samples_per_micro_batch=16", "mesh.dp_shard=16", "--nodes", "2", "--head", "a"]
    assert launched(capsys, *words, "mesh.ep=8")["groups"] == [
        "shard: 16 processes on 2 nodes",
        "ep: 8 processes on 1 node",
    ]
    assert (
        "ep: 16 processes on 2 nodes; tokens go between nodes in every layer"
        in launched(capsys, *words, "mesh.ep=16")["groups"]
    )


@pytest.mark.quick
def test_the_text_is_what_the_json_holds(capsys):
    assert main(["launch", *DEBUG, "--nodes", "1", "--slurm", "--dry-run"]) == 0
    text = capsys.readouterr().out
    script = launched(capsys, *DEBUG, "--nodes", "1", "--slurm")["script"]
    assert text.strip() == script.strip()
    for option in ("--nodes=1", "--ntasks-per-node=2", "--signal=TERM@300", "--requeue"):
        assert f"#SBATCH {option}\n" in script
    assert "gpus" not in script


@pytest.mark.quick
def test_more_options_of_sbatch_come_along(capsys):
    words = ["qwen3_30b_8l", "samples_per_micro_batch=8", "mesh.dp_shard=8", "--nodes", "1", "--slurm"]
    script = launched(capsys, *words, "--sbatch=--partition=gpu", "--time", "02:00:00")["script"]
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --time=02:00:00\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script


def cluster(folder: Path, codes: list[int]) -> dict[str, str]:
    """An environment with the programs of a cluster; its n-th srun notes its port and ends with the n-th code."""
    programs = {
        "scontrol": 'echo "$@" >> "$HOME/scontrol.log"; echo node0; echo node1',
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $*" >> "$HOME/srun.log"\ncodes=({" ".join(map(str, codes))})\n'
        'exit "${codes[$(($(wc -l < "$HOME/srun.log") - 1))]}"',
        "sbatch": 'cat > "$HOME/submitted"; echo "4711;cluster"',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "SLURM_JOB_ID": "70001",
            "SLURM_JOB_NODELIST": "node[0-1]"}  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "ends", "requeued"),
    [([0], 0, False), ([137, 4, 0], 0, False), ([2], 2, False), ([4, 143], 143, True), ([1, 1, 1], 1, False)],
)
def test_the_job_starts_again_after_a_failure_and_goes_back_into_the_queue_when_time_is_up(
    capsys, tmp_path, codes, ends, requeued
):
    script = launched(capsys, *DEBUG, "--nodes", "1", "--slurm", "--max-restarts", "2")["script"]
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=cluster(tmp_path, codes))
    assert done.returncode == ends, done.stderr
    calls = (tmp_path / "srun.log").read_text().splitlines()
    assert len(calls) == len(codes)
    # every attempt meets at a port of its own
    assert len({call.split()[1] for call in calls}) == len(codes)
    assert all(call.startswith("node0 ") and call.endswith("pithwood train debug device=cpu mesh.dp_shard=2")
               for call in calls)  # fmt: skip
    assert ("requeue 70001" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_a_job_is_submitted(capsys, tmp_path, monkeypatch):
    for name, value in cluster(tmp_path, []).items():
        monkeypatch.setenv(name, value)
    folder = str(tmp_path / "runs")
    assert main(["launch", *DEBUG, "--nodes", "1", "--slurm", "--runs-dir", folder]) == 0
    assert capsys.readouterr().out == f"job 4711; its log: {folder}/slurm-4711.log\n"
    assert (tmp_path / "submitted").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=debug\n")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["debug", "--nodes", "1"], "the mesh has 1 processes (pp=1 x dp_replicate=1 x dp_shard=1 x cp=1), but"),
        (["debug", "--nodes", "1"], "set mesh.dp_shard=8"),
        (["debug", "mesh.dp_shard=4", "--nodes", "2", "--gpus-per-node", "2"], "give --head HOST, or --slurm"),
        ([*DEBUG, "--nodes", "1", "--head", "a"], "drop it"),
        ([*DEBUG, "--nodes", "0"], "--nodes 0 must be at least 1"),
        ([*DEBUG, "--nodes", "1", "--max-restarts", "-1"], "--max-restarts -1 must be 0 or more"),
        ([*DEBUG, "mesh.ep=3", "--nodes", "1"], "mesh.ep=3 must divide"),
        (["debug", "mesh.cp=3", "--nodes", "1"], "mesh.cp"),
        ([*DEBUG, "--nodes", "1", "--slurm"], "sbatch is not on this machine"),
    ],
)
def test_bad_input_is_refused_in_words(words, told, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_refusal_of_sbatch_is_told(capsys, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "invalid partition specified" >&2\nexit 1\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", *DEBUG, "--nodes", "1", "--slurm", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "sbatch refused the job: invalid partition specified" in capsys.readouterr().err
