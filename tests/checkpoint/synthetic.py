"""Tensors with known elements, divided over a mesh as a training run divides its own; manifests of other contents."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.checkpoint.files import hash_file
from pithwood.checkpoint.ranges import Held
from pithwood.checkpoint.storage import MANIFEST, SUMS, tensor_file
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece

NUM_LAYERS = 4
LAYER = {
    "proj": (torch.float32, (6, 8)),
    "norm": (torch.float32, (5,)),  # five elements are not divided: all hold them
    "copy": (torch.bfloat16, (4, 4)),
    "experts": (torch.float32, (4, 3, 2)),
    "momentum.experts": (torch.float32, (4, 3, 2)),
}


def whole_tensor(name: str) -> Tensor:
    """All elements of a tensor, which follow from its name."""
    dtype, shape = LAYER[name.partition(".")[2]]
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(math.prod(shape), generator=random).to(dtype).view(shape)


def held_on(mesh: Mesh, filled: bool) -> dict[str, Held]:
    """What a process holds: its stages' layers, dense ones cut over mesh.shard, experts over ep and expert_shard."""
    cfg = mesh.cfg
    stages = [cfg.layers_of_stages(NUM_LAYERS)[stage] for stage in cfg.stages_of_process(mesh.pp.rank)]
    held = {}
    for layer in (layer for layers in stages for layer in layers):
        for kind, (dtype, shape) in LAYER.items():
            name, piece = f"{layer}.{kind}", Piece.whole(shape)
            groups = [mesh.ep, mesh.expert_shard] if "experts" in kind else [mesh.shard]
            writes = mesh.replicate.rank == 0
            for group in groups:
                if piece.numel % group.size:
                    writes = writes and group.rank == 0
                else:
                    piece = piece.part(group.rank, group.size)
            values = whole_tensor(name).view(-1)[piece.start : piece.stop] if filled else torch.zeros(piece.numel)
            held[name] = Held(values.to(dtype), piece, writes)
    return held


def wrong(held: dict[str, Held]) -> list[str]:
    """Names of what does not hold the elements that it should, bit for bit."""
    return [
        name
        for name, part in held.items()
        if not torch.equal(part.tensor.view(-1), whole_tensor(name).view(-1)[part.piece.start : part.piece.stop])
    ]


def rewrite_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Give a checkpoint another manifest, with its hash."""
    (path / MANIFEST).write_text(json.dumps(manifest))
    lines = [line for line in (path / SUMS).read_text().splitlines() if MANIFEST not in line]
    (path / SUMS).write_text("\n".join([f"{hash_file(path / MANIFEST)}  {MANIFEST}", *lines]) + "\n")


def as_format_1(path: Path) -> None:
    """Rewrite a manifest as the first format described it: boxes in place of ranges."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["format_version"] = 1
    for name, tensor in manifest["tensors"].items():
        shape, boxes = tensor["shape"], []
        row = math.prod(shape[1:])
        for start, stop, writer in tensor["chunks"]:
            key = name if stop - start == math.prod(shape) else f"{name}@{start}:{stop}"
            first, rows = ([start // row], [(stop - start) // row]) if shape else ([], [])
            box = {"offsets": first + [0] * len(shape[1:]), "shape": rows + shape[1:]}
            boxes.append({**box, "file": tensor_file(writer), "key": key})
        tensor["chunks"] = boxes
    rewrite_manifest(path, manifest)
