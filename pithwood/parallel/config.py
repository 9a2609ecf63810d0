"""How a run is spread over processes: the sizes of the mesh, and the rules that hold between them.

A mesh changes no digit but by rounding: it is not part of what names a run, and a checkpoint of one mesh is read by any
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["1f1b", "interleaved", "zero_bubble_v", "dualpipe_v"]
Overlap = Literal["none", "pairs"]
Exchange = Literal["auto", "exact", "bounded"]
ContextExchange = Literal["auto", "heads", "gather", "ring"]


@dataclass(frozen=True)
class MeshConfig:
    """Processes = pp x dp_replicate x dp_shard x cp; ep divides dp_shard x cp and adds none."""

    pp: int = 1
    """Pipeline stages in a row, each with its own layers, at least 1."""
    dp_replicate: int = 1
    """Copies of the sharded model, each with its own samples; gradients are added up between them. At least 1."""
    dp_shard: int = 1
    """Processes with their own samples between which weights, gradients and optimizer state are divided, at least 1."""
    cp: int = 1
    """Processes that share the tokens of each sample, in contiguous parts; they divide weights too. At least 1."""
    ep: int = 1
    """Processes between which the experts of a layer are divided; divides dp_shard x cp and the number of experts."""
    schedule: Schedule = "1f1b"
    """Order of forward and backward passes with pp above 1. 1f1b: one run of layers per process. interleaved:
    `stages_per_process` runs each. zero_bubble_v and dualpipe_v: two each, laid out as a V; weight gradients fill the
    gaps, and dualpipe_v runs one micro-batch's exchange under another's compute."""
    stages_per_process: int = 2
    """Runs of layers per process of schedule=interleaved, at least 2; the V schedules have two."""
    layers_per_stage: tuple[int, ...] = ()
    """Layers of each stage in order, for uneven splits; empty divides them evenly, the first stages taking one more."""
    gather: Literal["step", "forward"] = "step"
    """How long gathered weights stay. step: from the first micro-batch to the last backward pass, two more passes over
    the network saved per micro-batch. forward: a layer's are dropped after its forward pass and after its backward
    pass."""
    reduce: Literal["step", "micro_batch"] = "step"
    """When gradients are added up between processes. step: once, with the last micro-batch; whole gradients of all
    layers are kept until then. micro_batch: after each, so that only shards are kept."""
    exchange: Exchange = "auto"
    """How tokens travel to their experts. exact: sizes are read on the host. bounded: buffers of a fixed size, nothing
    is read on the host, and a step that does not fit is done again with larger ones. auto: bounded on GPUs, exact on
    CPUs."""
    overlap: Overlap = "none"
    """What runs while tokens travel to their experts and back, without a pipeline. none: what the same micro-batch has
    to do meanwhile. pairs: another micro-batch, one's forward pass and the backward pass of the one before in turns;
    with ep above 1, pp=1 and two micro-batches or more, for the activations of about two layers more. In a pipeline
    schedule=dualpipe_v does so."""
    context: ContextExchange = "auto"
    """How attention sees other processes' tokens with cp above 1. heads: each process takes all tokens of some heads;
    cp divides num_kv_heads. gather: each takes the keys and values of all at once. ring: full attention takes those of
    one process after another, under the compute of the one before; any other (MoBA) does as with gather. auto: heads
    where they divide, else ring."""

    @property
    def size(self) -> int:
        """Processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp

    @property
    def data_size(self) -> int:
        """Processes that read samples of their own (each with its cp partners, and once per pipeline stage)."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_stages(self) -> int:
        """Stages that the layers are divided into."""
        if self.pp == 1:
            return 1
        return self.pp * {"1f1b": 1, "interleaved": self.stages_per_process}.get(self.schedule, 2)

    @property
    def least_micro_batches(self) -> int:
        """Micro-batches that a step needs."""
        if self.pp == 1:
            return 2 if self.overlap == "pairs" else 1
        return {"interleaved": self.pp, "dualpipe_v": 2 * self.pp}.get(self.schedule, 1)

    @property
    def pauses(self) -> bool:
        """Whether passes run in pairs, and pause where tokens travel to their experts and back."""
        return self.ep > 1 and (self.overlap == "pairs" if self.pp == 1 else self.schedule == "dualpipe_v")

    def __post_init__(self) -> None:
        for name in ("pp", "dp_replicate", "dp_shard", "cp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}={getattr(self, name)} must be at least 1")
        if (self.dp_shard * self.cp) % self.ep:
            raise ValueError(
                f"mesh.ep={self.ep} must divide mesh.dp_shard x mesh.cp = {self.dp_shard * self.cp}: experts are "
                f"divided between the processes of those two; lower mesh.ep, or try mesh.dp_shard={self.ep}"
            )
        if self.stages_per_process < 2:
            raise ValueError(f"mesh.stages_per_process={self.stages_per_process} must be at least 2; or schedule=1f1b")
        if self.overlap == "pairs":
            if self.pp > 1:
                raise ValueError(
                    f"mesh.overlap=pairs is for runs without a pipeline, and mesh.pp={self.pp}; in one "
                    "mesh.schedule=dualpipe_v runs passes in pairs: set that, or mesh.overlap=none"
                )
            if self.ep == 1:
                raise ValueError(
                    "mesh.overlap=pairs hides the exchange of tokens with their experts, and mesh.ep=1 has none; "
                    "set mesh.overlap=none, or divide the experts, for instance mesh.dp_shard=2 mesh.ep=2"
                )
        if self.layers_per_stage:
            if len(self.layers_per_stage) != self.num_stages:
                raise ValueError(
                    f"mesh.layers_per_stage has {len(self.layers_per_stage)} entries, but mesh.pp={self.pp} with "
                    f"schedule={self.schedule} makes {self.num_stages} stages; give one entry for each"
                )
            if min(self.layers_per_stage) < 1:
                raise ValueError(f"mesh.layers_per_stage={list(self.layers_per_stage)} has a stage without layers")

    def check(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_kv_heads: int,
        samples_per_step: int,
        samples_per_micro_batch: int,
        seq_len: int,
        tied: bool,
    ) -> None:
        """Raise ValueError in the words of the configuration if a run of these sizes does not fit the mesh."""
        stages, data = self.num_stages, self.data_size
        if stages > num_layers:
            other = "" if self.schedule == "1f1b" else " or choose schedule=1f1b, which makes one stage per process"
            raise ValueError(
                f"mesh.pp={self.pp} with schedule={self.schedule} makes {stages} stages, but the model has "
                f"{num_layers} layers; lower mesh.pp{other}"
            )
        if self.layers_per_stage and sum(self.layers_per_stage) != num_layers:
            raise ValueError(
                f"mesh.layers_per_stage={list(self.layers_per_stage)} adds up to {sum(self.layers_per_stage)}, but the "
                f"model has {num_layers} layers; give {stages} numbers that add up to {num_layers}"
            )
        if num_experts % self.ep:
            raise ValueError(f"mesh.ep={self.ep} must divide model.moe.num_experts={num_experts}")
        if samples_per_micro_batch % data:
            raise ValueError(
                f"samples_per_micro_batch={samples_per_micro_batch} are spread over {data} processes "
                f"(mesh.dp_replicate={self.dp_replicate} x mesh.dp_shard={self.dp_shard}), which must divide them; "
                f"set samples_per_micro_batch to a multiple of {data}"
            )
        if (samples_per_micro_batch // data * seq_len) % self.cp:
            raise ValueError(
                f"mesh.cp={self.cp} must divide the {samples_per_micro_batch // data * seq_len} tokens that a process "
                "would otherwise hold of a micro-batch; lower mesh.cp, or choose a seq_len that it divides"
            )
        if self.context == "heads" and num_kv_heads % self.cp:
            raise ValueError(
                f"mesh.context=heads needs mesh.cp={self.cp} to divide model.num_kv_heads={num_kv_heads}; "
                "set mesh.context=auto"
            )
        own_tokens = samples_per_micro_batch // data * seq_len // self.cp
        if self.cp > 1 and self.context == "ring" and own_tokens % 2:
            raise ValueError(
                f"mesh.context=ring needs an even number of tokens of a micro-batch on each process, not {own_tokens} "
                f"(mesh.cp={self.cp}): each takes one half early and one late; set mesh.context=gather"
            )
        if self.pp > 1 and tied:
            raise ValueError(
                "model.tie_embeddings=true makes the first and the last stage share a weight; "
                f"set it to false, or mesh.pp=1 (given {self.pp})"
            )
        micro_batches, least = samples_per_step // samples_per_micro_batch, self.least_micro_batches
        if micro_batches < least:
            asks = f"schedule={self.schedule}" if self.pp > 1 else "mesh.overlap=pairs"
            raise ValueError(
                f"{asks} needs at least {least} micro-batches per step with mesh.pp={self.pp}, "
                f"but samples_per_step={samples_per_step} / samples_per_micro_batch={samples_per_micro_batch} "
                f"are {micro_batches}; lower samples_per_micro_batch"
            )

    def layers_of_stages(self, num_layers: int) -> list[range]:
        """The layers of each stage, in order."""
        counts = list(self.layers_per_stage)
        if not counts:
            base, more = divmod(num_layers, self.num_stages)
            counts = [base + (stage < more) for stage in range(self.num_stages)]
        ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def stages_of_process(self, pp_rank: int) -> list[int]:
        """The stages that the pp_rank-th process of a pipeline holds, in the order of the layers."""
        if self.pp == 1:
            return [0]
        if self.schedule == "1f1b":
            return [pp_rank]
        if self.schedule == "interleaved":
            return [pp_rank + self.pp * turn for turn in range(self.stages_per_process)]
        return [pp_rank, 2 * self.pp - 1 - pp_rank]
