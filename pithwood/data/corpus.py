"""A prepared corpus on disk: tokenizer, token shards, document offsets, validation text, and the manifest over them.

The folder is written by `prepare` and never changes afterwards. Opening checks the manifest, the tokenizer and the
size of every file; `verify` also reads every byte. The layout:

    manifest.json                  format version, hashes, counts, gzip size
    tokenizer.json
    train-00000.bin ...            token ids, little-endian uint16 or uint32, documents one after another
    train.starts.bin               little-endian int64: where each document's end-of-text token stands
    validation-00000.bin ...       the same for validation
    validation.starts.bin
    validation.txt                 the validation documents' bytes in the same order
    documents.jsonl                name, split, bytes, tokens and content hash of each document
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pithwood.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VALIDATION_TEXT = "validation.txt"
DOCUMENTS = "documents.jsonl"

_MANIFEST_KEYS = {"fingerprint", "dtype", "splits", "files", "gzip_bits_per_byte"}

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class TokenStream:
    """The token ids of one split as one long array, read from memory-mapped shards."""

    def __init__(self, shards: list[NDArray[Any]], starts: NDArray[np.int64]) -> None:
        self._shards = shards
        self._ends = np.cumsum([shard.size for shard in shards], dtype=np.int64)
        self.starts = starts
        """[documents] int64, ascending from 0: where each document begins."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        assert 0 <= start <= stop <= len(self)
        out = np.empty(stop - start, dtype=np.int64)
        first = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        for shard, end in zip(self._shards[first:], self._ends[first:], strict=True):
            if done == out.size:
                break
            offset = start + done - (int(end) - shard.size)
            piece = shard[offset : offset + out.size - done]
            out[done : done + piece.size] = piece
            done += piece.size
        return out

    def boundaries(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document starts in (start, stop), relative to start."""
        low, high = np.searchsorted(self.starts, (start + 1, stop))
        return self.starts[low:high] - start


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; its files were checked against the manifest."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of tokenizer and token streams: equal fingerprints mean the same training and validation data."""
        return str(self.manifest["fingerprint"])

    @property
    def gzip_bits_per_byte(self) -> float:
        """8 x size of `gzip -9` of the validation text / size of the validation text."""
        return float(self.manifest["gzip_bits_per_byte"])

    def num_tokens(self, split: Split) -> int:
        return int(self.manifest["splits"][split]["tokens"])

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of the split's documents."""
        return int(self.manifest["splits"][split]["bytes"])

    def num_documents(self, split: Split) -> int:
        return int(self.manifest["splits"][split]["documents"])

    def validation_text(self) -> bytes:
        """The validation documents one after another, in the order of the token stream."""
        return (self.folder / VALIDATION_TEXT).read_bytes()

    def stream(self, split: Split) -> TokenStream:
        return self._streams[split]

    @cached_property
    def _streams(self) -> dict[Split, TokenStream]:
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        streams: dict[Split, TokenStream] = {}
        for split in SPLITS:
            entry = self.manifest["splits"][split]
            shards = [np.memmap(self.folder / name, dtype=dtype, mode="r") for name in entry["shards"]]
            starts = np.fromfile(self.folder / entry["starts"], dtype="<i8").astype(np.int64)
            streams[split] = TokenStream(cast("list[NDArray[Any]]", shards), starts)
        return streams

    def verify(self) -> None:
        """Read every file and compare its hash with the manifest; raises ValueError naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            if hash_file(self.folder / name) != entry["blake2b"]:
                raise ValueError(_altered(self.folder, f"{name} is altered: its hash is not the one in {MANIFEST}"))


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared corpus, checking manifest, tokenizer and the size of every file (`verify` reads every byte).

    raises ValueError if anything is missing, of another format version, or does not belong together
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise ValueError(
            f"there is no folder {folder}; make a corpus there with `pithwood prepare SOURCE --out {folder}`"
        )
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a prepared corpus: {MANIFEST} is missing; delete the folder and prepare it again"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_altered(folder, f"{MANIFEST} is not valid JSON ({error})")) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(_altered(folder, f"{MANIFEST} has format_version {version}, this code reads {FORMAT_VERSION}"))
    if absent := _MANIFEST_KEYS - manifest.keys():
        raise ValueError(_altered(folder, f"{MANIFEST} lacks {', '.join(sorted(absent))}"))
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(_altered(folder, f"{name} is missing"))
        if file.stat().st_size != entry["size"]:
            raise ValueError(
                _altered(folder, f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {entry['size']}")
            )
    if hash_file(folder / TOKENIZER) != manifest["files"][TOKENIZER]["blake2b"]:
        raise ValueError(_altered(folder, f"{TOKENIZER} is not the tokenizer that made these shards"))
    return Corpus(folder, manifest, load_tokenizer(folder / TOKENIZER))


def hash_file(path: Path) -> str:
    """Hex BLAKE2b of a file, read in pieces."""
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def _altered(folder: Path, what: str) -> str:
    return f"corpus {folder}: {what}; delete the folder and prepare it again"
