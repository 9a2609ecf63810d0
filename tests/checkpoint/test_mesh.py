"""The storage below a checkpoint takes shards from one mesh and gives them to another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from pithwood.checkpoint.load import load_checkpoint, verify_checkpoint

# Each of two processes writes its shards, rank 0 the manifest; then both read onto another sharding than was written.
PROCESS = """
import sys, pathlib, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from pithwood.checkpoint.load import load_checkpoint
from pithwood.checkpoint.storage import CheckpointWriter, Manifest, write_manifest

rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
mesh = init_device_mesh("cpu", (2,))
full = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(30).reshape(5, 6),
    "same": torch.arange(3).bfloat16(),
    "scalar": torch.tensor(7),
}
written = {"rows": [Shard(0)], "columns": [Shard(1)], "same": [Replicate()], "scalar": [Replicate()]}
read = {"rows": [Shard(1)], "columns": [Shard(0)], "same": [Shard(0)], "scalar": [Replicate()]}

out = folder / "checkpoint"
writer = CheckpointWriter(out)
planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
sharded = {name: distribute_tensor(t, mesh, written[name]) for name, t in full.items()}
dcp.save(sharded, storage_writer=writer, planner=planner)
if rank == 0:
    write_manifest(out, Manifest(3, torch.__version__, writer.tensors), {"tokens": 1}, writer.sums)
dist.barrier()
into = {name: distribute_tensor(torch.zeros_like(t), mesh, read[name]) for name, t in full.items()}
load_checkpoint(out, into)
for name, tensor in into.items():
    assert tensor.full_tensor().equal(full[name]), name
dist.destroy_process_group()
"""


def test_shards_of_one_mesh_load_onto_another_and_onto_none(tmp_path: Path):
    (tmp_path / "checkpoint").mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    manifest = verify_checkpoint(tmp_path / "checkpoint")
    assert manifest.files == ["tensors-00000.safetensors", "tensors-00001.safetensors"]
    assert [len(manifest.tensors[name].chunks) for name in ("rows", "columns", "same", "scalar")] == [2, 2, 1, 1]
    tensors, state = load_checkpoint(tmp_path / "checkpoint")
    assert tensors["rows"].equal(torch.arange(35.0).reshape(7, 5))
    assert tensors["columns"].equal(torch.arange(30).reshape(5, 6))
    assert tensors["same"].equal(torch.arange(3).bfloat16())
    assert tensors["scalar"].equal(torch.tensor(7))
    assert state["tokens"] == 1
