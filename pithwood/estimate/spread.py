"""How a run's mesh divides its model and its samples: what the fullest process of a mesh has of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pithwood.attention.full import FullAttention
from pithwood.attention.projections import HeadsMixer
from pithwood.estimate.work import meta_model
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.layer import MoELayer
from pithwood.parallel.config import MeshConfig
from pithwood.run import Run


@dataclass(frozen=True)
class Spread:
    """The share of the fullest process of the run's mesh; numbers of parameters are of its stages, all experts whole
    unless said otherwise.
    """

    mesh: MeshConfig
    model: Qwen3MoE
    """Of all layers, without memory."""
    own: Run
    """The run of one process: its samples, whole, and all layers."""
    micro_batches: int
    layers: float
    """Of its stages, the most that any process has, as a share of the model's."""
    dense: float
    """Parameters of its stages but for the experts, with embedding and head, of which one is on it if pp > 1."""
    experts: float
    """Parameters of all experts of its stages."""
    block_dense: float
    """Parameters of the largest block but for its experts."""
    block_experts: float

    @staticmethod
    def of(run: Run) -> Spread:
        """The share of a run that `Run.validate` has accepted."""
        mesh, model = run.mesh, meta_model(run)
        own = replace(run, mesh=MeshConfig())
        if mesh.size > 1:
            stage = run.stages()[0]
            own = replace(
                own,
                seq_len=stage.seq_len,
                samples_per_step=stage.samples_per_step // mesh.data_size,
                samples_per_micro_batch=stage.samples_per_batch // mesh.data_size,
                phases=tuple(replace(phase, seq_len=None) for phase in run.phases[:1]),
            )
        stages = mesh.layers_of_stages(run.model.num_layers)
        counts = [sum(len(stages[stage]) for stage in mesh.stages_of_process(rank)) for rank in range(mesh.pp)]
        layers = max(counts) / run.model.num_layers
        blocks = [(_size(block), _size(block.mlp.experts) if isinstance(block.mlp, MoELayer) else 0.0)
                  for block in model.blocks]  # fmt: skip
        inside, experts = sum(whole for whole, _ in blocks), sum(part for _, part in blocks)
        ends = (_size(model) - inside) / (1 if mesh.pp == 1 else 2)
        return Spread(
            mesh, model, own, own.samples_per_step // own.samples_per_micro_batch, layers,
            (inside - experts) * layers + ends, experts * layers,
            max(whole - part for whole, part in blocks), max(part for _, part in blocks),
        )  # fmt: skip

    @property
    def shards(self) -> int:
        """Processes that divide dense weights."""
        return self.mesh.dp_shard * self.mesh.cp

    @property
    def own_part(self) -> Run:
        """The same with its part of each sample alone."""
        return replace(self.own, seq_len=self.own.seq_len // self.mesh.cp)

    @property
    def params(self) -> float:
        return self.dense + self.experts

    @property
    def pieces(self) -> float:
        """Parameters that the process keeps."""
        return self.params / self.shards

    @property
    def gathered(self) -> float:
        """Parameters of its stages that it has only while they are gathered: those that other processes share."""
        return self.dense + (self.experts / self.mesh.ep if self.shards > self.mesh.ep else 0.0)

    @property
    def shared_pieces(self) -> float:
        """Of the parameters that the process keeps, those whose whole it gathers."""
        return (self.dense + (self.experts if self.shards > self.mesh.ep else 0.0)) / self.shards

    @property
    def ends(self) -> float:
        """Parameters of embedding, final norm and head that it gathers, where blocks are of one size."""
        return max(self.dense - self.block_dense * self.layers * self.model.cfg.num_layers, 0.0)

    @property
    def two_blocks(self) -> float:
        """The same of the two largest blocks: one at work, one on its way."""
        return self._of_blocks(2)

    @property
    def blocks_of_passes(self) -> float:
        """The same of the blocks whose weights a pass needs at a time, or two passes in turns."""
        return self._of_blocks(4 if self.mesh.overlap == "pairs" else 2)

    def _of_blocks(self, count: int) -> float:
        experts = self.block_experts / self.mesh.ep if self.shards > self.mesh.ep else 0.0
        return min(count * (self.block_dense + experts), self.gathered)

    @property
    def in_flight(self) -> float:
        """Micro-batches whose activations the first process of the pipeline holds at most, all its layers counted."""
        mesh = self.mesh
        if mesh.pp == 1:
            return self._pair_in_flight if mesh.overlap == "pairs" else 1.0
        most = float(mesh.pp)
        if mesh.schedule == "interleaved":
            most += (mesh.pp - 1) / mesh.stages_per_process
        elif mesh.schedule == "dualpipe_v":
            most += 0.5
        return min(most, float(self.micro_batches))

    @property
    def _pair_in_flight(self) -> float:
        """Of a forward and a backward pass in turns, a part each: what one has begun and the other has not ended."""
        blocks = self.model.blocks
        sparse = [layer for layer, block in enumerate(blocks) if isinstance(block.mlp, MoELayer)]
        # a part ends where tokens leave for the experts of a layer, and where they leave for home
        begun = [layer + 1 for layer in sparse for _ in range(2)] + [len(blocks)]
        return max(one + other for one, other in zip(begun, reversed(begun), strict=True)) / len(blocks)

    def context_way(self, mixer: object) -> str:
        """How a layer's attention meets the tokens of other processes: none, heads, ring, gather, or "gather, zigzag",
        which is full attention's. A window, which fetches few keys, counts as gather.
        """
        mesh, full = self.mesh, isinstance(mixer, FullAttention)
        if mesh.cp == 1 or not isinstance(mixer, HeadsMixer):
            return "none"
        if mesh.context in ("auto", "heads") and self.own.model.num_kv_heads % mesh.cp == 0:
            return "heads"
        if full and mesh.context != "gather":
            return "ring"
        return "gather, zigzag" if full else "gather"

    def rows_per_pair(self) -> float:
        """Rows that a token sends to each process of its expert group, on average: one if that has an expert of it."""
        cfg, ep = self.own.model.moe, self.mesh.ep
        here = cfg.num_experts // ep
        if cfg.routing == "balanced":
            # k neighbours of the circle of experts, from k times the token's number on
            firsts = [(token * cfg.top_k) % cfg.num_experts for token in range(cfg.num_experts)]
            owners = [len({(first + j) % cfg.num_experts // here for j in range(cfg.top_k)}) for first in firsts]
            return sum(owners) / len(owners) / ep
        away = 1.0
        for slot in range(cfg.top_k):
            away *= max(cfg.num_experts - here - slot, 0) / (cfg.num_experts - slot)
        return 1 - away


def _size(module: object) -> float:
    return float(sum(param.numel() for param in module.parameters()))  # type: ignore[attr-defined]
