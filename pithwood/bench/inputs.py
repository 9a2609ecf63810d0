"""Queries, keys and values to measure with: random, or those of a layer of a trained run on its own validation text.

Legend: T packed tokens, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pithwood.attention.moba import MoBA
from pithwood.attention.projections import HeadsMixer
from pithwood.bench.cases import Shape
from pithwood.checkpoint.load import load_checkpoint
from pithwood.data.batches import Batch, sequential_batches
from pithwood.data.mixture import corpora_of, open_data
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.ops.packing import Packing
from pithwood.run import Run
from pithwood.run_folder import find_checkpoint, load_run, model_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors and where its documents lie."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_o: Tensor
    """Gradient of the output; random normal values in all cases."""
    packing: Packing


def random_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Normal values, a function of the shape alone (and of the kind of device)."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(repr(shape).encode()))

    def normal(heads: int) -> Tensor:
        size = (shape.tokens, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=DTYPES[shape.dtype])

    q, grad_o = normal(shape.heads), normal(shape.heads)
    k, v = normal(shape.kv_heads), normal(shape.kv_heads)
    return Inputs(q, k, v, grad_o, Packing.from_lengths(shape.lengths, device=device))


@dataclass(frozen=True)
class TrainedRun:
    """A run's newest model and one batch of its validation text."""

    name: str
    """Folder name @ step."""
    run: Run
    model: Qwen3MoE
    batch: Batch
    dtype: torch.dtype


def load_trained(
    reference: str, runs_dir: Path, device: torch.device, samples: int, tell: Any = lambda line: None
) -> TrainedRun:
    """The run meant by RUN or RUN@STEP, with averaged weights if it has them, and its first validation samples (of
    a mixture, those of its first part).

    raises  ValueError if there is no such run or checkpoint, or its corpus cannot be had
    """
    path = find_checkpoint(reference, runs_dir)
    run = load_run(path.parent.parent)
    tensors, state = load_checkpoint(path)
    step = int(state["step"])
    model = model_of(run, step, tensors, averaged=True).to(device)
    corpus = next(iter(corpora_of(open_data(run.data, runs_dir / "corpora", tell)).values()))
    batches = sequential_batches(
        corpus, "validation", seq_len=run.seq_len, samples_per_batch=samples, max_samples=samples
    )
    # a CPU knows bf16, but not quickly
    dtype = torch.bfloat16 if run.precision == "bf16" and device.type == "cuda" else torch.float32
    name = f"{path.parent.parent.name}@{step}"
    return TrainedRun(name, run, model, next(iter(batches)).to(device), dtype)


def document_lengths(packing: Packing) -> tuple[int, ...]:
    """Lengths of the documents that hold tokens."""
    return tuple(length for length in packing.cu_q.diff().tolist() if length)


@torch.no_grad()
def layer_inputs(trained: TrainedRun, layers: list[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """(q [T, H, K], k [T, G, K], v [T, G, K]) of these layers, as their attention sees them.

    raises  ValueError for a layer that the model lacks or that is no attention with heads
    """
    blocks = trained.model.blocks
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = []
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"--layer {layer} does not exist; {trained.name} has layers 0 to {len(blocks) - 1}")
        mixer = blocks[layer].self_attn
        if not isinstance(mixer, HeadsMixer):
            raise ValueError(f"layer {layer} of {trained.name} is a {type(mixer).__name__}, which has no q, k, v heads")

        def keep(mixer: HeadsMixer, args: tuple[Any, ...], layer: int = layer) -> None:
            kept[layer] = mixer.project(*args)

        hooks.append(mixer.register_forward_pre_hook(keep))
    try:
        trained.model.hidden(trained.batch.columns["tokens"], trained.batch.packing, dtype=trained.dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def trained_shape(trained: TrainedRun, layer: int) -> Shape:
    """The shape of a layer's inputs; fp32 where the run computes in fp32."""
    cfg = trained.model.cfg
    dtype = next(name for name, value in DTYPES.items() if value == trained.dtype)
    return Shape(
        document_lengths(trained.batch.packing),
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.head_dim,
        dtype,
        "trained",
        trained.name,
        layer,
    )


def blocks_of(trained: TrainedRun, layer: int) -> tuple[int, int] | None:
    """(block size, top k) of a MoBA layer, None of others."""
    mixer = trained.model.blocks[layer].self_attn
    return (mixer.config.block_size, mixer.config.num_blocks) if isinstance(mixer, MoBA) else None


def trained_inputs(shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], device: torch.device) -> Inputs:
    """A layer's tensors with a random gradient of the output."""
    q, k, v = (x.contiguous() for x in qkv)
    generator = torch.Generator(device).manual_seed(shape.layer or 0)
    grad_o = torch.randn(q.shape, generator=generator, device=device, dtype=q.dtype)
    return Inputs(q, k, v, grad_o, Packing.from_lengths(shape.lengths, device=device))


def save_qkv(path: Path, trained: TrainedRun, layer: int, qkv: tuple[Tensor, ...]) -> Path:
    """Write a layer's q, k, v on the longest document of the batch as .npz; returns the path.

    The file holds q [L, H, K], k [L, G, K], v [L, G, K] as bf16 in uint16 words, the source's name and the layer.
    """
    cu = trained.batch.packing.cu_q.tolist()
    longest = max(range(len(cu) - 1), key=lambda n: cu[n + 1] - cu[n])
    rows = slice(cu[longest], cu[longest + 1])
    words = [x[rows].to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy() for x in qkv]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, q=words[0], k=words[1], v=words[2], source=np.array(trained.name), layer=np.array(layer))
    return path


@dataclass(frozen=True)
class SavedQKV:
    """One document's q, k, v of a layer of a trained model, in bf16 on the CPU."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: str
    layer: int

    def shape(self, length: int, sequences: int, dtype: str = "bf16") -> Shape:
        """`sequences` copies of the first `length` tokens; ValueError if the document is shorter."""
        tokens, heads, dim = self.q.shape
        if length > tokens:
            raise ValueError(f"--length {length} is more than the {tokens} tokens that the file of --trained holds")
        lengths = (length,) * sequences
        return Shape(lengths, heads, self.k.shape[1], dim, dtype, "trained", self.source, self.layer)

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        """The tensors of a shape that this made, with a random gradient of the output."""
        dtype, copies = DTYPES[shape.dtype], len(shape.lengths)
        taken = [x[: shape.length].to(device, dtype).repeat(copies, 1, 1) for x in (self.q, self.k, self.v)]
        return trained_inputs(shape, (taken[0], taken[1], taken[2]), device)


def load_qkv(path: Path) -> SavedQKV:
    """What `save_qkv` wrote; ValueError if the file is missing or something else."""
    try:
        with np.load(path) as file:
            q, k, v = (torch.from_numpy(file[name]).view(torch.bfloat16) for name in ("q", "k", "v"))
            return SavedQKV(q, k, v, str(file["source"]), int(file["layer"]))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold saved q, k, v ({error}); bench/routing.py writes such files") from None
