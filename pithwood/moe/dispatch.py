"""From tokens to rows sorted by expert and back, within one process. Dropless: every (token, slot) pair is one row.

Row order inside an expert is by (token, slot). The number of rows is T * k, or a bound where tokens came from other
processes (`parallel.expert`), so nothing waits for the device: pairs without an expert here (id -1) come last, behind
the last expert's rows, and what stands there is never read. The router's weights travel with the rows, and the experts
apply them: what comes back is only added.

Legend: T packed tokens, D model width, E experts, k experts per token, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pithwood.ops.permute import RowPlan, gather_rows, plan_rows, row_weights, sum_rows


class Dispatched(NamedTuple):
    """Rows sorted by expert, on their way to the experts."""

    rows_RD: Tensor
    """[R, D]: expert e owns rows plan.offsets[e]:plan.offsets[e + 1]."""
    weight_R: Tensor
    """[R] fp32: the router's weight of each row."""
    plan: RowPlan
    """What the way back needs."""


def plan_tokens(x_TD: Tensor, ids_Tk: Tensor, num_experts: int) -> RowPlan:
    """Where each token's copies go: one row per chosen expert, sorted by expert.

    x_TD        [T, D] any float, of which only the number of tokens counts
    ids_Tk      [T, k] int, 0 <= id < num_experts, or -1 for none
    raises      ValueError if the shapes do not fit
    """
    if ids_Tk.dim() != 2 or ids_Tk.shape[0] != x_TD.shape[0]:
        raise ValueError(f"expert ids {tuple(ids_Tk.shape)} must be [tokens, top_k] for {x_TD.shape[0]} tokens")
    return plan_rows(ids_Tk, num_experts)


def planned_rows(x_TD: Tensor, weight_Tk: Tensor, plan: RowPlan) -> Dispatched:
    """Copy each token to the rows that a plan has for it.

    x_TD        [T, D] any float, the tokens of the plan
    weight_Tk   [T, k] fp32, the router's weights
    raises      ValueError if the shapes do not fit the plan
    """
    return Dispatched(gather_rows(x_TD, plan), row_weights(weight_Tk, plan), plan)


def combine_tokens(rows_RD: Tensor, plan: RowPlan, residual_TD: Tensor | None = None, unread: bool = False) -> Tensor:
    """Sum of each token's rows in slot order, in fp32 (fp64 for fp64), plus the residual; rounded once.

    rows_RD       [R, D] any float, as the experts gave them, weights applied; rows of pairs without an expert are not
                  read, even if NaN
    residual_TD   [T, D] same dtype, or None
    unread        nobody reads the value: the rows are not read either
    returns       [T, D] in the dtype of rows_RD; the residual, or zero, for a token without experts
    raises        ValueError if the rows do not belong to the dispatch
    """
    return sum_rows(rows_RD, plan, residual_TD, unread=unread)
