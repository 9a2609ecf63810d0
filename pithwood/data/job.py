"""What determines a corpus (`CorpusConfig`), and where one that is being made goes (`Job`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pithwood.data.corpus import FORMAT_VERSION
from pithwood.data.dedup import check_threshold
from pithwood.data.progress import Work
from pithwood.data.sources import Source, StdlibSource, Survey
from pithwood.data.spool import CHUNK_BYTES
from pithwood.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, TokenizerConfig, TrainBPE
from pithwood.data.workers import cores

_FEW_BYTES = 2 * CHUNK_BYTES
"""Text of this size is prepared in one process: others would take longer to start."""


@dataclass(frozen=True)
class CorpusConfig:
    """What text to train on and how it becomes tokens."""

    source: Source = field(default_factory=StdlibSource)
    """Where documents come from: a path or another short text (`pithwood prepare --help` lists them), or a Source."""
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
        check_threshold(self.dedup_threshold)
        if self.shard_tokens < 1:
            raise ValueError(f"data.shard_tokens={self.shard_tokens} must be >= 1")


class Job:
    """One corpus to be made: its configuration, and the places where it goes."""

    def __init__(
        self,
        cfg: CorpusConfig,
        loaded: Tokenizer | None,
        cache_dir: Path,
        out: Path | None,
        survey: Survey,
        work: Work,
        workers: int | None,
    ) -> None:
        """Arguments as those of `prepare`; loaded is the tokenizer that the configuration names, None to train one."""
        self.cfg, self.loaded, self.out, self.survey, self.work = cfg, loaded, out, survey, work
        self.settings = settings_key(cfg, loaded)
        """Hash of everything that the corpus depends on besides its text; half of its key."""
        self.parent = cache_dir if out is None else out.absolute().parent
        self.name = self.settings if out is None else out.absolute().name
        self.staging = self.parent / f".{self.name}.partial"
        few = survey.bytes is not None and min(survey.bytes, cfg.max_bytes or survey.bytes) <= _FEW_BYTES
        self.workers = workers or (1 if few else cores())

    def final(self, key: str) -> Path:
        """Where the corpus of this key belongs."""
        return self.parent / key if self.out is None else self.out.absolute()

    def key(self, digests: list[str]) -> str:
        """Settings and content: the digests of all chunks, or what stands for them."""
        content = self.cfg.source.identity() or ",".join(digests)
        return self.settings + blake2b(content.encode(), digest_size=6).hexdigest()


def settings_key(cfg: CorpusConfig, loaded: Tokenizer | None) -> str:
    """Hash of everything that the prepared corpus depends on besides its text."""
    settings = {"format_version": FORMAT_VERSION, **plain(cfg)}
    if loaded is not None:
        # What the file says counts, not where it lies; the bound on its size changes nothing.
        settings |= {"tokenizer": loaded.fingerprint(), "vocab_size": loaded.vocab_size}
    return hash_json(settings)[:12]


def plain(cfg: CorpusConfig) -> dict[str, Any]:
    """The configuration as JSON values, source and tokenizer with their types."""
    typed = {name: getattr(cfg, name) for name in ("source", "tokenizer")}
    return {
        **asdict(cfg),
        **{name: {"type": type(part).__qualname__, **asdict(part)} for name, part in typed.items()},
    }


def hash_json(value: Any) -> str:
    """Hex hash of a JSON value, whatever the order of its keys."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
