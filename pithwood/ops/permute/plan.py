"""Where every (token, slot) pair stands among the rows sorted by expert.

Legend: T packed tokens, E experts, k experts per token, R = T * k rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """A permutation of (token, slot) pairs into rows; all tensors int32 on one device."""

    offsets: Tensor
    """[E + 1]: expert e owns rows offsets[e]:offsets[e + 1]; pairs without an expert own those from offsets[-1] on."""
    row_Tk: Tensor
    """[T, k]: the row of each pair."""
    pair_R: Tensor
    """[R]: token * k + slot of each row."""
    token_R: Tensor
    """[R]: the token of each row."""
    all_routed: bool = False
    """True where it is known that every pair has an expert; False says nothing."""

    @property
    def num_tokens(self) -> int:
        return self.row_Tk.shape[0]

    @property
    def num_rows(self) -> int:
        return self.pair_R.shape[0]
