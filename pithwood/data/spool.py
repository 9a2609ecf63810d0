"""The text of a corpus on its way: every document once on disk, in chunks named by their content, with an index.

A source is read once from its beginning, whatever it is. A chunk that an earlier, interrupted reading left behind is
used again if its name says that it holds the same documents, so nothing has to be trusted about the source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pithwood.data.sources import Document, LeftOut, Source
from pithwood.errors import naming

CHUNK_BYTES = 4 << 20
"""A chunk is complete when its documents reach this size."""

RECORD = np.dtype(
    [
        ("chunk", "<i4"),
        ("offset", "<i8"),
        ("name_size", "<i4"),
        ("size", "<i8"),
        ("content", "V16"),
        ("choose", "V16"),
        ("order", "V16"),
    ]
)
"""Index entry of a document: where its name begins in its chunk's file, bytes of the name, bytes of the content that
follows; hash of the content; ranks that choose documents under max_bytes and order them, keyed hashes of the name."""

_READ_WHOLE = "read.json"


@dataclass
class Tally:
    """What a source held."""

    documents: int = 0
    bytes: int = 0
    undecodable: int = 0
    empty: int = 0
    smallest: int = 0
    """Bytes of the smallest document; 0 if there is none."""


def rank(key: str, value: bytes) -> bytes:
    """16 bytes: a keyed hash, by which things are ordered and chosen as if at random."""
    return blake2b(value, digest_size=16, key=key.encode()[:64]).digest()


def ascending(rank_N: NDArray[Any]) -> NDArray[np.int64]:
    """[N] int64: the order that sorts ranks (or hashes) of 16 bytes."""
    halves = np.ascontiguousarray(rank_N).view(">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0]))


def read_chunks(source: Source, tally: Tally) -> Iterator[tuple[str, list[Document], list[bytes]]]:
    """(digest, documents, hashes of their contents) of each chunk in order, counting what is read and left out."""
    documents: list[Document] = []
    size = 0
    for item in source.documents():
        if isinstance(item, LeftOut):
            tally.undecodable += item.why == "not UTF-8"
            tally.empty += item.why == "empty"
            continue
        documents.append(item)
        size += len(item.content)
        tally.documents += 1
        tally.bytes += len(item.content)
        tally.smallest = min(tally.smallest or len(item.content), len(item.content))
        if size >= CHUNK_BYTES:
            yield _digested(documents)
            documents, size = [], 0
    if documents:
        yield _digested(documents)


def _digested(documents: list[Document]) -> tuple[str, list[Document], list[bytes]]:
    hashes = [blake2b(document.content, digest_size=16).digest() for document in documents]
    state = blake2b(digest_size=12)
    for document, value in zip(documents, hashes, strict=True):
        state.update(f"{document.name}\0{len(document.content)}\0".encode() + value)
    return state.hexdigest(), documents, hashes


class Spool:
    """Chunks of text and their index below a folder: NNNNNN-digest.text and NNNNNN-digest.npy (RECORD)."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.tally = Tally()
        self.digests: list[str] = []
        self.reused = 0
        """Chunks that lay there already."""
        self._keys = f"choose/{seed}", f"order/{seed}"

    def fill(self, source: Source) -> Iterator[str]:
        """Read the source and write what is not there yet; yields the name of each chunk when it is on disk."""
        known = self.folder / _READ_WHOLE
        if source.identity() is not None and known.is_file():
            whole = json.loads(known.read_text(encoding="utf-8"))
            self.tally, self.digests = Tally(**whole["tally"]), whole["digests"]
            self.reused = len(self.digests)
            yield from (self.chunk_name(number) for number in range(len(self.digests)))
            return
        for digest, documents, hashes in read_chunks(source, self.tally):
            self.digests.append(digest)
            name = self.chunk_name(len(self.digests) - 1)
            if (self.folder / f"{name}.npy").is_file():
                self.reused += 1
            else:
                self._write(name, documents, hashes)
            yield name
        expected = {self.chunk_name(number) for number in range(len(self.digests))}
        for path in self.folder.iterdir():
            if path.stem not in expected:
                path.unlink()
        write_whole(known, json.dumps({"tally": asdict(self.tally), "digests": self.digests}).encode())

    def _write(self, name: str, documents: list[Document], hashes: list[bytes]) -> None:
        number = int(name.partition("-")[0])
        for stale in self.folder.glob(f"{number:06d}-*"):
            stale.unlink()
        rows, parts, offset = np.zeros(len(documents), dtype=RECORD), [], 0
        for row, (document, value) in enumerate(zip(documents, hashes, strict=True)):
            label = document.name.encode("utf-8", errors="surrogateescape")
            ranks = [rank(key, label) for key in self._keys]
            rows[row] = (number, offset, len(label), len(document.content), value, *ranks)
            parts += [label, document.content]
            offset += len(label) + len(document.content)
        write_whole(self.folder / f"{name}.text", b"".join(parts))
        write_array(self.folder / f"{name}.npy", rows)

    def chunk_name(self, number: int) -> str:
        return f"{number:06d}-{self.digests[number]}"

    def index(self) -> NDArray[Any]:
        """[documents] RECORD: all of them, in the order of the source."""
        parts = [np.load(self.folder / f"{self.chunk_name(number)}.npy") for number in range(len(self.digests))]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=RECORD)


class SpoolReader:
    """Documents of a spool by index entry; keeps the files of some chunks open."""

    def __init__(self, folder: Path) -> None:
        self._paths = {int(path.name[:6]): path for path in folder.glob("*.text")}
        self._open: dict[int, int] = {}

    def name(self, record: Any) -> str:
        """The document's name."""
        label = self._read(record, 0, int(record["name_size"]))
        return label.decode("utf-8", errors="surrogateescape")

    def content(self, record: Any) -> bytes:
        """The document; raises ValueError if it is not what was written."""
        content = self._read(record, int(record["name_size"]), int(record["size"]))
        if blake2b(content, digest_size=16).digest() != record["content"].tobytes():
            path = self._paths[int(record["chunk"])]
            raise ValueError(f"{path} is altered; delete {path.parents[1]} and prepare again")
        return content

    def _read(self, record: Any, start: int, size: int) -> bytes:
        chunk = int(record["chunk"])
        if chunk not in self._open:
            if len(self._open) >= 128:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[chunk] = os.open(self._paths[chunk], os.O_RDONLY)
        return os.pread(self._open[chunk], size, int(record["offset"]) + start)

    def __enter__(self) -> SpoolReader:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that it is whole or absent after a kill."""
    beside = path.with_name(f"{path.name}.writing")
    with naming(path):
        beside.write_bytes(content)
    beside.rename(path)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """The same for an array, as .npy."""
    beside = path.with_name(f"{path.name}.writing")
    with naming(path), beside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    beside.rename(path)
