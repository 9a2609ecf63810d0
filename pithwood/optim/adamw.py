"""AdamW with one fused pass over parameters, gradients and moments.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    ok: Tensor,
) -> None:
    """Take one AdamW step in place on every parameter; where `ok` is false nothing but the gradients changes by a bit.

    params, grads, exp_avgs, exp_avg_sqs    fp32, any shape, one layout per position; grads come back scaled
    counts                                  fp32 scalars on the device: accepted updates so far, for the bias correction
    grad_scale                              fp32 scalar on the device, multiplies the gradients (clipping)
    ok                                      bool scalar on the device

    Equals torch.optim.AdamW. torch's fused kernel is built for loss scaling: it divides by its `grad_scale` and leaves
    everything alone where `found_inf` is 1, which is what a skipped step needs; no host sync. Scalars move on the
    device alone.
    """
    if not params:
        return
    # A list, since one tensor for all would be read back to the host.
    torch._foreach_add_(counts, [ok.float()] * len(counts))
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        counts,
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
