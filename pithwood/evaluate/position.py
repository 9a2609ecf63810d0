"""Loss by position: how much each token gains from the tokens before it, with standard errors over documents.

A position is the place in its document of the token that predicts the next one, from 0, counted anew where a sample
cuts the document: at position p the model has seen p + 1 tokens.

Legend: T packed tokens, C contexts (a document, or the piece of one that a sample holds), B buckets of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pithwood.data.batches import Batch
from pithwood.data.tokenizer import END_OF_TEXT_ID
from pithwood.evaluate.loss import check_strictly_causal, token_losses
from pithwood.models.qwen3_moe import Qwen3MoE

ErrorsOver = Literal["documents", "contexts"]
Table = NDArray[np.float64]


def position_edges(seq_len: int, buckets: int | None = None) -> list[int]:
    """First position of each bucket, and seq_len at the end: powers of two (0, 1, 2, 4, ...), or `buckets` alike.

    raises  ValueError if buckets is below 1 or above seq_len
    """
    if buckets is None:
        return [0, *(1 << power for power in range((seq_len - 1).bit_length())), seq_len]
    if not 1 <= buckets <= seq_len:
        raise ValueError(f"--buckets={buckets} must lie between 1 and the {seq_len} positions of a sample")
    return [round(number * seq_len / buckets) for number in range(buckets + 1)]


def loss_by_position(
    model: Qwen3MoE,
    batches: Iterable[Batch],
    edges: Sequence[int],
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Loss over the tokens of all batches, as a whole and by position.

    batches   in the order of the stream, as `sequential_batches` gives them
    edges     ascending first positions of the buckets, and an end that no position reaches
    progress  called with the tokens done after every batch
    returns   loss (nats per token), bits_per_byte, tokens, bytes, documents (begun in the batches), standard_error of
              the loss, errors_over, and buckets: rows {from, to, tokens, loss, bits_per_byte, standard_error}; buckets
              without tokens are left out
    raises    ValueError if a mixer's selection can see the future, or there are no tokens

    Tokens of one document are alike, so the standard error is that of a mean over clusters: the documents, or where
    there is only one, its contexts (errors_over says which). NaN where a bucket has fewer than two. Cochran 1977,
    "Sampling techniques", section 2.11 (ratio estimates), without the correction for a finite population.
    """
    check_strictly_causal(model)
    num_buckets = len(edges) - 1
    edge_B = torch.tensor(edges[:-1], dtype=torch.int64)
    sums: list[Table] = []
    begins: list[NDArray[np.bool_]] = []
    done = 0
    for batch, nll_T in token_losses(model, batches, dtype):
        columns, packing = {name: column.cpu() for name, column in batch.columns.items()}, batch.packing.to("cpu")
        bucket_T = torch.searchsorted(edge_B, packing.position_T, right=True) - 1
        cell_T = packing.query_doc() * num_buckets + bucket_T
        weight_T = columns["loss_weight"].double()
        size = packing.num_docs * num_buckets
        values = (nll_T.cpu() * weight_T, weight_T, columns["target_bytes"] * weight_T)
        cells = torch.stack([torch.bincount(cell_T, value_T, minlength=size) for value_T in values])
        starts_N = packing.cu_q[:-1].long()
        held_N = packing.cu_q.diff() > 0
        sums.append(cells.view(3, packing.num_docs, num_buckets)[:, held_N].numpy())
        begins.append((columns["tokens"][starts_N[held_N]] == END_OF_TEXT_ID).numpy())
        done += batch.num_tokens
        progress(done)
    if not done:
        raise ValueError("nothing to evaluate: no tokens; give more text")
    nll_CB, weight_CB, bytes_CB = np.concatenate(sums, axis=1)
    document_C = np.cumsum(np.concatenate(begins), dtype=np.int64)
    errors_over: ErrorsOver = "documents" if len(np.unique(document_C)) > 1 else "contexts"
    if errors_over == "documents":
        nll_CB, weight_CB, bytes_CB = (_by_document(table, document_C) for table in (nll_CB, weight_CB, bytes_CB))
    whole = _mean(nll_CB.sum(1), weight_CB.sum(1), bytes_CB.sum(1))
    buckets = [
        {"from": edges[b], "to": edges[b + 1] - 1, **_mean(nll_CB[:, b], weight_CB[:, b], bytes_CB[:, b])}
        for b in range(num_buckets)
        if weight_CB[:, b].sum() > 0
    ]
    for bucket in buckets:
        del bucket["bytes"]
    return {**whole, "documents": int(document_C[-1]), "errors_over": errors_over, "buckets": buckets}


def _by_document(table_CB: Table, document_C: NDArray[np.int64]) -> Table:
    """Sums over the contexts of each document."""
    _, place_C = np.unique(document_C, return_inverse=True)
    total = np.zeros((int(place_C.max()) + 1, table_CB.shape[1]))
    np.add.at(total, place_C, table_CB)
    return total


def _mean(nll_C: Table, weight_C: Table, bytes_C: Table) -> dict[str, Any]:
    """Mean loss of clusters given by their sums, with its standard error."""
    weight = float(weight_C.sum())
    loss = float(nll_C.sum()) / weight
    clusters = int((weight_C > 0).sum())
    error = math.nan
    if clusters > 1:
        spread = float(((nll_C - loss * weight_C) ** 2).sum())
        error = math.sqrt(spread * clusters / (clusters - 1)) / weight
    return {
        "loss": loss,
        "standard_error": error,
        "bits_per_byte": float(nll_C.sum()) / math.log(2) / max(float(bytes_C.sum()), 1.0),
        "tokens": int(weight),
        "bytes": int(bytes_C.sum()),
    }
