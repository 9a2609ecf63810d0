"""Muon: momentum whose update is orthogonalised, one logical matrix at a time, many matrices per kernel.

The result equals torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for every matrix apart. Parameters come as stacks
[M, R, C], so an ordinary weight is a stack of one, and the experts of a layer, or a fused projection, are views with
their own M.

Legend: M matrices of a stack, R rows, C columns, K min(R, C).

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is Scalable for
LLM Training", arXiv 2502.16982, section 2.2 (the update scale 0.2 * sqrt(max(R, C)) that lets AdamW's rate and decay
be kept).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NSDtype = Literal["auto", "fp32", "bf16"]
NS_DTYPES = ("auto", "fp32", "bf16")

# The quintic's coefficients and the guard of the norm, as in torch.optim.Muon.
QUINTIC = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7

# Elements orthogonalised at once. A CPU is fastest while a chunk's temporaries stay in a core's L2 cache (1 to 2 MiB);
# a GPU wants large batches, bounded by their temporaries (about 20 bytes per element).
CPU_CHUNK_ELEMENTS = 250_000
GPU_CHUNK_ELEMENTS = 1 << 26


def resolve_ns_dtype(ns_dtype: NSDtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which Newton-Schulz runs on this device.

    "auto" is bf16 where the hardware multiplies bf16 matrices at full speed (CUDA, CPUs with AMX) and fp32 elsewhere:
    other CPUs emulate bf16, several times slower than fp32. torch.optim.Muon takes bf16 everywhere.
    """
    if ns_dtype == "auto":
        fast_bf16 = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if fast_bf16 else torch.float32
    if ns_dtype not in NS_DTYPES:
        raise ValueError(f"ns_dtype={ns_dtype!r} must be one of {', '.join(NS_DTYPES)}")
    return torch.float32 if ns_dtype == "fp32" else torch.bfloat16


def orthogonalize(update_MRC: Tensor, ns_steps: int, dtype: torch.dtype) -> Tensor:
    """Return a nearly orthogonal matrix for each matrix of the stack: its singular values moved to about 0.7 to 1.2.

    update_MRC  [M, R, C] floating; not changed
    returns     [M, R, C] in `dtype`

    `ns_steps` rounds of X <- a X + (b G + c G^2) X with the Gram matrix G taken on the smaller side, K x K: the other
    side would cost more and give the same matrix. 2 K^2 (2 max(R, C) + K) FLOPs per matrix and round. The order of
    rounding follows torch.optim.Muon: cast, then norm and division in `dtype`.
    """
    a, b, c = QUINTIC
    x = update_MRC.to(dtype)
    num, rows, cols = x.shape
    tall = rows > cols
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=NORM_EPS)
    gram_MKK = x.new_empty(num, min(rows, cols), min(rows, cols))
    poly_MKK, out = torch.empty_like(gram_MKK), torch.empty_like(x)
    for _ in range(ns_steps):
        if tall:
            torch.bmm(x.mT, x, out=gram_MKK)
        else:
            torch.bmm(x, x.mT, out=gram_MKK)
        torch.baddbmm(gram_MKK, gram_MKK, gram_MKK, beta=b, alpha=c, out=poly_MKK)
        if tall:
            torch.baddbmm(x, x, poly_MKK, beta=a, out=out)
        else:
            torch.baddbmm(x, poly_MKK, x, beta=a, out=out)
        x, out = out, x
    return x


def update_scale(rows: int, cols: int) -> float:
    """Return the factor that gives an orthogonal [rows, cols] update the usual root mean square of AdamW's, 0.2."""
    return 0.2 * math.sqrt(max(rows, cols))


@dataclass
class MuonSlice:
    """A stack [M, R, C] of one parameter's matrices with what its update needs; fp32 views, changed in place."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    lr: float
    """Learning rate of this step, with the parameter's own scale in it."""
    weight_decay: float

    def split(self, max_matrices: int) -> list[MuonSlice]:
        if self.param.shape[0] <= max_matrices:
            return [self]
        parts = zip(*(t.split(max_matrices) for t in (self.param, self.grad, self.momentum)), strict=True)
        return [MuonSlice(p, g, m, self.lr, self.weight_decay) for p, g, m in parts]


def chunk_slices(slices: list[MuonSlice], max_elements: int) -> list[list[MuonSlice]]:
    """Gather slices of one matrix shape, in order, into chunks of at most `max_elements`, or of a single matrix."""
    by_shape: dict[tuple[int, int], list[MuonSlice]] = {}
    for item in slices:
        by_shape.setdefault((item.param.shape[1], item.param.shape[2]), []).append(item)
    chunks: list[list[MuonSlice]] = []
    for (rows, cols), items in by_shape.items():
        max_matrices = max(1, max_elements // (rows * cols))
        held = max_matrices
        for part in (part for item in items for part in item.split(max_matrices)):
            if held + part.param.shape[0] > max_matrices:
                chunks.append([])
                held = 0
            chunks[-1].append(part)
            held += part.param.shape[0]
    return chunks


def muon_update(
    slices: list[MuonSlice],
    *,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: torch.dtype,
    grad_scale: Tensor,
    ok: Tensor,
) -> None:
    """Take one Muon step in place on every slice; where `ok` is false parameters and momentum keep every bit.

    grad_scale  fp32 scalar on the device, multiplies the gradients (clipping)
    ok          bool scalar on the device

    Momentum is the running mean m <- m + (1 - momentum) (g - m) of torch.optim.Muon. Both writes go through a select
    on `ok`, not a product with it, since 0 * NaN is NaN. No host sync.
    """
    if not slices:
        return
    limit = GPU_CHUNK_ELEMENTS if slices[0].param.is_cuda else CPU_CHUNK_ELEMENTS
    for chunk in chunk_slices(slices, limit):
        updates: list[Tensor] = []
        for item in chunk:
            grad_MRC = item.grad * grad_scale
            mean_MRC = torch.lerp(item.momentum, grad_MRC, 1.0 - momentum)
            torch.where(ok, mean_MRC, item.momentum, out=item.momentum)
            updates.append((grad_MRC.lerp_(mean_MRC, momentum) if nesterov else mean_MRC).to(ns_dtype))
        ortho_MRC = orthogonalize(updates[0] if len(updates) == 1 else torch.cat(updates), ns_steps, ns_dtype)
        scale = update_scale(ortho_MRC.shape[1], ortho_MRC.shape[2])
        start = 0
        for item in chunk:
            stop = start + item.param.shape[0]
            moved_MRC = item.param * (1.0 - item.lr * item.weight_decay)
            moved_MRC.add_(ortho_MRC[start:stop], alpha=-item.lr * scale)
            torch.where(ok, moved_MRC, item.param, out=item.param)
            start = stop
