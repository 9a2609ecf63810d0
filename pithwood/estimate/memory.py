"""What a device of a mesh will hold at its peak, by kind: the one-device figures, divided as the mesh divides them."""

from __future__ import annotations

from dataclasses import replace

import torch

from pithwood.estimate.devices import Device, MeshSizes
from pithwood.estimate.work import meta_model
from pithwood.memory import keeps_copies, memory_by_kind
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.layer import MoELayer
from pithwood.run import DTYPES, Run

STATE = ("weights", "weight_copies", "gradients", "optimizer_state", "weight_average")
"""Kinds that belong to parameters; the others belong to a micro-batch."""


def estimate_memory(run: Run, device: Device, mesh: MeshSizes) -> dict[str, float]:
    """Bytes on one device at the peak of a step, by kind; their sum is what torch will have allocated at most.

    One device: `memory_by_kind`. On a mesh (which `check_mesh` has accepted) cp divides the sequence; pp the layers, of
    whose activations it keeps those of pp micro-batches at most, and the fullest stage counts, which has the embedding
    or the head beside its layers; dp_shard * cp divide the state, experts by ep and then by what is left of the two.
    `gathered_weights` then holds two blocks' weights in the activations' dtype: one at work, one on its way.
    """
    cuda = torch.device("cuda")
    own = replace(
        run,
        seq_len=run.seq_len // mesh.cp,
        samples_per_step=run.samples_per_step // mesh.data_ranks,
        phases=run.phases if mesh.world == 1 else (),
    )
    kinds = memory_by_kind(own, cuda, copies=keeps_copies(own, cuda, device.memory_bytes / _share(run, mesh)))
    if mesh.world == 1:
        return kinds
    model = meta_model(run)
    micro = own.samples_per_step // own.samples_per_micro_batch
    state = _share(run, mesh)
    live = min(mesh.pp, micro) / mesh.pp
    divided = {
        kind: size * (state if kind in STATE else live if kind == "activations" else 1) for kind, size in kinds.items()
    }
    if mesh.shards > 1:
        divided["gathered_weights"] = 2.0 * DTYPES[run.precision].itemsize * _largest_block(model, mesh)
    return divided


def _share(run: Run, mesh: MeshSizes) -> float:
    """Share of all state that the fullest device holds."""
    model = meta_model(run)
    total = float(sum(param.numel() for param in model.parameters()))
    blocks = float(sum(param.numel() for block in model.blocks for param in block.parameters()))
    ends = total - blocks
    if mesh.pp > 1 and not run.model.tie_embeddings:
        ends /= 2
    return (blocks / mesh.pp + ends) / mesh.shards / total


def _largest_block(model: Qwen3MoE, mesh: MeshSizes) -> float:
    """Parameters of a block that a device works with: all but the experts of others."""
    sizes = []
    for block in model.blocks:
        all_of_it = sum(param.numel() for param in block.parameters())
        experts = sum(p.numel() for p in block.mlp.experts.parameters()) if isinstance(block.mlp, MoELayer) else 0
        sizes.append(all_of_it - experts + experts / mesh.ep)
    return max(sizes)
