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

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.gram import gram, gram_polynomial, symmetric_pays
from pithwood.ops.triton_support import INSTALLED, triton_misfit
from pithwood.optim.offload import Residence, in_place
from pithwood.optim.rounding import RoundingKey, random_bits, round_to_bf16

NSDtype = Literal["auto", "fp32", "bf16"]
NS_DTYPES = ("auto", "fp32", "bf16")

# The quintic's coefficients and the guard of the norm, as in torch.optim.Muon.
QUINTIC = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7

CPU_CHUNK_ELEMENTS = 250_000
"""Elements orthogonalised at once on a CPU: fastest while a chunk's temporaries stay in a core's L2 cache (1 to 2 MiB).
"""
GPU_CHUNK_BYTES = 1 << 30
"""Bytes of temporaries that a GPU may take: it wants large batches, and at this size they fill it many times over."""


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


def orthogonalize_scaled(x_MRC: Tensor, scale_M: Tensor, ns_steps: int) -> Tensor:
    """As `orthogonalize` for s X, each matrix with its own s, without a pass that scales them; x may be overwritten.

    x_MRC    [M, R, C] contiguous
    scale_M  [M] fp32, the inverse norms
    returns  [M, R, C] in x's dtype

    The scale goes into the first round's Gram matrices and polynomials, and the a X of a round is a on the polynomial's
    diagonal: (a I + b G + c G^2) X is a single product that reads and writes each X once. Sums are rounded once, after
    the scale and the diagonal, so that one rounding of X is saved and one of the diagonal added.
    """
    num, rows, cols = x_MRC.shape
    tall, x = rows > cols, x_MRC
    gram_MKK = x.new_empty(num, min(rows, cols), min(rows, cols))
    poly_MKK, out = torch.empty_like(gram_MKK), torch.empty_like(x)
    for number in range(ns_steps):
        scale = scale_M if number == 0 else None
        gram(x, scale_M=scale, out_MKK=gram_MKK)
        gram_polynomial(gram_MKK, *QUINTIC, scale_M=scale, out_MKK=poly_MKK)
        torch.bmm(x if tall else poly_MKK, poly_MKK if tall else x, out=out)
        x, out = out, x
    return x


def update_scale(rows: int, cols: int) -> float:
    """Return the factor that gives an orthogonal [rows, cols] update the usual root mean square of AdamW's, 0.2."""
    return 0.2 * math.sqrt(max(rows, cols))


@dataclass
class MuonSlice:
    """A stack [M, R, C] of one parameter's matrices with what its update needs; views, changed in place."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    """fp32, or bf16 that is rounded by chance; it may lie in host memory."""
    lr: float
    """Learning rate of this step, with the parameter's own scale in it."""
    weight_decay: float
    copy: Tensor | None = None
    """The parameter's copy in another dtype, renewed with it."""
    key: RoundingKey = (0, 0)
    first: int = 0
    """The parameter's element that is this slice's first: with the key it decides how momentum is rounded."""

    def split(self, max_matrices: int) -> list[MuonSlice]:
        num, rows, cols = self.param.shape
        parts = []
        for start in range(0, num, max_matrices):
            cut = slice(start, start + max_matrices)
            parts.append(
                replace(
                    self,
                    param=self.param[cut],
                    grad=self.grad[cut],
                    momentum=self.momentum[cut],
                    copy=None if self.copy is None else self.copy[cut],
                    first=self.first + start * rows * cols,
                )
            )
        return parts


def matrices_per_chunk(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many [rows, cols] matrices are orthogonalised at once, at least one: see the constants above."""
    if device.type != "cuda":
        return max(1, CPU_CHUNK_ELEMENTS // (rows * cols))
    # X twice, Gram matrix and polynomial
    temporaries = 2 * (rows * cols + min(rows, cols) ** 2) * dtype.itemsize
    return max(1, GPU_CHUNK_BYTES // temporaries)


def chunk_slices(slices: list[MuonSlice], dtype: torch.dtype) -> list[list[MuonSlice]]:
    """Gather slices of one matrix shape, in order, into chunks of at most `matrices_per_chunk` matrices."""
    by_shape: dict[tuple[int, int], list[MuonSlice]] = {}
    for item in slices:
        by_shape.setdefault((item.param.shape[1], item.param.shape[2]), []).append(item)
    chunks: list[list[MuonSlice]] = []
    for (rows, cols), items in by_shape.items():
        max_matrices = matrices_per_chunk(rows, cols, dtype, items[0].param.device)
        held = max_matrices
        for part in (part for item in items for part in item.split(max_matrices)):
            if held + part.param.shape[0] > max_matrices:
                chunks.append([])
                held = 0
            chunks[-1].append(part)
            held += part.param.shape[0]
    return chunks


@dataclass(frozen=True)
class MuonRule:
    """What all matrices of a step share."""

    momentum: float
    nesterov: bool
    ns_steps: int
    ns_dtype: torch.dtype
    grad_scale: Tensor
    """fp32 scalar on the device, multiplies the gradients (clipping)."""
    ok: Tensor
    """Bool scalar on the device; where it is false, parameters and momentum keep every bit."""


def muon_update(
    slices: list[MuonSlice],
    rule: MuonRule,
    *,
    residence: Residence = in_place,
    impl: Literal["torch", "triton"] | None = None,
) -> None:
    """Take one Muon step in place on every slice.

    residence   brings each chunk's momentum to the device and back where it does not live there
    impl        see `uses_kernels`

    Momentum is the running mean m <- m + (1 - momentum) (g - m) of torch.optim.Muon. Both writes go through a select
    on `ok`, not a product with it, since 0 * NaN is NaN. No host sync.
    """
    if not slices:
        return
    fused = uses_kernels(slices[0].param, impl)
    chunks = chunk_slices(slices, rule.ns_dtype)
    for index, momenta in enumerate(residence([[item.momentum for item in chunk] for chunk in chunks])):
        update_chunk(chunks[index], momenta, rule, fused)


def uses_kernels(param: Tensor, impl: Literal["torch", "triton"] | None) -> bool:
    """Whether the element-wise work is fused into two passes; ValueError for an impl that does not fit.

    impl  "torch": plain operations. "triton": kernels, which on a GPU are told from torch's own writes only by whoever
          calls `torch.autograd.graph.increment_version`. None: "triton" on CUDA, "torch" elsewhere
    """
    check_impl(impl, ("torch", "triton"))
    misfit = triton_misfit(param)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    return impl == "triton" or (impl is None and param.is_cuda and INSTALLED)


def update_chunk(chunk: list[MuonSlice], momenta: list[Tensor], rule: MuonRule, fused: bool) -> None:
    """Update matrices of one shape together; `momenta` are those of the slices, on the device."""
    _, rows, cols = chunk[0].param.shape
    stops = list(itertools.accumulate(item.param.shape[0] for item in chunk))
    places = [slice(stop - item.param.shape[0], stop) for item, stop in zip(chunk, stops, strict=True)]
    if fused:
        from pithwood.optim.kernels_triton import norm_parts

        update_MRC = chunk[0].param.new_empty(stops[-1], rows, cols, dtype=rule.ns_dtype)
        squares_MP = chunk[0].param.new_empty(stops[-1], norm_parts(rows * cols))
        for item, held_MRC, place in zip(chunk, momenta, places, strict=True):
            draw_momentum_fused(item, held_MRC, rule, update_MRC[place], squares_MP[place])
        ortho_MRC = orthogonalize_fast(update_MRC, rule.ns_steps, squares_MP.sum(1))
    else:
        updates = [draw_momentum(item, held_MRC, rule) for item, held_MRC in zip(chunk, momenta, strict=True)]
        update_MRC = updates[0] if len(updates) == 1 else torch.cat(updates)
        ortho_MRC = orthogonalize(update_MRC, rule.ns_steps, rule.ns_dtype)
    for item, place in zip(chunk, places, strict=True):
        move_weights(item, ortho_MRC[place], update_scale(rows, cols), rule, fused)


def draw_momentum(item: MuonSlice, held: Tensor, rule: MuonRule) -> Tensor:
    """Draw the momentum, held on the device, towards the gradient; returns what is to be orthogonalised."""
    grad = item.grad * rule.grad_scale
    old = held.float()
    mean = torch.lerp(old, grad, 1.0 - rule.momentum)
    if held.dtype == torch.float32:
        torch.where(rule.ok, mean, held, out=held)
    else:
        # What bf16 holds already is rounded to itself: a skipped step changes nothing.
        bits = random_bits(held.numel(), item.key, item.first, held.device)
        held.copy_(round_to_bf16(torch.where(rule.ok, mean, old), bits))
    return (grad.lerp_(mean, rule.momentum) if rule.nesterov else mean).to(rule.ns_dtype)


def draw_momentum_fused(item: MuonSlice, held: Tensor, rule: MuonRule, update: Tensor, squares: Tensor) -> None:
    """As `draw_momentum` in one kernel, written to `update`; `squares` gets its squared norms in parts."""
    from pithwood.optim.kernels_triton import momentum_pass

    momentum_pass(
        item.grad.contiguous(),
        held,
        update,
        squares,
        momentum=rule.momentum,
        nesterov=rule.nesterov,
        grad_scale=rule.grad_scale,
        ok=rule.ok,
        key=item.key,
        first=item.first,
    )


def orthogonalize_fast(update_MRC: Tensor, ns_steps: int, square_M: Tensor | None = None) -> Tensor:
    """As `orthogonalize` in the update's dtype by the symmetric kernels where they pay; the update may be overwritten.

    square_M  [M] fp32: the squared norms, where they are known
    """
    if not symmetric_pays(update_MRC):
        return orthogonalize(update_MRC, ns_steps, update_MRC.dtype)
    if square_M is None:
        square_M = torch.linalg.vector_norm(update_MRC, dim=(1, 2), dtype=torch.float32).square_()
    return orthogonalize_scaled(update_MRC, square_M.sqrt_().clamp_(min=NORM_EPS).reciprocal_(), ns_steps)


def move_weights(item: MuonSlice, ortho: Tensor, scale: float, rule: MuonRule, fused: bool) -> None:
    """Decay and step along the orthogonal update, `scale` times; renew the copy."""
    decay, step_size = 1.0 - item.lr * item.weight_decay, item.lr * scale
    if fused:
        from pithwood.optim.kernels_triton import weights_pass

        weights_pass(item.param, ortho, item.copy, decay=decay, step_size=step_size, ok=rule.ok)
        return
    moved = (item.param * decay).add_(ortho, alpha=-step_size)
    torch.where(rule.ok, moved, item.param, out=item.param)
    if item.copy is not None:
        item.copy.copy_(item.param)
