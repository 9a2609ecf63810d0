"""From encoded pieces to the files of a corpus: shards of equal size, document starts, document records."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from pithwood.data.corpus import DOCUMENTS, Split

_COPY_BYTES = 1 << 22


def assemble(folder: Path, split: Split, pieces: Sequence[Path], dtype: str, shard_tokens: int) -> dict[str, Any]:
    """Write shards, starts and records of one split out of its pieces in their order; returns its manifest entry.

    pieces          paths without suffix of what `Encode` tasks left: tokens, records, lengths
    dtype           of the tokens
    shard_tokens    tokens per shard; the last holds the rest

    A split is scored on every token but its first: `loss_tokens`. `longest` is that of a document, in tokens.
    """
    shards: list[str] = []
    out: IO[bytes] | None = None
    itemsize = np.dtype(dtype).itemsize
    room = 0
    for piece in pieces:
        with Path(f"{piece}.bin").open("rb") as tokens:
            while block := tokens.read(min(_COPY_BYTES, room) if room else _COPY_BYTES):
                while block:
                    if room == 0:
                        if out is not None:
                            out.close()
                        shards.append(f"{split}-{len(shards):05d}.bin")
                        out = (folder / shards[-1]).open("wb")
                        room = shard_tokens * itemsize
                    assert out is not None
                    out.write(block[:room])
                    block, room = block[room:], room - min(room, len(block))
    if out is not None:
        out.close()
    lengths = np.concatenate([np.load(f"{piece}.npy") for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    starts.astype("<i8").tofile(folder / f"{split}.starts.bin")
    with (folder / DOCUMENTS).open("ab") as records:
        for piece in pieces:
            with Path(f"{piece}.jsonl").open("rb") as file:
                shutil.copyfileobj(file, records, _COPY_BYTES)
    tokens_in_all = int(lengths.sum())
    return {
        "documents": len(lengths),
        "tokens": tokens_in_all,
        "loss_tokens": tokens_in_all - 1,
        "longest": int(lengths.max()),
        "shards": shards,
        "starts": f"{split}.starts.bin",
    }


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename never outlives the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
