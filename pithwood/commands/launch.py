"""`pithwood launch`: start a run on many GPUs, by torchrun on each node or by a SLURM job; check its mesh first."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pithwood.commands.common import add_command, add_common, json_text

if TYPE_CHECKING:
    from pithwood.run import Run

HELP = """examples:
  pithwood launch qwen3_30b_8l mesh.dp_shard=8 mesh.ep=8 samples_per_micro_batch=16 --nodes 1 --dry-run
  pithwood launch qwen3_30b_8l mesh.dp_shard=16 mesh.ep=8 samples_per_micro_batch=16 --nodes 2 --head node0 --dry-run
  pithwood launch qwen3_30b_8l mesh.dp_shard=16 mesh.ep=8 samples_per_micro_batch=16 --nodes 2 --slurm --dry-run

One process per GPU, as many as the mesh has. Without --slurm, type the same command on every node; --head names the
first one. With --slurm, a job is submitted. Either way a run whose process dies starts again from its last checkpoint,
--max-restarts times. SLURM tells the run to save and stop --save-minutes before its time is up; the job then goes back
into the queue. --dry-run prints what would be run or submitted."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "launch", "start a run on several GPUs or nodes, by torchrun or SLURM", HELP)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a name that `pithwood recipes` lists, or path/to/file.py:function"
    )
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    parser.add_argument("--nodes", metavar="N", type=int, required=True, help="machines")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, default=8, help="processes of each (default: 8)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--torchrun", action="store_true", help="run torchrun on this node (the default)")
    ways.add_argument("--slurm", action="store_true", help="submit a job by sbatch")
    parser.add_argument("--head", metavar="HOST[:PORT]", help="torchrun on several nodes: the first one (port: 29400)")
    parser.add_argument("--max-restarts", metavar="N", type=int, default=3, help="after a failure (default: 3)")
    parser.add_argument("--time", metavar="D-HH:MM:SS", default="1-00:00:00", help="SLURM: limit (default: one day)")
    parser.add_argument("--save-minutes", metavar="N", type=int, default=5, help="SLURM: for saving (default: 5)")
    parser.add_argument("--cpus-per-gpu", metavar="N", type=int, default=8, help="SLURM: cores (default: 8)")
    parser.add_argument(
        "--sbatch", metavar="OPTION", action="append", default=[],
        help="SLURM: one more option of sbatch, such as --sbatch=--partition=gpu; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command or the script, start nothing")
    add_common(parser, "what was or would be started")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """What was started, or would be."""
    from pithwood.config import apply_overrides
    from pithwood.plan import check_phases
    from pithwood.recipes import load_recipe

    settings = apply_overrides(load_recipe(args.recipe), args.overrides)
    settings.validate()
    check_phases(settings)
    _check(args, settings)
    groups = _groups(settings, args.gpus_per_node)
    if args.slurm:
        return _slurm(args, settings, groups)
    return _torchrun(args, settings, groups)


def _check(args: argparse.Namespace, run: Run) -> None:
    for option in ("nodes", "gpus_per_node", "save_minutes", "cpus_per_gpu"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1")
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts} must be 0 or more")
    started, size = args.nodes * args.gpus_per_node, run.mesh.size
    if started != size:
        sizes = " x ".join(f"{name}={getattr(run.mesh, name)}" for name in ("pp", "dp_replicate", "dp_shard", "cp"))
        rest, odd = divmod(started, run.mesh.pp * run.mesh.dp_replicate * run.mesh.cp)
        shards = run.mesh.dp_shard * started // size if started % size == 0 else rest
        remedy = f"mesh.dp_shard={shards}" if not odd else "mesh.dp_shard or mesh.dp_replicate"
        raise ValueError(
            f"the mesh has {size} processes ({sizes}), but --nodes {args.nodes} with --gpus-per-node "
            f"{args.gpus_per_node} starts {started}; set {remedy}, or other numbers of nodes"
        )
    if args.nodes > 1 and not args.slurm and args.head is None:
        raise ValueError("torchrun on several nodes needs to know the first one; give --head HOST, or --slurm")
    if args.head is not None and (args.slurm or args.nodes == 1):
        raise ValueError("--head is for torchrun on several nodes; drop it")


def _groups(run: Run, per_node: int) -> list[str]:
    """How the groups of the mesh lie on nodes, in words; what crosses nodes and should rather not comes with a hint."""
    from pithwood.parallel.mesh import places

    lines = []
    for name, ranks in places(run.mesh, 0).items():
        if name in ("ep", "cp", "shard", "replicate", "pp") and len(ranks) > 1:
            nodes = len({rank // per_node for rank in ranks})
            hint = "; tokens go between nodes in every layer" if name in ("ep", "cp") and nodes > 1 else ""
            lines.append(f"{name}: {len(ranks)} processes on {nodes} node{'s' * (nodes > 1)}{hint}")
    return lines


def _train_words(args: argparse.Namespace) -> list[str]:
    folder = [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    return ["-m", "pithwood", "train", args.recipe, *args.overrides, *folder]


def torchrun_words(args: argparse.Namespace) -> list[str]:
    """The command for one node; each starts its processes and they find each other at the head's."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.gpus_per_node}"]
    words.append(f"--max-restarts={args.max_restarts}")
    if args.nodes == 1:
        return [*words, "--standalone", *_train_words(args)]
    host, _, port = args.head.partition(":")
    meeting = [f"--nnodes={args.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port or 29400}"]
    return [*words, *meeting, f"--rdzv-id=pithwood-{args.recipe.rpartition(':')[2]}", *_train_words(args)]


TORCHRUN_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
"""Restarted processes would otherwise find the addresses of the dead ones. One thread is what torchrun sets, aloud."""


def _torchrun(args: argparse.Namespace, run: Run, groups: list[str]) -> tuple[int, str]:
    import os

    words = torchrun_words(args)
    line = " ".join([*(f"{name}={value}" for name, value in TORCHRUN_ENVIRONMENT.items()), shlex.join(words)])
    told = {"way": "torchrun", "processes": run.mesh.size, "nodes": args.nodes, "groups": groups, "command": line}
    if args.dry_run:
        every = [] if args.nodes == 1 else [f"# on each of the {args.nodes} nodes"]
        return 0, json_text(told) if args.json else "\n".join([*(f"# {group}" for group in groups), *every, line])
    for group in groups:
        print(group, file=sys.stderr)
    code = subprocess.run(words, env={**os.environ, **TORCHRUN_ENVIRONMENT}, stdout=sys.stderr).returncode
    return code, json_text({**told, "exit_code": code}) if args.json else f"torchrun ended with exit code {code}"


def slurm_script(args: argparse.Namespace, run: Run, groups: list[str]) -> str:
    """The job's script."""
    options = [
        f"--job-name={run.name}",
        f"--nodes={args.nodes}",
        f"--ntasks-per-node={args.gpus_per_node}",
        *([] if run.device == "cpu" else [f"--gpus-per-node={args.gpus_per_node}"]),
        f"--cpus-per-task={args.cpus_per_gpu}",
        f"--time={args.time}",
        f"--signal=TERM@{60 * args.save_minutes}",
        "--requeue",
        "--open-mode=append",
        f"--output={args.runs_dir}/slurm-%j.log",
        *args.sbatch,
    ]
    command = shlex.join([sys.executable, *_train_words(args)])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            *(f"# {group}" for group in groups),
            "set -uo pipefail",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_ADDR OMP_NUM_THREADS=1",
            f"for attempt in $(seq 0 {args.max_restarts}); do",
            "  export MASTER_PORT=$((20000 + (SLURM_JOB_ID + attempt) % 20000))",
            "  code=0",
            # since Slurm 22.05 steps do not take --cpus-per-task over from the job
            f"  srun --cpus-per-task={args.cpus_per_gpu} --kill-on-bad-exit=1 --wait=60 {command} || code=$?",
            "  case $code in",
            "    0) exit 0 ;;",
            "    2) exit 2 ;;  # bad input stays bad",
            "    # saved because the time was nearly up: the job goes back into the queue and on from there",
            '    143) scontrol requeue "$SLURM_JOB_ID"; exit 143 ;;',
            "  esac",
            '  echo "attempt $attempt ended with exit code $code" >&2',
            "done",
            'exit "$code"',
            "",
        ]
    )


def _slurm(args: argparse.Namespace, run: Run, groups: list[str]) -> tuple[int, str]:
    script = slurm_script(args, run, groups)
    told = {"way": "slurm", "processes": run.mesh.size, "nodes": args.nodes, "groups": groups, "script": script}
    if args.dry_run:
        return 0, json_text(told) if args.json else script.rstrip()
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ValueError(
            "sbatch is not on this machine; run this where jobs are submitted, or --dry-run for the script"
        )
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sbatch, "--parsable"], input=script, text=True, capture_output=True)
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    return 0, json_text({**told, "job": job}) if args.json else f"job {job}; its log: {args.runs_dir}/slurm-{job}.log"
