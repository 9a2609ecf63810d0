"""Where every (token, slot) pair stands among the rows sorted by expert.

Legend: T packed tokens, E experts, k experts per token, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """A place among R rows for (token, slot) pairs; all tensors int32 on one device."""

    offsets: Tensor
    """[E + 1]: expert e owns rows offsets[e]:offsets[e + 1]; those from offsets[-1] on are nobody's."""
    row_Tk: Tensor
    """[T, k]: the row of each pair; offsets[-1] or more for a pair without one, be it that it has no expert, be it that
    there was no room."""
    pair_R: Tensor
    """[R]: token * k + slot of each row; -1 for one without a pair."""
    token_R: Tensor
    """[R]: the token of each row; -1 for one without a pair."""
    count: Tensor | None = None
    """[E]: the pairs of each expert, those without a row included; None where nobody asked."""
    all_routed: bool = False
    """True where it is known that every pair has a row; False says nothing."""

    @property
    def num_tokens(self) -> int:
        return self.row_Tk.shape[0]

    @property
    def num_rows(self) -> int:
        return self.pair_R.shape[0]
