"""How documents fit into samples: those longer than the context, tokens cut off from it, and leaving long ones out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pithwood.data.corpus import TokenStream


@dataclass(frozen=True)
class ContextLoss:
    """What cutting a stream into samples of one length costs its documents. A document's first token counts too."""

    documents: int
    long_documents: int
    """Documents of more tokens than a sample: whatever the cuts, some of them lose context."""
    tokens: int
    cut_tokens: int
    """Tokens in whose sample the beginning of their document does not lie, in documents of any length."""


def context_loss(stream: TokenStream | KeptDocuments, seq_len: int) -> ContextLoss:
    """Count them; O(documents + samples)."""
    starts, total = stream.starts, len(stream)
    cuts = np.arange(0, total, seq_len, dtype=np.int64)
    # After a cut, context is missing up to the next beginning of a document or sample.
    next_start = np.append(starts, total)[np.searchsorted(starts, cuts, side="left")]
    cut_tokens = np.minimum(next_start, np.minimum(cuts + seq_len, total)) - cuts
    lengths = np.diff(starts, append=total)
    return ContextLoss(len(starts), int((lengths > seq_len).sum()), total, int(cut_tokens.sum()))


class KeptDocuments:
    """A token stream without its documents of more than max_len tokens; reads like a TokenStream.

    Costs 24 bytes per document that is kept.
    """

    def __init__(self, stream: TokenStream, max_len: int) -> None:
        lengths = np.diff(stream.starts, append=len(stream))
        kept = lengths <= max_len
        self._stream = stream
        self._origins: NDArray[np.int64] = stream.starts[kept]
        self._ends: NDArray[np.int64] = np.cumsum(lengths[kept])
        self.starts: NDArray[np.int64] = self._ends - lengths[kept]
        """[documents] int64, ascending from 0: where each kept document begins."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        assert 0 <= start <= stop <= len(self)
        if start == stop:
            return np.empty(0, dtype=np.int64)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop - 1, side="right"))
        pieces = []
        for number in range(first, last + 1):
            shift = int(self._origins[number] - self.starts[number])
            low, high = max(start, int(self.starts[number])), min(stop, int(self._ends[number]))
            pieces.append(self._stream.read(low + shift, high + shift))
        return np.concatenate(pieces)

    def boundaries(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document starts in (start, stop), relative to start."""
        low, high = np.searchsorted(self.starts, (start + 1, stop))
        return self.starts[low:high] - start
