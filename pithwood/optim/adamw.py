"""AdamW with one fused pass over parameters, gradients and moments.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.triton_support import INSTALLED, triton_misfit
from pithwood.optim.offload import Residence, in_place
from pithwood.optim.rounding import RoundingKey, random_bits, round_to_bf16

LARGE = 1 << 20
"""Elements from which on a tensor on a GPU gets a launch of its own; smaller ones in fp32 share torch's."""
WINDOW_ELEMENTS = 1 << 26
"""Elements whose moments visit the device together where they live on the host: 512 MiB of fp32."""


@dataclass
class AdamWSlice:
    """A flat stretch of one parameter with what its update needs; contiguous, changed in place."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    """fp32, or bf16 that is rounded by chance, as the other moment; both may lie in host memory."""
    exp_avg_sq: Tensor
    count: Tensor
    """fp32 scalar on the device: the parameter's accepted updates before this step."""
    lr: float
    """Learning rate of this step, with the parameter's own scale in it."""
    weight_decay: float
    copy: Tensor | None = None
    """The parameter's copy in another dtype, renewed with it."""
    key: RoundingKey = (0, 0)
    first: int = 0
    """The parameter's element that is this slice's first: with the key it decides how moments are rounded."""

    def split(self, max_elements: int) -> list[AdamWSlice]:
        parts = []
        for start in range(0, self.param.numel(), max_elements):
            cut = slice(start, start + max_elements)
            parts.append(
                replace(
                    self,
                    param=self.param[cut],
                    grad=self.grad[cut],
                    exp_avg=self.exp_avg[cut],
                    exp_avg_sq=self.exp_avg_sq[cut],
                    copy=None if self.copy is None else self.copy[cut],
                    first=self.first + start,
                )
            )
        return parts


def adamw_update(
    slices: list[AdamWSlice],
    *,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor,
    ok: Tensor,
    residence: Residence = in_place,
    impl: Literal["torch", "triton"] | None = None,
) -> None:
    """Take one AdamW step in place on every slice; where `ok` is false nothing but the gradients changes by a bit.

    slices      one per parameter; gradients may come back scaled, counts one higher where `ok`
    grad_scale  fp32 scalar on the device, multiplies the gradients (clipping)
    ok          bool scalar on the device
    residence   brings moments to the device and back where they do not live there
    impl        "torch": its fused kernel. "triton": a launch per slice that neither writes gradients nor needs fp32
                moments; on a GPU it is told from torch's own writes only by whoever calls
                `torch.autograd.graph.increment_version`. None: on CUDA "triton" for large or bf16 state, else "torch"
    raises      ValueError for an impl that does not fit

    Equals torch.optim.AdamW. No host sync: scalars move on the device alone.
    """
    if not slices:
        return
    check_impl(impl, ("torch", "triton"))
    misfit = triton_misfit(slices[0].param)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    # A list, since one tensor for all would be read back to the host.
    torch._foreach_add_([item.count for item in slices], [ok.float()] * len(slices))
    if residence is in_place:
        _step(slices, betas, eps, grad_scale, ok, impl)
        return
    groups = _groups(slices)
    states = [[state for item in group for state in (item.exp_avg, item.exp_avg_sq)] for group in groups]
    for index, held in enumerate(residence(states)):
        moments = zip(groups[index], held[::2], held[1::2], strict=True)
        group = [replace(item, exp_avg=avg, exp_avg_sq=sq) for item, avg, sq in moments]
        _step(group, betas, eps, grad_scale, ok, impl)


def _step(
    slices: list[AdamWSlice],
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor,
    ok: Tensor,
    impl: Literal["torch", "triton"] | None,
) -> None:
    plain = []
    for item in slices:
        if impl == "triton" or (impl is None and _deserves_launch(item)):
            _triton_step(item, betas, eps, grad_scale, ok)
        else:
            plain.append(item)
    _torch_step(plain, betas, eps, grad_scale, ok)


def _deserves_launch(item: AdamWSlice) -> bool:
    return item.param.is_cuda and INSTALLED and (item.param.numel() >= LARGE or item.exp_avg.dtype != torch.float32)


def _groups(slices: list[AdamWSlice]) -> list[list[AdamWSlice]]:
    """The slices, cut and gathered into groups of at most WINDOW_ELEMENTS."""
    groups: list[list[AdamWSlice]] = []
    held = WINDOW_ELEMENTS
    for part in (part for item in slices for part in item.split(WINDOW_ELEMENTS)):
        if held + part.param.numel() > WINDOW_ELEMENTS:
            groups.append([])
            held = 0
        groups[-1].append(part)
        held += part.param.numel()
    return groups


def _triton_step(item: AdamWSlice, betas: tuple[float, float], eps: float, grad_scale: Tensor, ok: Tensor) -> None:
    from pithwood.optim.kernels_triton import adamw_pass

    # In fp64, as torch's kernel: 1 - beta2 alone may have lost four digits of fp32.
    count = item.count.double()
    corrections = torch.stack([1.0 - betas[0] ** count, (1.0 - betas[1] ** count).sqrt()]).float()
    adamw_pass(
        item.param,
        item.grad,
        item.exp_avg,
        item.exp_avg_sq,
        item.copy,
        corrections=corrections,
        lr=item.lr,
        betas=betas,
        eps=eps,
        weight_decay=item.weight_decay,
        grad_scale=grad_scale,
        ok=ok,
        key=item.key,
        first=item.first,
    )


def _torch_step(
    slices: list[AdamWSlice], betas: tuple[float, float], eps: float, grad_scale: Tensor, ok: Tensor
) -> None:
    """torch's fused kernel is built for loss scaling: it divides by its `grad_scale` and leaves everything alone where
    `found_inf` is 1, which is what a skipped step needs.
    """
    groups: dict[tuple[float, float], list[AdamWSlice]] = {}
    for item in slices:
        groups.setdefault((item.lr, item.weight_decay), []).append(item)
    for (lr, weight_decay), members in groups.items():
        moments = [(item.exp_avg.float(), item.exp_avg_sq.float()) for item in members]
        torch._fused_adamw_(
            [item.param for item in members],
            [item.grad for item in members],
            [avg for avg, _ in moments],
            [sq for _, sq in moments],
            [],
            [item.count for item in members],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale.reciprocal(),
            found_inf=(~ok).float(),
        )
        for item, (avg, sq) in zip(members, moments, strict=True):
            if item.exp_avg.dtype != torch.float32:
                # What bf16 holds already is rounded to itself: a skipped step changes nothing.
                bits = random_bits(avg.numel(), item.key, item.first, avg.device)
                item.exp_avg.copy_(round_to_bf16(avg, bits))
                item.exp_avg_sq.copy_(round_to_bf16(sq, bits >> 16))
            if item.copy is not None:
                item.copy.copy_(item.param)
