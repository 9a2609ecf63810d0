"""How long a step takes on a mesh: the floor of each part over its efficiency, and communication that no part hides.

Per device: a data rank takes its share of the samples, cp divides what is left of the work, pp the layers, and the
update is divided over the devices that share a state. The stage with the head has it beside as many layers as the
others, which wait for it. Communication counts what one device sends in one direction:

    experts     top_k rows per token to their experts and back, forward and backward; not hidden
    weights     bf16 weights gathered for each forward and backward pass, fp32 gradients reduced once a step; hidden
                behind the compute of the blocks as far as that lasts
    replicas    fp32 gradients of the device's shard summed over dp_replicate, once a step; not hidden
    sequence    keys and values passed on to the other cp ranks, and their gradients back; hidden behind attention
    pipeline    the residual stream at each stage boundary, both ways; not hidden. The bubble of 1F1B,
                (pp - 1) / micro-batches of the compute, is a part of its own.

Groups are laid out with cp and ep innermost, then dp_shard, pp, dp_replicate; a group that fits into a host talks over
NVLink, any other over the network.

Legend: D model width, G KV heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pithwood.attention.projections import HeadsMixer
from pithwood.estimate.devices import Device, MeshSizes
from pithwood.estimate.efficiency import Efficiency
from pithwood.estimate.work import Work, meta_model, repeated, step_work
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.layer import MoELayer
from pithwood.observe.step_parts import IDLE
from pithwood.run import DTYPES, Run


@dataclass(frozen=True)
class TimeEstimate:
    """A step, in ms."""

    parts: dict[str, float]
    """By part; idle holds what is left over between kernels, and with pp the bubble."""
    communication: dict[str, float]
    """By kind, what is not hidden."""
    floors: dict[str, float]

    @property
    def step_ms(self) -> float:
        return sum(self.parts.values()) + sum(self.communication.values())


def estimate_time(run: Run, device: Device, mesh: MeshSizes, known: Efficiency) -> TimeEstimate:
    """Time of a step of the run's first phase; `check_mesh` has accepted the mesh."""
    own = replace(run, samples_per_step=run.samples_per_step // mesh.data_ranks, phases=run.phases[:1])
    model = meta_model(run)
    again = repeated(run)  # what the floors leave out
    work = _own_share(step_work(own, model), mesh)
    floors = {part: 1e3 * sum(piece.floor_s(device.peaks) for piece in pieces) for part, pieces in work.items()}
    parts = {part: floors[part] * again.get(part, 1.0) / known.parts[part] for part in known.parts}
    busy = sum(parts.values())
    parts["other"] = 0.0
    parts[IDLE] = known.rest * busy
    micro = own.samples_per_step // own.samples_per_micro_batch
    compute = busy - parts["optimizer"]
    parts[IDLE] += compute * (mesh.pp - 1) / micro
    hidden = {"weights": compute, "sequence": parts["attention"]}
    sent = _communication(own, model, device, mesh, micro)
    return TimeEstimate(parts, {kind: max(ms - hidden.get(kind, 0.0), 0.0) for kind, ms in sent.items()}, floors)


def _own_share(work: Work, mesh: MeshSizes) -> Work:
    """The work of the busiest device: pp and cp divide the layers, cp the head, which one stage has whole, and the
    shards of the state the update.
    """
    share: dict[str, Any] = {}
    for part, pieces in work.items():
        ways = (1 if part == "head and loss" else mesh.pp) * (mesh.shards if part == "optimizer" else mesh.cp)
        share[part] = [replace(piece, flops=piece.flops / ways, bytes=piece.bytes / ways) for piece in pieces]
    return share


def _communication(run: Run, model: Qwen3MoE, device: Device, mesh: MeshSizes, micro: int) -> dict[str, float]:
    """ms that a device spends sending in one step, by kind, hidden or not; run: the share of one data rank."""
    size, cfg = DTYPES[run.precision].itemsize, run.model
    tokens = run.samples_per_step * run.seq_len / mesh.cp
    layers = cfg.num_layers / mesh.pp
    moe_layers = sum(isinstance(block.mlp, MoELayer) for block in model.blocks) / mesh.pp
    row = tokens * cfg.model_dim * size
    experts = sum(
        param.numel() for block in model.blocks if isinstance(block.mlp, MoELayer)
        for param in block.mlp.experts.parameters()
    ) / mesh.pp  # fmt: skip
    dense = sum(param.numel() for param in model.parameters()) / mesh.pp - experts
    expert_ways = mesh.shards // mesh.ep

    def others(ways: int) -> float:
        return (ways - 1) / ways

    # bf16 weights gathered twice a micro-batch, fp32 gradients reduced once a step
    per_weight = 2 * size * micro + 4.0
    gathered = per_weight * (dense * others(mesh.shards) + experts / mesh.ep * others(expert_ways))
    heads = [block.self_attn for block in model.blocks if isinstance(block.self_attn, HeadsMixer)]
    keys = sum(2.0 * mixer.shape.num_kv_heads * mixer.shape.head_dim for mixer in heads) / max(len(heads), 1)
    near, far = _speed(device, mesh.cp), _speed(device, mesh.shards)
    sent = {
        "experts": 4 * moe_layers * cfg.moe.top_k * row * others(mesh.ep) / _speed(device, mesh.ep),
        "weights": gathered / far,
        "replicas": 2 * 4.0 * (dense + experts) / mesh.shards * others(mesh.dp_replicate) / _speed(device, mesh.world),
        "sequence": 3 * layers * keys * tokens * size * (mesh.cp - 1) / near,
        "pipeline": 2 * row * others(mesh.pp) / _speed(device, mesh.shards * mesh.pp),
    }
    return {kind: 1e3 * seconds for kind, seconds in sent.items()}


def _speed(device: Device, reach: int) -> float:
    """Bytes per second within a group that spans so many neighbouring devices."""
    return device.nvlink_bytes_per_s if reach <= device.per_host else device.network_bytes_per_s
