"""From a source of text to a prepared corpus on disk: choose, drop near-duplicates, split, train the BPE, write shards.

The result is a pure function of the configuration and the documents. It is built in a folder beside its final place
and renamed when complete, so a corpus is whole or absent; a second call with the same inputs opens what the first one
made.

Legend: file layout as in `pithwood/data/corpus.py`.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pithwood.data.corpus import (
    DOCUMENTS,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    VALIDATION_TEXT,
    Corpus,
    Split,
    hash_file,
    open_corpus,
)
from pithwood.data.dedup import near_duplicates
from pithwood.data.sources import Document, Source, SourceText, StdlibSource
from pithwood.data.tokenizer import (
    MIN_VOCAB_SIZE,
    Tokenizer,
    TokenizerConfig,
    TokenizerFile,
    TrainBPE,
    train_tokenizer,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CorpusConfig:
    """What text to train on and how it becomes tokens."""

    source: Source = field(default_factory=StdlibSource)
    """Where documents come from: StdlibSource(), TextFolder(path, pattern), or a Source of your own."""
    tokenizer: TokenizerConfig = field(default_factory=TrainBPE)
    """TrainBPE() trains one on the training documents; TokenizerFile(path) takes a tokenizer.json that exists."""
    vocab_size: int = 4096
    """Tokens that a BPE is trained to, the 256 bytes and the end-of-text token included, or the most that a loaded
    tokenizer may have; at least 257."""
    validation_fraction: float = 0.05
    """Share of the text, in bytes, held out by whole documents; in (0, 1)."""
    seed: int = 0
    """Decides which documents are held out, which remain under max_bytes, and their order; >= 0."""
    max_bytes: int | None = None
    """Take at most this many bytes of documents, chosen by hash; null takes all."""
    dedup_threshold: float | None = 0.8
    """Jaccard similarity of 5-word shingles, in (0, 1], that makes a document a repeat; null keeps all."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file; at least 1."""

    def validate(self) -> None:
        """Raise ValueError, in the words of the config, if a field is out of range; touches no files."""
        self.source.validate()
        self.tokenizer.validate()
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"data.vocab_size={self.vocab_size} must be at least {MIN_VOCAB_SIZE} (256 bytes + 1)")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1; try 0.05")
        if self.seed < 0:
            raise ValueError(f"data.seed={self.seed} must be >= 0")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes={self.max_bytes} must be >= 1, or null for the whole source")
        if self.dedup_threshold is not None and not 0.0 < self.dedup_threshold <= 1.0:
            raise ValueError(f"data.dedup_threshold={self.dedup_threshold} must lie in (0, 1], or be null to keep all")
        if self.shard_tokens < 1:
            raise ValueError(f"data.shard_tokens={self.shard_tokens} must be >= 1")


def prepare(cfg: CorpusConfig, cache_dir: Path, progress: Progress = lambda line: None) -> Corpus:
    """The corpus of this configuration, from the cache if it was made before.

    cache_dir    holds one folder per (configuration, content); created if missing
    progress     called with one line of text at each stage
    raises       ValueError if the configuration is out of range, the source holds too little usable text, or the
                 cached corpus is altered

    Processes that prepare the same corpus at once wait for the first (a file lock, so POSIX only). It holds
    the whole text in memory.
    """
    cfg.validate()
    loaded = _load_tokenizer(cfg)
    source = cfg.source.read()
    progress(f"corpus: {_size(source.documents)} of {source.description}{_left_out(source)}")
    documents = _choose(source.documents, cfg)
    key = _cache_key(cfg, loaded, documents)
    cache_dir.mkdir(parents=True, exist_ok=True)
    final = cache_dir / key
    with _lock(cache_dir / f".{key}.lock"):
        if final.exists():
            corpus = open_corpus(final)
            # An altered token would train silently, or fail far from its cause.
            corpus.verify()
            progress(f"corpus: found prepared in {final}")
            return corpus
        building = cache_dir / f".{key}.partial"
        # Left by a process that was killed; the lock says that nobody works on it.
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            _build(building, cfg, loaded, source, documents, key, progress)
            progress("corpus: complete")
            _sync(building)
            building.rename(final)
            _sync(cache_dir)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return open_corpus(final)


def _build(
    folder: Path,
    cfg: CorpusConfig,
    loaded: Tokenizer | None,
    source: SourceText,
    documents: list[Document],
    key: str,
    progress: Progress,
) -> None:
    """Write a whole corpus into an empty folder, the manifest last."""
    unique, num_duplicates = _drop_duplicates(documents, cfg.dedup_threshold)
    progress(f"corpus: {_size(unique)} remain, {num_duplicates} near-duplicates dropped")
    splits = _split(unique, cfg)
    for split, members in splits.items():
        progress(f"corpus: {split} {_size(members)}")

    tokenizer = loaded or _train_tokenizer(cfg, splits["train"], progress)
    tokenizer.save(folder / TOKENIZER)

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    entries = {}
    for split, members in splits.items():
        entries[split] = _write_split(folder, split, members, tokenizer, dtype, cfg.shard_tokens, progress)
    validation_text = b"".join(document.content for document in splits["validation"])
    (folder / VALIDATION_TEXT).write_bytes(validation_text)
    gzip_bytes = len(gzip.compress(validation_text, compresslevel=9, mtime=0))
    gzip_bits_per_byte = 8 * gzip_bytes / len(validation_text)
    progress(f"corpus: gzip -9 of the validation text is {gzip_bits_per_byte:.4f} bits per byte")

    files = {path.name: {"size": path.stat().st_size, "blake2b": hash_file(path)} for path in sorted(folder.iterdir())}
    streams = {name: entry["blake2b"] for name, entry in files.items() if name.endswith(".bin") or name == TOKENIZER}
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "fingerprint": _hash_json(streams),
        "config": _plain(cfg),
        "source": {
            "description": source.description,
            "documents": len(source.documents),
            "bytes": sum(len(document.content) for document in source.documents),
            "undecodable": source.undecodable,
            "empty": source.empty,
            "beyond_max_bytes": len(source.documents) - len(documents),
            "duplicates_dropped": num_duplicates,
        },
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "end_of_text_id": tokenizer.end_of_text_id,
            "fingerprint": tokenizer.fingerprint(),
            "library": f"tokenizers {tokenizers.__version__}",
        },
        "dtype": dtype,
        "splits": entries,
        "gzip_bytes": gzip_bytes,
        "gzip_bits_per_byte": gzip_bits_per_byte,
        "files": files,
    }
    for path in folder.iterdir():
        _sync(path)
    progress("corpus: writing the manifest")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)


def _load_tokenizer(cfg: CorpusConfig) -> Tokenizer | None:
    """The tokenizer that the configuration names, None if one is to be trained."""
    if not isinstance(cfg.tokenizer, TokenizerFile):
        return None
    tokenizer = cfg.tokenizer.load()
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"data.vocab_size={cfg.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer.path={cfg.tokenizer.path!r}; set data.vocab_size={tokenizer.vocab_size} "
            f"(and model.vocab_size no lower)"
        )
    return tokenizer


def _train_tokenizer(cfg: CorpusConfig, documents: list[Document], progress: Progress) -> Tokenizer:
    assert isinstance(cfg.tokenizer, TrainBPE)
    taken: list[Document] = []
    num_bytes = 0
    for document in documents:
        if taken and num_bytes + len(document.content) > cfg.tokenizer.sample_bytes:
            break
        taken.append(document)
        num_bytes += len(document.content)
    progress(f"tokenizer: training {cfg.vocab_size} tokens on {_size(taken)}")
    return train_tokenizer((document.text for document in taken), cfg.vocab_size)


def _choose(documents: Sequence[Document], cfg: CorpusConfig) -> list[Document]:
    """The documents that fit into max_bytes, filled in the order of a hash of their names, in their original order."""
    if cfg.max_bytes is None:
        chosen = list(documents)
    else:
        names = {document.name for document in _fill(documents, cfg.max_bytes, f"choose/{cfg.seed}", by_name=True)}
        chosen = [document for document in documents if document.name in names]
    if not chosen:
        if documents:
            smallest = min(len(document.content) for document in documents)
            raise ValueError(f"data.max_bytes={cfg.max_bytes} is less than the smallest document ({smallest} bytes)")
        raise ValueError("data.source holds no documents: every file is empty or not UTF-8; give a source with text")
    return chosen


def _drop_duplicates(documents: list[Document], threshold: float | None) -> tuple[list[Document], int]:
    if threshold is None:
        return documents, 0
    dropped = set(near_duplicates([document.content for document in documents], threshold))
    return [document for index, document in enumerate(documents) if index not in dropped], len(dropped)


def _split(documents: list[Document], cfg: CorpusConfig) -> dict[Split, list[Document]]:
    """Whole documents, held out by a hash of their content until the fraction of bytes is reached; each split shuffled.

    Equal contents always fall on the same side. At least one document is held out and one is left to train on.
    """
    groups = {document.content: document for document in documents}
    if len(groups) < 2:
        raise ValueError(
            f"corpus has {len(groups)} distinct document; at least 2 are needed, one of them to validate on: "
            "add files, raise data.max_bytes, or raise data.dedup_threshold"
        )
    total = sum(len(document.content) for document in documents)
    held_out = {
        document.content
        for document in _fill(list(groups.values()), int(total * cfg.validation_fraction), f"split/{cfg.seed}")
    }
    if not held_out:
        held_out = {min(groups, key=lambda content: (len(content), content))}
    if len(held_out) == len(groups):
        held_out.remove(max(groups, key=lambda content: (len(content), content)))
    ordered = sorted(documents, key=lambda document: _rank(f"order/{cfg.seed}", document.name.encode()))
    return {
        "train": [document for document in ordered if document.content not in held_out],
        "validation": [document for document in ordered if document.content in held_out],
    }


def _fill(documents: Sequence[Document], budget: int, key: str, by_name: bool = False) -> list[Document]:
    """Documents taken in the order of a keyed hash, passing over those that exceed what is left of the budget."""
    taken = []
    for document in sorted(documents, key=lambda d: _rank(key, d.name.encode() if by_name else d.content)):
        if len(document.content) <= budget:
            taken.append(document)
            budget -= len(document.content)
    return taken


def _write_split(
    folder: Path,
    split: Split,
    documents: list[Document],
    tokenizer: Tokenizer,
    dtype: str,
    shard_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write shards, document starts and document records of one split; returns its manifest entry."""
    shards: list[str] = []
    starts: list[int] = []
    pending: list[np.ndarray[Any, Any]] = []
    pending_tokens = num_tokens = reported = 0

    def write_shards(everything: bool) -> None:
        nonlocal pending_tokens
        while pending_tokens >= shard_tokens or (everything and pending_tokens):
            tokens = np.concatenate(pending)
            name = f"{split}-{len(shards):05d}.bin"
            progress(f"corpus: writing {name}")
            tokens[:shard_tokens].astype(np.dtype(dtype).newbyteorder("<")).tofile(folder / name)
            shards.append(name)
            pending[:] = [tokens[shard_tokens:]]
            pending_tokens = pending[0].size

    num_bytes = sum(len(document.content) for document in documents)
    done_bytes = 0
    with (folder / DOCUMENTS).open("a", encoding="utf-8") as records:
        encoded = tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            starts.append(num_tokens)
            pending.append(np.array([tokenizer.end_of_text_id, *ids], dtype=dtype))
            pending_tokens += len(ids) + 1
            num_tokens += len(ids) + 1
            done_bytes += len(document.content)
            record = {
                "name": document.name,
                "split": split,
                "bytes": len(document.content),
                "tokens": len(ids) + 1,
                "blake2b": blake2b(document.content, digest_size=16).hexdigest(),
            }
            records.write(json.dumps(record) + "\n")
            write_shards(everything=False)
            if done_bytes * 4 // num_bytes > reported:
                reported = done_bytes * 4 // num_bytes
                progress(f"corpus: {split} {25 * reported} % encoded, {num_tokens:,} tokens")
        write_shards(everything=True)
    starts_name = f"{split}.starts.bin"
    np.array(starts, dtype="<i8").tofile(folder / starts_name)
    return {
        "documents": len(documents),
        "bytes": num_bytes,
        "tokens": num_tokens,
        "shards": shards,
        "starts": starts_name,
    }


def _cache_key(cfg: CorpusConfig, loaded: Tokenizer | None, documents: Sequence[Document]) -> str:
    """Hash of everything that the prepared corpus depends on."""
    settings = {"format_version": FORMAT_VERSION, **_plain(cfg)}
    if loaded is not None:
        # What the file says counts, not where it lies; the bound on its size changes nothing.
        settings |= {"tokenizer": loaded.fingerprint(), "vocab_size": loaded.vocab_size}
    state = blake2b(_hash_json(settings).encode(), digest_size=12)
    for document in documents:
        state.update(f"{document.name}\0{len(document.content)}\0".encode())
        state.update(document.content)
    return state.hexdigest()


def _plain(cfg: CorpusConfig) -> dict[str, Any]:
    """The configuration as JSON values, source and tokenizer with their types."""
    typed = {name: getattr(cfg, name) for name in ("source", "tokenizer")}
    return {
        **asdict(cfg),
        **{name: {"type": type(part).__qualname__, **asdict(part)} for name, part in typed.items()},
    }


def _hash_json(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _rank(key: str, value: bytes) -> bytes:
    return blake2b(value, digest_size=16, key=key.encode()[:64]).digest()


def _size(documents: Sequence[Document]) -> str:
    return f"{len(documents)} documents ({sum(len(document.content) for document in documents) / 1e6:.2f} MB)"


def _left_out(source: SourceText) -> str:
    counts = [(source.undecodable, "not UTF-8"), (source.empty, "empty")]
    parts = [f"{count} {why}" for count, why in counts if count]
    return f"; left out: {', '.join(parts)}" if parts else ""


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file that stays behind; the system releases it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename never outlives the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
