"""What a run is: the full tree of settings that a recipe returns, and the rules that hold between them.

Each part's own settings live beside the code that reads them; here are those of the training loop.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch

from pithwood.attention.base import MixerConfig
from pithwood.data.curriculum import Stage, check_lengths
from pithwood.data.mixture import MixtureConfig
from pithwood.data.prepare import CorpusConfig
from pithwood.models.qwen3_moe import Qwen3MoEConfig
from pithwood.models.recompute import Recompute
from pithwood.models.stages import check_compiler
from pithwood.objectives import NextToken, Objective
from pithwood.observe.sinks import LoggingConfig
from pithwood.observe.spikes import SpikeConfig
from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.parallel.config import MeshConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Activation dtype of each `precision`."""


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with settings of its own; parameters and optimizer state are kept by name across phases."""

    until_step: int
    """First step that no longer belongs to this phase; the last phase must reach `steps`."""
    attention: MixerConfig | tuple[MixerConfig, ...] | None = None
    """Token mixers during this phase; null keeps those of the model."""
    trainable: tuple[str, ...] = ("*",)
    """Globs of parameter names that are trained; a leading ! excludes. The rest is frozen."""
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Learning-rate factors by glob of parameter names."""
    objective: Objective | None = None
    """What this phase minimises; null keeps the run's objective."""
    seq_len: int | None = None
    """Tokens per sample during this phase; null keeps the run's. The tokens of a step and of a micro-batch stay what
    they are: half the length, twice the samples. It divides the longest seq_len of the run."""
    weights: dict[str, float] | None = None
    """Shares of the samples by part of the mixture during this phase, one for every part, 0 or more; null keeps those
    of `data`."""


@dataclass(frozen=True)
class ActivePhase:
    """The settings of model and optimizer in a phase, nothing left open; those of the data are a `Stage`."""

    attention: MixerConfig | tuple[MixerConfig, ...]
    trainable: tuple[str, ...]
    lr_scales: dict[str, float]
    objective: Objective


@dataclass(frozen=True)
class Run:
    """Everything that determines a training run."""

    name: str
    """Recipe name; first part of the run folder's name."""
    model: Qwen3MoEConfig
    """Architecture."""
    data: CorpusConfig | MixtureConfig
    """Corpus and tokenizer, or a mixture of corpora under one tokenizer."""
    optim: MuonConfig | AdamWConfig
    """Optimizer, schedule, clipping and weight averaging."""
    steps: int
    """Optimizer steps in all; extending a run by raising it resumes from its last checkpoint."""
    seq_len: int
    """Tokens per sample, at least 2; attention never crosses a sample or a document."""
    samples_per_step: int
    """Samples per optimizer step."""
    samples_per_micro_batch: int
    """Samples per forward and backward pass, of all processes together; divides samples_per_step. It changes no
    gradient but that of balance losses over micro_batch or global_batch, which see one micro-batch at a time."""
    objective: Objective = field(default_factory=NextToken)
    """What is minimised."""
    phases: tuple[Phase, ...] = ()
    """Settings that change with the step, in order of until_step; empty: one phase."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Activation dtype; master weights, gradients, optimizer state and reductions are fp32 in both."""
    recompute: Recompute | tuple[Recompute, ...] = "none"
    """What the backward pass computes again instead of keeping it, for all blocks or one entry per block. none:
    nothing. selective: what is cheap, the outputs of norms and the rows that experts read. block: everything but the
    block's input and its decisions (which keys, which experts), for one forward pass more. It changes no digit."""
    offload_activations: bool = False
    """Keep the inputs of blocks with recompute=block in host memory between forward and backward pass; GPU only."""
    keep_weight_copies: Literal["auto", "always", "never"] = "auto"
    """Whether bf16 copies of the weights stay on the device, renewed after each update, instead of being cast at every
    use: 2 bytes per parameter against time. auto: on a GPU, with precision=bf16, if they fit. It changes no digit."""
    compile: bool = False
    """Compile the stages of a block by torch.compile, instead of running the kernels that were written for them. It
    rounds differently."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the run is spread over processes. It changes no digit but by rounding."""
    seed: int = 0
    """Seed of initial weights and of the sample order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a CUDA GPU if there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice. Losses repeat to the last digit only with the same number."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where the curves go besides the console and events.jsonl."""
    spikes: SpikeConfig | None = field(default_factory=SpikeConfig)
    """What the event log tells about steps out of the ordinary: batches, and norms by layer; null neither looks for
    them nor measures norms."""
    log_every: int = 10
    """Steps between log lines; device values are read only then."""
    validate_every: int = 200
    """Steps between validations; the last step always validates."""
    validation_samples: int = 64
    """Validation samples used during training, 0 for all; the last validation uses all."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always saves."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    max_skipped_steps: int = 5
    """Non-finite steps in a row after which the run stops."""
    sample_prompts: tuple[str, ...] = ('"""', "import os\n", "class Queue:\n    def __init__(self")
    """Prompts that are continued in sample.txt at the end."""
    sample_tokens: int = 120
    """Tokens generated for each prompt."""

    def validate(self) -> None:
        """Raise ValueError in the words of the configuration if parts contradict each other."""
        for name in ("steps", "seq_len", "samples_per_step", "samples_per_micro_batch", "log_every", "validate_every",
                     "checkpoint_every", "keep_checkpoints", "max_skipped_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name}={getattr(self, name)} must be below 2**31 = {2**31}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} leaves nothing to attend to; give at least 2 tokens per sample")
        tokens = self.seq_len * self.samples_per_micro_batch
        if tokens >= 2**31:
            raise ValueError(
                f"seq_len={self.seq_len} x samples_per_micro_batch={self.samples_per_micro_batch} are {tokens} tokens; "
                f"a micro-batch holds fewer than 2**31 = {2**31}; lower one of them"
            )
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name={self.name!r} becomes a folder's name; use letters, digits, '_', '-' and '.'")
        most = 4 * (os.cpu_count() or 1)
        if self.threads > most:
            raise ValueError(f"threads={self.threads} is far more than this machine's cores; at most {most}, or 0")
        for name in ("seed", "threads", "validation_samples", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.samples_per_step % self.samples_per_micro_batch:
            small = [n for n in range(1, math.isqrt(self.samples_per_step) + 1) if self.samples_per_step % n == 0]
            divisors = {*small, *(self.samples_per_step // n for n in small)}
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.samples_per_micro_batch))[:4])
            raise ValueError(
                f"samples_per_micro_batch={self.samples_per_micro_batch} must divide "
                f"samples_per_step={self.samples_per_step}; try one of {near}"
            )
        if self.model.vocab_size < self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} is smaller than data.vocab_size={self.data.vocab_size}; "
                "the embedding needs a row for every token"
            )
        if self.mesh.size > 1 and self.compile:
            raise ValueError("compile=true runs in one process; set compile=false, or all sizes of mesh to 1")
        if self.mesh.overlap == "pairs":
            self._check_pairs()
        layers = self.model.num_layers
        if not isinstance(self.recompute, str) and len(self.recompute) != layers:
            raise ValueError(
                f"recompute has {len(self.recompute)} entries but model.num_layers={layers}; "
                "give one for all blocks, or exactly one per block"
            )
        if self.offload_activations and "block" not in self.recompute_by_block():
            raise ValueError(
                "offload_activations=true moves the inputs of blocks that are computed again, and recompute="
                f"{self.recompute!r} has none; set recompute=block too (on a GPU), or offload_activations=false"
            )
        if self.keep_weight_copies == "always" and self.precision == "fp32":
            raise ValueError(
                "keep_weight_copies=always keeps copies in bf16, but precision=fp32 uses the weights as they are; "
                "set keep_weight_copies=auto or precision=bf16"
            )
        ends = [phase.until_step for phase in self.phases]
        if ends != sorted(set(ends)) or (ends and ends[0] < 1):
            raise ValueError(f"phases must have rising until_step of at least 1, given {ends}")
        if ends and ends[-1] < self.steps:
            raise ValueError(f"the last phase ends at step {ends[-1]} but steps={self.steps}; raise its until_step")
        for number in range(len(self.phases)):
            self._check_phase_data(number)
        check_lengths([stage.seq_len for stage in self.stages()])
        for stage in self.stages():
            self.mesh.check(
                num_layers=self.model.num_layers,
                num_experts=self.model.moe.num_experts,
                num_kv_heads=self.model.num_kv_heads,
                samples_per_step=stage.samples_per_step,
                samples_per_micro_batch=stage.samples_per_batch,
                seq_len=stage.seq_len,
                tied=self.model.tie_embeddings,
            )

    def _check_pairs(self) -> None:
        """What keeps the passes of a pair from pausing while tokens travel."""
        if "block" in self.recompute_by_block():
            raise ValueError(
                f"mesh.overlap=pairs hides exchanges between the parts of a block, and recompute={self.recompute!r} "
                "repeats them within; set recompute to none or selective in all blocks, or mesh.overlap=none"
            )
        tokens = self.samples_per_micro_batch * self.seq_len // (self.mesh.data_size * self.mesh.cp)
        if 0 < self.model.moe.chunk_tokens < tokens:
            raise ValueError(
                f"mesh.overlap=pairs hides the exchange of all {tokens} tokens that a process has of a micro-batch at "
                f"once, and model.moe.chunk_tokens={self.model.moe.chunk_tokens} exchanges them in parts; set "
                "model.moe.chunk_tokens=0 and a smaller samples_per_micro_batch, or mesh.overlap=none"
            )

    def _check_phase_data(self, number: int) -> None:
        """What a phase changes about the samples."""
        phase = self.phases[number]
        tokens = self.samples_per_micro_batch * self.seq_len
        if phase.seq_len is not None and phase.seq_len < 1:
            raise ValueError(f"phases.{number}.seq_len={phase.seq_len} must be at least 1")
        if phase.seq_len is not None and tokens % phase.seq_len:
            raise ValueError(
                f"phases.{number}.seq_len={phase.seq_len} does not divide the {tokens} tokens of a micro-batch "
                f"(samples_per_micro_batch={self.samples_per_micro_batch} of seq_len={self.seq_len}); "
                "change one of the three"
            )
        if phase.weights is not None:
            where = f"phases.{number}.weights"
            if not isinstance(self.data, MixtureConfig):
                raise ValueError(f"{where} needs parts, but data is one corpus; make it a MixtureConfig")
            self.data.shares(phase.weights, where)

    def recompute_by_block(self) -> tuple[Recompute, ...]:
        """One entry of `recompute` per block."""
        return (self.recompute,) * self.model.num_layers if isinstance(self.recompute, str) else self.recompute

    def phase_index(self, step: int) -> int:
        """Which phase a step belongs to; 0 in a run without phases."""
        return next((i for i, phase in enumerate(self.phases) if step < phase.until_step), max(len(self.phases) - 1, 0))

    def phase(self, step: int) -> ActivePhase:
        """The settings in force at a step, with the run's own where the phase leaves them open."""
        phase = self.phases[self.phase_index(step)] if self.phases else Phase(self.steps)
        return ActivePhase(
            self.model.attention if phase.attention is None else phase.attention,
            phase.trainable,
            phase.lr_scales,
            self.objective if phase.objective is None else phase.objective,
        )

    def stages(self) -> tuple[Stage, ...]:
        """The stretches of steps with one length and one mixture; phases that differ in neither are one stage."""
        stages: list[Stage] = []
        for phase in self.phases or (Phase(self.steps),):
            seq_len = self.seq_len if phase.seq_len is None else phase.seq_len
            stage = Stage(
                phase.until_step,
                seq_len,
                self.samples_per_step * self.seq_len // seq_len,
                self.samples_per_micro_batch * self.seq_len // seq_len,
                self.data.shares(phase.weights) if isinstance(self.data, MixtureConfig) else (Fraction(1),),
            )
            if stages and replace(stages[-1], until_step=stage.until_step) == stage:
                stages.pop()
            stages.append(stage)
        return tuple(stages)


LENGTH_AND_LOGGING = (
    "steps",
    "logging",
    "spikes",
    "log_every",
    "validate_every",
    "validation_samples",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "recompute",
    "offload_activations",
    "keep_weight_copies",
    "optim.offload_state",
    "mesh",
    "sample_prompts",
    "sample_tokens",
    "data.parts.*.max_epochs",
    "model.moe.save_rows",
    "model.moe.chunk_tokens",
    "model.moe.chunk_recompute",
)
"""Fields that do not change what a step computes: a run keeps its folder when they change."""


def pick_device(run: Run) -> torch.device:
    """The device that `run.device` means here; ValueError if it asks for a GPU that is not there."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda but torch sees no CUDA GPU; use device=cpu or device=auto, or install a CUDA build of torch"
        )
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(run.device)


def check_device_settings(run: Run, device: torch.device) -> None:
    """Raise ValueError for settings that have no meaning on the device that was picked."""
    if run.offload_activations and device.type == "cpu":
        raise ValueError(
            "offload_activations=true moves activations from a GPU to the host's memory, but the run is on the CPU, "
            "where they are already; set offload_activations=false"
        )
    if run.compile:
        check_compiler(device)
