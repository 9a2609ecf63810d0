from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithwood.data.corpus import TokenStream
from pithwood.data.documents import KeptDocuments, context_loss

pytestmark = pytest.mark.quick


def stream_of(lengths: list[int], shard: int = 50) -> TokenStream:
    """Documents of these lengths; token values tell document and place."""
    tokens = np.concatenate([1000 * number + np.arange(length) for number, length in enumerate(lengths)])
    shards = [tokens[start : start + shard] for start in range(0, len(tokens), shard)]
    return TokenStream(shards, np.cumsum([0, *lengths[:-1]]))


some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@given(some_lengths, st.integers(1, 40), st.data())
def test_kept_documents_read_like_a_stream_of_those_alone(lengths, max_len, data):
    kept = KeptDocuments(stream_of(lengths), max_len)
    whole = [1000 * number + np.arange(length) for number, length in enumerate(lengths) if length <= max_len]
    tokens = np.concatenate([*whole, np.empty(0, dtype=int)])
    assert len(kept) == len(tokens)
    assert kept.starts.tolist() == np.flatnonzero(tokens % 1000 == 0).tolist()
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert kept.read(start, stop).tolist() == tokens[start:stop].tolist()
    inside = [place - start for place in kept.starts.tolist() if start < place < stop]
    assert kept.boundaries(start, stop).tolist() == inside


@given(some_lengths, st.integers(1, 50))
def test_tokens_cut_off_from_their_documents_beginning_are_counted(lengths, seq_len):
    loss = context_loss(stream_of(lengths), seq_len)
    cut = at = 0
    for length in lengths:
        begin = at
        for place in range(begin, begin + length):
            cut += begin // seq_len != place // seq_len
        at += length
    assert (loss.documents, loss.tokens) == (len(lengths), sum(lengths))
    assert loss.long_documents == sum(length > seq_len for length in lengths)
    assert loss.cut_tokens == cut


def test_a_stream_without_short_documents_is_empty():
    kept = KeptDocuments(stream_of([30, 40]), 10)
    assert len(kept) == 0
    assert kept.read(0, 0).tolist() == []
    assert context_loss(kept, 8).documents == 0
