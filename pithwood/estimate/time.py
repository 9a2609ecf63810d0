"""How long a step takes on a mesh: the floor of each part over its efficiency, and communication that no part hides.

Per device: a data rank takes its share of the samples, cp divides what is left of the work, pp the layers, and the
update is divided over the devices that share a state. Of a pipeline the parts are those of the device that computes
longest, and what it waits for others is found by playing the schedule through (`pipeline.py`). Communication is what
the slowest device spends on its exchanges, by kind:

    experts     a row per token and process that has an expert of it, there and back, forward and backward; hidden
                behind the compute of another micro-batch with schedule=dualpipe_v, and without a pipeline with
                overlap=pairs but for the first forward and the last backward pass; else not; blocks
                with recompute=block send them there once more
    weights     gathered in the products' dtype: once a step, hidden behind the first forward pass, or with
                mesh.gather=forward before each pass, hidden behind all of them
    gradients   fp32, scattered once a step behind the last backward pass, or with mesh.reduce=micro_batch behind each
    replicas    fp32 gradients of the device's pieces added up over dp_replicate, once a step, behind what the last
                scattering leaves of the last backward pass
    update      with Muon: matrices that are cut travel to the device that orthogonalises them, and back; not hidden
    sequence    with cp, queries, keys, values and outputs between the devices of a sequence (mesh.context=heads), or
                keys and values to all of them (gather), and what full attention takes to its zigzag and back (gather,
                ring); not hidden; once more forward with recompute=block
    ring        keys and values from one device of a sequence after another, and their gradients home; hidden behind
                attention; once more forward with recompute=block
    pipeline    the residual stream at each stage boundary, both ways; hidden but for what a device waits longer. What
                it would wait for if nothing took time to travel is part of idle

With optim.offload_state=true the update takes no less than its state does from the host and back. Inputs of blocks that
wait there (offload_activations=true) cost nothing: they leave while the next block computes and come back one block
ahead, on a stream of their own, and the way of a block's inputs, 101 ms at 1M tokens of Qwen3-30B-A3B's width, is a
fraction of its forward pass: there, 1.5 s of such copies left no trace in the length of any part.

Devices are numbered as in `pithwood/parallel/mesh.py` and fill hosts in this order; which members of a group share a
host follows from that.

Legend: D model width, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pithwood.estimate.devices import Device, Reach
from pithwood.estimate.efficiency import Efficiency
from pithwood.estimate.pipeline import StageMs, pipeline_ms
from pithwood.estimate.spread import Spread
from pithwood.estimate.work import Stages, Work, repeated, state_bytes, step_work
from pithwood.moe.layer import MoELayer
from pithwood.observe.step_parts import IDLE
from pithwood.optim.config import MuonConfig
from pithwood.parallel.mesh import places
from pithwood.run import DTYPES, Run


@dataclass(frozen=True)
class TimeEstimate:
    """A step, in ms."""

    parts: dict[str, float]
    """By part; idle holds what is left over between kernels, and with pp the bubble."""
    communication: dict[str, float]
    """By kind, what is not hidden."""
    sent: dict[str, float]
    """By kind, hidden or not."""
    floors: dict[str, float]

    @property
    def step_ms(self) -> float:
        return sum(self.parts.values()) + sum(self.communication.values())


def estimate_time(run: Run, device: Device, known: Efficiency, spread: Spread | None = None) -> TimeEstimate:
    """Time of a step of the run's first phase on its mesh; `Run.validate` has accepted the run. spread:
    `Spread.of(run)`, made here if not given.
    """
    spread, mesh = spread or Spread.of(run), run.mesh
    own = replace(spread.own, phases=spread.own.phases[:1])
    # of a pipeline the device that computes longest
    shares = [_share(own, spread, device, known, stages) for stages in _stages_of_devices(run)]
    floors, parts = max(shares, key=lambda share: _computing(share[1]))
    compute = _computing(parts)
    parts["other"] = 0.0
    parts[IDLE] = known.rest * (compute + parts["optimizer"])
    sent = _communication(spread, device)
    # a forward pass is a third of the work
    once = compute / spread.micro_batches
    last = sent["gradients"] / (1 if mesh.reduce == "step" else spread.micro_batches)
    # without a pipeline the first forward and the last backward pass have no other beside them
    paired = 1 - 1 / spread.micro_batches if mesh.overlap == "pairs" else 1.0
    hidden = {
        "experts": min(compute, paired * sent["experts"]) if mesh.pauses else 0.0,
        "weights": once / 3 if mesh.gather == "step" else compute,
        "gradients": 2 / 3 * (once if mesh.reduce == "step" else compute),
        "replicas": max(2 / 3 * once - last, 0.0),
        # nothing is on its way under the last turn
        "ring": parts["attention"] * (1 - 1 / mesh.cp),
    }
    left = {kind: max(ms - hidden.get(kind, 0.0), 0.0) for kind, ms in sent.items()}
    if mesh.pp > 1:
        stages = _stages_ms(run, own, spread, device, known)
        one_way = sent["pipeline"] / (2 * spread.micro_batches * len(mesh.stages_of_process(0)))
        at_once, waiting = (pipeline_ms(mesh, spread.micro_batches, stages, send_ms) for send_ms in (0.0, one_way))
        parts[IDLE] += max(at_once - compute, 0.0)
        left["pipeline"] = waiting - at_once
    return TimeEstimate(parts, left, sent, floors)


def _computing(parts: dict[str, float]) -> float:
    """Time of forward and backward passes."""
    return sum(ms for part, ms in parts.items() if part != "optimizer")


def _stages_of_devices(run: Run) -> list[Stages]:
    """What the devices of a pipeline have of the model; of a mesh without one all of it."""
    return [Stages.of(run, rank * run.mesh.size // run.mesh.pp) for rank in range(run.mesh.pp)]


def _share(
    own: Run, spread: Spread, device: Device, known: Efficiency, stages: Stages
) -> tuple[dict[str, float], dict[str, float]]:
    """(floors, times) in ms by part of a device's work on its part of the model."""
    again = repeated(replace(own, seq_len=own.seq_len // spread.mesh.cp), stages)  # what the floors leave out
    work = _divided(step_work(own, spread.model, stages), spread)
    floors = {part: 1e3 * sum(piece.floor_s(device.peaks) for piece in pieces) for part, pieces in work.items()}
    parts = {part: floors[part] * again.get(part, 1.0) / known.parts[part] for part in known.parts}
    if own.optim.offload_state:
        both_ways = 2 * state_bytes(own, spread.model, stages) / spread.shards
        parts["optimizer"] = max(parts["optimizer"], 1e3 * both_ways / device.host_bytes_per_s)
    return floors, parts


def _stages_ms(run: Run, own: Run, spread: Spread, device: Device, known: Efficiency) -> list[StageMs]:
    """The passes of each stage of a pipeline."""
    found, micro = [], spread.micro_batches
    split = run.mesh.layers_of_stages(run.model.num_layers)
    for stage, layers in enumerate(split):
        part_of_model = Stages(frozenset(layers), stage == 0, stage == len(split) - 1)
        floors, parts = _share(own, spread, device, known, part_of_model)
        head = parts.pop("head and loss")
        layers_ms = _computing(parts)
        first_ms = sum(floors[part] / known.parts[part] for part in parts if part != "optimizer")
        found.append(StageMs(first_ms / micro, (layers_ms - first_ms) / micro, head / micro))
    return found


def _divided(work: Work, spread: Spread) -> Work:
    """A device's share of the work on its part of the model: cp divides it, and the shards of the state the update; its
    Newton-Schulz is spread over replicas too.
    """
    mesh, share = spread.mesh, dict[str, Any]()
    for part, pieces in work.items():
        divided = []
        for piece in pieces:
            ways = float(mesh.cp)
            if part == "optimizer":
                ways = spread.shards * (mesh.dp_replicate if piece.what == "Newton-Schulz" else 1)
            divided.append(replace(piece, flops=piece.flops / ways, bytes=piece.bytes / ways))
        share[part] = divided
    return share


def _communication(spread: Spread, device: Device) -> dict[str, float]:
    """ms of a step that a device's exchanges take, by kind, hidden or not."""
    mesh, run, model = spread.mesh, spread.own_part, spread.model
    reach = {
        name: Reach.of(device, ranks) for name, ranks in places(mesh, 0).items() if name not in ("world", "tokens")
    }
    size, micro = DTYPES[run.precision].itemsize, spread.micro_batches
    tokens = run.samples_per_step * run.seq_len
    layers = spread.layers * run.model.num_layers
    moe_layers = spread.layers * sum(isinstance(block.mlp, MoELayer) for block in model.blocks)
    row = float(run.model.model_dim * size)

    pair = tokens * spread.rows_per_pair() * row
    exchange = (
        (4 + _recomputed(run)) * moe_layers * micro * reach["ep"].all_to_all_s(pair / micro) if mesh.ep > 1 else 0.0
    )

    def divided(per_param: float, times: float) -> float:
        """Seconds of gathering (or scattering) all weights of the stages so many times, block by block."""
        dense = reach["shard"].gather_s(spread.dense / layers * per_param)
        return layers * times * (dense + reach["expert_shard"].gather_s(spread.experts / mesh.ep / layers * per_param))

    ways = [spread.context_way(block.self_attn) for block in model.blocks]
    each = {way: _sequence_s(spread, way, tokens / micro, size, reach["cp"]) for way in set(ways)}
    sequence, ring = (spread.layers * micro * sum(each[way][part] for way in ways) for part in (0, 1))
    sent = {
        "experts": exchange,
        "weights": divided(size, 1 if mesh.gather == "step" else 2 * micro),
        "gradients": divided(4.0, 1 if mesh.reduce == "step" else micro),
        "replicas": reach["replicate"].all_reduce_s(4.0 * spread.params / spread.shards),
        "update": _update_s(spread, reach),
        "sequence": sequence,
        "ring": ring,
        "pipeline": 2 * micro * len(mesh.stages_of_process(0)) * reach["pp"].send_s(tokens / micro * row),
    }
    return {kind: 1e3 * seconds for kind, seconds in sent.items()}


def _recomputed(run: Run) -> float:
    """The share of blocks whose forward pass is made twice."""
    blocks = run.recompute_by_block()
    return blocks.count("block") / len(blocks)


def _update_s(spread: Spread, reach: dict[str, Reach]) -> float:
    """Matrices that no device has whole go to one as fp32 momentum, and its result comes back in 16 bits."""
    if not isinstance(spread.own.optim, MuonConfig) or spread.shards == 1:
        return 0.0
    cut = spread.dense / spread.shards
    ways = spread.shards // spread.mesh.ep
    # experts stay where they are if each device has some of them whole
    if (spread.own.model.moe.num_experts // spread.mesh.ep) % ways:
        cut += spread.experts / spread.shards
    return reach["shard"].all_to_all_s(6.0 * cut / spread.shards)


def _sequence_s(spread: Spread, way: str, tokens: float, size: int, reach: Reach) -> tuple[float, float]:
    """Of one layer and micro-batch, forward and backward: what nothing hides, and what goes round under attention.

    way  as `Spread.context_way` says;  tokens  of this device
    """
    cfg, cp = spread.own.model, spread.mesh.cp
    passes = 2 + _recomputed(spread.own)
    token = float(cfg.head_dim * size)
    queries, keys = tokens * cfg.num_heads * token, tokens * 2 * cfg.num_kv_heads * token
    if way == "none":
        return 0.0, 0.0
    if way == "heads":
        # q, k, v one way and the output the other, and their gradients
        return passes * reach.all_to_all_s((2 * queries + keys) / cp), 0.0
    if way == "ring":
        # a device needs the early half of what those before it have, and both halves of those after it
        turns = (cp - 1) * reach.send_s(0.75 * keys)
        return passes * (reach.send_s(queries + keys) + reach.send_s(queries)), (passes + 1) * turns
    gathered = passes * reach.gather_s(keys * cp)
    return gathered + (2 * passes * reach.send_s(queries) if way == "gather, zigzag" else 0.0), 0.0
