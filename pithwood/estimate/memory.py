"""What a device of a mesh will hold at its peak, by kind: the one-device figures, divided as the mesh divides them."""

from __future__ import annotations

import torch

from pithwood.estimate.devices import Device
from pithwood.estimate.spread import Spread
from pithwood.memory import keeps_copies, memory_moments
from pithwood.run import DTYPES, Run

STATE = ("weights", "weight_copies", "gradients", "optimizer_state", "weight_average")
"""Kinds that belong to parameters; the others belong to a micro-batch."""
ROOM = 1.25
"""Rows that buffers between processes hold, relative to what even spreading needs (`ExpertExchange`)."""


def estimate_memory(run: Run, device: Device, spread: Spread | None = None) -> dict[str, float]:
    """Bytes on one device of the run's mesh at the peak of a step, by kind; their sum is what torch will have allocated
    at most. `Run.validate` has accepted the run; spread: `Spread.of(run)`, made here if not given.

    One device: `memory_by_kind`. On a mesh, at the moment that is the fullest there, cp divides the tokens and pp the
    layers, of whose activations the first stage keeps those of several micro-batches; the fullest stage counts, with
    the embedding or the head beside its layers. Passes in pairs without a pipeline (mesh.overlap) keep about two layers
    more than those of a micro-batch: one begins as the other ends. dp_shard x cp divide the state, experts by ep and
    then by what is left of the two.
    Then there are

    gathered_weights  in the dtype of the products that take them: of the whole stage with mesh.gather=step, else of
                      two blocks for each pass
    gradients         fp32: with mesh.reduce=step of the whole stage, whose place pieces take in the last backward pass,
                      else of the device's pieces, of two blocks, and of embedding and head
    exchange          with ep: rows that came from other devices, of every layer whose activations are kept, and those
                      on their way
    sequence          with cp: keys and values of other devices, gathered by every layer whose activations are kept;
                      where they go by ring, those of two devices, and fp32 gradients of one layer's queries, keys and
                      values
    """
    cuda, spread = torch.device("cuda"), spread or Spread.of(run)
    own, mesh = spread.own_part, run.mesh
    whole = float(sum(param.numel() for param in spread.model.parameters()))
    share = spread.params / spread.shards / whole
    # where weights are divided their pieces have copies, which are gathered
    copies = spread.shards == 1 and keeps_copies(own, cuda, device.memory_bytes / share)
    moments = memory_moments(own, cuda, copies=copies)
    divided = [_on_mesh(run, spread, kinds, part, share, whole) if mesh.size > 1 else kinds for part, kinds in moments]
    return max(divided, key=lambda kinds: sum(kinds.values()))


def _on_mesh(
    run: Run, spread: Spread, kinds: dict[str, float], part: str, share: float, whole: float
) -> dict[str, float]:
    """One device's kinds at a moment in a `part` of the step, divided: `share` of the state, of `whole` parameters."""
    mesh = run.mesh
    held = {"activations": spread.in_flight * spread.layers}
    divided = {kind: size * (share if kind in STATE else held.get(kind, 1.0)) for kind, size in kinds.items()}
    if spread.shards > 1:
        size = DTYPES[run.precision].itemsize
        products = sum(weight.numel() for weight in spread.model.product_weights().values()) / whole
        divided["weight_copies"] = size * products * spread.pieces if size < 4 else 0.0
        divided["gathered_weights"] = size * (spread.gathered if mesh.gather == "step" else spread.blocks_of_passes)
        if mesh.gather == "step":
            # what no product takes, the embedding above all, is gathered as it is
            divided["gathered_weights"] += (4 - size) * (1 - products) * whole / mesh.pp
        if kinds["gradients"]:
            divided["gradients"] = 4.0 * _gradient_elements(spread, part)
    if mesh.ep > 1:
        divided["exchange"] = _exchange_bytes(run, spread)
    if mesh.cp > 1:
        divided["sequence"] = _sequence_bytes(run, spread)
    return divided


def _gradient_elements(spread: Spread, part: str) -> float:
    """Of whole gradients and of pieces: with mesh.reduce=step a block's piece takes its whole gradient's place in the
    last backward pass; those of embedding and head stay. Of experts that no other process shares the gradient is
    made where it stays."""
    if part == "update":
        return spread.pieces
    if spread.mesh.reduce == "micro_batch" or part == "backward":
        return spread.pieces + spread.two_blocks + spread.ends
    return spread.pieces - spread.shared_pieces + spread.gathered


def _sequence_bytes(run: Run, spread: Spread) -> float:
    """Of what attention holds of other devices' tokens; with heads nothing beyond its own share of activations."""
    own, cfg = spread.own_part, run.model
    token = float(own.samples_per_micro_batch * own.seq_len * cfg.head_dim)
    keys = 2.0 * cfg.num_kv_heads * token * DTYPES[run.precision].itemsize
    ways = [spread.context_way(block.self_attn) for block in spread.model.blocks]
    # a layer that is computed again holds them meanwhile
    held = [
        kind != "block" and way.startswith("gather") for way, kind in zip(ways, own.recompute_by_block(), strict=True)
    ]
    gathered = (run.mesh.cp - 1) * keys * max(sum(held) * spread.layers * spread.in_flight, 1.0)
    ring = 2 * keys + 4.0 * (cfg.num_heads + 2 * cfg.num_kv_heads) * token
    return max(gathered if any(way.startswith("gather") for way in ways) else 0.0, ring if "ring" in ways else 0.0)


def _exchange_bytes(run: Run, spread: Spread) -> float:
    """Of rows between devices: for each layer those that arrived, and at one layer both ways of both directions."""
    own = spread.own_part
    room = 1.0 if own.model.moe.routing == "balanced" else ROOM
    tokens = own.samples_per_micro_batch * own.seq_len
    rows = min(spread.rows_per_pair() * room, 1.0) * tokens * run.mesh.ep
    row_bytes = run.model.model_dim * DTYPES[run.precision].itemsize
    kept = 1 - own.recompute_by_block().count("block") / run.model.num_layers
    layers = kept * spread.layers * run.model.num_layers * spread.in_flight
    return rows * row_bytes * (layers + 4)
