"""The least work that a training step needs, by part of the step, and the least time that it takes on a device.

Each part is a list of pieces; a piece takes the longer of its FLOPs at the matmul peak and its bytes at the copy peak,
pieces follow one another. Bytes are those that must cross memory however well a kernel is fused: weights once in each
direction and micro-batch, fp32 gradients added to once in each micro-batch, inputs and outputs of each product once.

Legend: T packed tokens, D model width, H query heads, G KV heads, K head dim, E experts, F expert width, k experts per
token, X vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pithwood.attention.base import Mixer, MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBA, MoBAConfig
from pithwood.attention.projections import HeadsMixer
from pithwood.models.qwen3_moe import Block, Qwen3MoE
from pithwood.moe.experts import DenseMLP
from pithwood.observe.metrics import HOPPER_COPY_BYTES, HOPPER_MEASURED_FLOPS
from pithwood.observe.step_parts import PARTS
from pithwood.ops.packing import Packing
from pithwood.optim.config import STATE_DTYPES, MuonConfig
from pithwood.optim.groups import MATRIX_KINDS
from pithwood.optim.muon import resolve_ns_dtype
from pithwood.parallel.mesh import coordinates
from pithwood.run import DTYPES, Run

TRAINING = 3.0
"""FLOPs of a matrix product and its two backward products, relative to the forward one."""
GATE_AND_UP = 2 / 3
"""FLOPs of an expert's first product, relative to both."""
ATTENTION_TRAINING = 3.5
"""The same for attention, which cannot keep its scores: five products backward, two forward."""
NEWTON_SCHULZ_PRODUCTS = (3.0, 1.0)
"""FLOPs of a Newton-Schulz round on an [r, c] matrix, r <= c, in units of r^2 c and of r^3: X X^T and its square are
symmetric, half a product each."""


@dataclass(frozen=True)
class Peaks:
    """What a device can do at most."""

    flops_per_s: float = HOPPER_MEASURED_FLOPS
    """Matrix products: bf16 ones, or those of the run's dtype where the peaks were measured for one run."""
    bytes_per_s: float = HOPPER_COPY_BYTES
    """Read and written."""
    fp32_flops_per_s: float | None = None
    """fp32 matrix products; None: as many as of the others."""


@dataclass(frozen=True)
class Piece:
    """Work that can run as one kernel at best."""

    what: str
    flops: float = 0.0
    bytes: float = 0.0
    fp32: bool = False
    """Whether its products are fp32 ones."""

    def floor_s(self, peaks: Peaks) -> float:
        products = peaks.fp32_flops_per_s if self.fp32 else None
        return max(self.flops / (products or peaks.flops_per_s), self.bytes / peaks.bytes_per_s)


Work = dict[str, list[Piece]]
"""Pieces by part of the step."""


def floors_ms(work: Work, peaks: Peaks) -> dict[str, float]:
    """Least ms of each part."""
    return {part: 1e3 * sum(piece.floor_s(peaks) for piece in pieces) for part, pieces in work.items()}


def meta_model(run: Run) -> Qwen3MoE:
    """The model of the run's first phase, without memory."""
    with torch.device("meta"):
        return Qwen3MoE(dataclasses.replace(run.model, attention=run.phase(0).attention))


def attention_op(attention: MixerConfig | Sequence[MixerConfig]) -> str:
    """What results files call the attention of a model: full, moba, another mixer's class name, or mixed."""
    kinds = {type(attention)} if isinstance(attention, MixerConfig) else set(map(type, attention))
    if len(kinds) > 1:
        return "mixed"
    (kind,) = kinds
    names = {FullAttentionConfig: "full", MoBAConfig: "moba"}
    return names.get(kind, kind.__name__)


def step_flops(run: Run, model: Qwen3MoE | None = None) -> float:
    """FLOPs that MFU counts for one step of the run's first phase, each sample one document: 3 x Cost.model_flops.

    model  what `meta_model` returns, made here if not given
    """
    stage, model = run.stages()[0], model or meta_model(run)
    return TRAINING * stage.samples_per_step * model.cost(Packing.from_lengths([stage.seq_len])).model_flops


@dataclass(frozen=True)
class Stages:
    """What a process of a pipeline has of a model."""

    layers: frozenset[int]
    first: bool
    """Whether the embedding is there."""
    last: bool
    """Whether the last norm and the head are there."""

    @staticmethod
    def of(run: Run, rank: int) -> Stages:
        """Of a process of the run's mesh; in one without a pipeline everything."""
        mesh = run.mesh
        mine = mesh.stages_of_process(coordinates(mesh, rank)[0])
        layers = mesh.layers_of_stages(run.model.num_layers)
        return Stages(frozenset(layer for stage in mine for layer in layers[stage]), 0 in mine, len(layers) - 1 in mine)

    def has(self, name: str) -> bool:
        """Whether a parameter is there."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None:
            return int(layer[1]) in self.layers
        return self.first if name.startswith("model.embed_tokens.") else self.last


def step_work(run: Run, model: Qwen3MoE | None = None, stages: Stages | None = None) -> Work:
    """The work of one optimizer step of the run's first phase, forward, backward and update, each sample one document.

    model   what `meta_model` returns, made here if not given
    stages  the part of the model whose work is asked for, of all samples; None: all of it
    """
    model = meta_model(run) if model is None else model
    if stages is None:
        stages = Stages(frozenset(range(run.model.num_layers)), True, True)
    stage = run.stages()[0]
    micro = stage.samples_per_step // stage.samples_per_batch
    # samples of one length cost the same: one is priced and multiplied
    sample = Packing.from_lengths([stage.seq_len])
    samples, size = stage.samples_per_step, DTYPES[run.precision].itemsize
    work: Work = {part: [] for part in PARTS}
    # layers of one kind do the same work, and a long sample takes milliseconds to price
    known: dict[tuple[MixerConfig, bool], Work] = {}
    for layer, (block, mixer) in enumerate(zip(model.blocks, model.cfg.mixers(), strict=True)):
        if layer not in stages.layers:
            continue
        kind = mixer, layer in model.cfg.dense_layers
        if kind not in known:
            known[kind] = {part: [] for part in PARTS}
            _add_mixer(known[kind], block, sample, samples, micro, size)
            _add_mlp(known[kind], block, run, samples * stage.seq_len, micro, size)
        for part, pieces in known[kind].items():
            work[part] += pieces
    cfg, tokens = run.model, samples * stage.seq_len
    row = float(tokens * cfg.model_dim * size)
    # two norms a block and the last: read and write forward, backward reads x and dy and writes dx; the residual stream
    # is read and written beside each
    work["dense"].append(Piece("norms and residuals", bytes=(2 * len(stages.layers) + stages.last) * 7 * row))
    if stages.first:
        work["dense"].append(Piece("embedding", bytes=4 * row))
    if stages.last:
        head = cfg.vocab_size * cfg.model_dim
        work["head and loss"].append(
            Piece("head", TRAINING * 2.0 * tokens * head, _weight_bytes(head, micro, size) + 3 * row)
        )
    if run.precision == "fp32":
        work = {part: [dataclasses.replace(piece, fp32=True) for piece in pieces] for part, pieces in work.items()}
    work["optimizer"] += _update(run, model, size, stages)
    return work


def repeated(run: Run, stages: Stages | None = None) -> dict[str, float]:
    """Work of each part relative to its floor where the run's settings let the backward pass compute things again.

    A block that is recomputed whole goes forward once more, and so do the experts where chunks of them are; where both
    come together, once. Nobody reads the value of that pass: the experts' second product is left out, unless compiled
    stages make it, and the sums over experts are. What recompute=selective repeats is not counted. stages: of whose
    blocks; None: of all.
    """
    blocks = run.recompute_by_block()
    if stages is not None:
        blocks = tuple(blocks[layer] for layer in sorted(stages.layers))
    share = blocks.count("block") / len(blocks)
    cfg, stage = run.model.moe, run.stages()[0]
    tokens = stage.samples_per_batch * stage.seq_len // (run.mesh.data_size * run.mesh.cp)
    chunks = cfg.chunk_recompute and 0 < cfg.chunk_tokens < tokens
    again = 1.0 if chunks else share
    routed = cfg.top_k * cfg.expert_dim / (cfg.top_k * cfg.expert_dim + cfg.shared_width)
    experts = again * routed * (1.0 if run.compile else GATE_AND_UP) + share * (1 - routed)
    product = (TRAINING + share) / TRAINING
    return {
        "attention": (ATTENTION_TRAINING + share) / ATTENTION_TRAINING,
        "experts": (TRAINING + experts) / TRAINING,
        # of four passes over a token's rows, copies and sums both ways, the first is made again
        "router and dispatch": 1 + again / 4,
        "dense": product,
    }


def _weight_bytes(params: float, micro: int, size: int) -> float:
    """Traffic of a weight over the step: read forward and backward, its fp32 gradient read and written."""
    return params * micro * 2 * size + params * (8 * micro - 4)


def _add_mixer(work: Work, block: Block, sample: Packing, samples: int, micro: int, size: int) -> None:
    assert isinstance(block.self_attn, Mixer)
    mixer = copy.copy(block.self_attn)
    mixer.activation_bytes = size
    forward = mixer.cost(sample).model_flops * samples
    tokens = samples * sample.num_queries
    params = float(sum(p.numel() for p in mixer.parameters() if p.ndim == 2))
    if not isinstance(mixer, HeadsMixer):  # nothing is known but its cost
        work["attention"].append(Piece(type(mixer).__name__, TRAINING * forward, _weight_bytes(params, micro, size)))
        return
    projections = mixer.projection_cost(sample).model_flops * samples
    s = mixer.shape
    channels = tokens * (s.num_heads + s.num_kv_heads) * s.head_dim * size
    # q, k, v and o once forward; q, k, v, o, dO, dq, dk and dv backward
    work["attention"].append(Piece("attention", ATTENTION_TRAINING * (forward - projections), 6.0 * channels))
    if isinstance(mixer, MoBA):
        blocks = sample.num_queries / mixer.config.block_size
        gate = s.num_heads * s.head_dim * tokens * blocks  # causal half of 2 FLOPs for each query and block mean
        work["attention"].append(Piece("gate", gate, float(channels)))
    row = tokens * s.model_dim * size
    work["dense"].append(
        Piece(
            "projections", TRAINING * projections, _weight_bytes(params, micro, size) + 3.0 * (2 * row + 2 * channels)
        )
    )
    if s.qk_norm or mixer.rope:
        work["dense"].append(Piece("head norms and rotary", bytes=5.0 * channels))


def _add_mlp(work: Work, block: Block, run: Run, tokens: int, micro: int, size: int) -> None:
    dim = run.model.model_dim
    row = float(tokens * dim * size)
    if isinstance(block.mlp, DenseMLP):
        width = run.model.dense_dim
        flops = TRAINING * 6.0 * tokens * dim * width
        traffic = _weight_bytes(3.0 * dim * width, micro, size) + 3.0 * (2 * row + 3.0 * tokens * width * size)
        work["dense"].append(Piece("dense layer", flops, traffic))
        return
    cfg = block.mlp.cfg
    pairs = tokens * cfg.top_k
    params = 3.0 * dim * (cfg.num_experts * cfg.expert_dim + cfg.shared_width)
    flops = TRAINING * 6.0 * dim * (pairs * cfg.expert_dim + tokens * cfg.shared_width)
    rows = pairs * (2.0 * dim + 3.0 * cfg.expert_dim) + tokens * (2.0 * dim + 3.0 * cfg.shared_width)
    work["experts"].append(Piece("experts", flops, _weight_bytes(params, micro, size) + 3.0 * rows * size))
    router = TRAINING * 2.0 * tokens * dim * cfg.num_experts
    work["router and dispatch"].append(Piece("router", router, 3 * row + 5 * 4.0 * tokens * cfg.num_experts))
    # forward the k outputs of a token are read and their sum is written, backward the k gradients of its input
    work["router and dispatch"].append(Piece("sums over experts", bytes=2 * row * (cfg.top_k + 1)))


@dataclass(frozen=True)
class _Updated:
    """Elements that an update changes, and the FLOPs of its Newton-Schulz."""

    matrices: float
    """Of Muon's."""
    others: float
    """Of AdamW's."""
    orthogonal_flops: float

    @staticmethod
    def of(run: Run, model: Qwen3MoE, stages: Stages) -> _Updated:
        muon, roles = run.optim if isinstance(run.optim, MuonConfig) else None, model.parameter_roles()
        orthogonal = matrices = others = 0.0
        for name, param in model.named_parameters():
            if not stages.has(name):
                continue
            role = roles[name]
            if muon is None or role.kind not in MATRIX_KINDS:
                others += param.numel()
                continue
            rows, cols = param.shape[-2:]
            count, rows, cols = role.matrix_shape or (param.numel() // (rows * cols), rows, cols)
            short, long = min(rows, cols), max(rows, cols)
            square, cube = NEWTON_SCHULZ_PRODUCTS
            orthogonal += muon.ns_steps * count * (square * short * short * long + cube * short**3)
            matrices += param.numel()
        return _Updated(matrices, others, orthogonal)


def state_bytes(run: Run, model: Qwen3MoE, stages: Stages) -> float:
    """Bytes of the optimizer state of the stages' parameters: momentum, and AdamW's two moments."""
    updated = _Updated.of(run, model, stages)
    moments = updated.others * 2 * STATE_DTYPES[run.optim.adam_state_dtype].itemsize
    if not isinstance(run.optim, MuonConfig):
        return moments
    return moments + updated.matrices * STATE_DTYPES[run.optim.momentum_dtype].itemsize


def _update(run: Run, model: Qwen3MoE, size: int, stages: Stages) -> list[Piece]:
    """Norm and update of every parameter that trains."""
    updated, kept = _Updated.of(run, model, stages), size if size < 4 else 0
    pieces = [Piece("gradient norm", bytes=4.0 * (updated.matrices + updated.others))]
    if isinstance(run.optim, MuonConfig):
        # weight and momentum read and written, gradient read, a narrow copy of the weight written
        pieces.append(Piece("momentum and weights", bytes=updated.matrices * (20.0 + kept)))
        # as on a GPU, whatever machine asks
        fp32 = resolve_ns_dtype(run.optim.ns_dtype, torch.device("cuda")) == torch.float32
        pieces.append(Piece("Newton-Schulz", flops=updated.orthogonal_flops, fp32=fp32))
    pieces.append(Piece("AdamW", bytes=updated.others * (28.0 + kept)))
    return pieces
