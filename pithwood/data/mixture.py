"""Mixtures: named corpora under one tokenizer, each giving its share of the samples."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Literal

from pithwood.config import config_hash
from pithwood.data.corpus import TOKENIZER, Corpus, Split, TokenStream, open_corpus
from pithwood.data.documents import KeptDocuments
from pithwood.data.interleave import exact_shares
from pithwood.data.prepare import CorpusConfig, Progress, check_source, find_prepared, prepare
from pithwood.data.sources import Source, Survey
from pithwood.data.tokenizer import Tokenizer, TokenizerConfig, TokenizerFile, TrainBPE

ONE_CORPUS = "corpus"
"""What reports call the text of a run that has no mixture."""


@dataclass(frozen=True)
class MixturePart:
    """One corpus of a mixture."""

    source: Source
    """Where its documents come from."""
    weight: float = 1.0
    """Share of all samples (which have the same length, so of all tokens), relative to the other parts'; above 0."""
    max_epochs: float | None = None
    """Most times its text may be read; a run that would read more is refused before it starts. null: no limit."""
    long_documents: Literal["cut", "drop"] = "cut"
    """Training documents of more tokens than the longest seq_len: cut into samples like all others, or left out."""
    max_bytes: int | None = None
    """Take at most this many bytes of documents, chosen by hash; null takes all."""


@dataclass(frozen=True)
class MixtureConfig:
    """Several corpora under one tokenizer."""

    parts: dict[str, MixturePart]
    """Corpora by name: letters, digits, '_' and '-'."""
    tokenizer: TokenizerConfig = field(default_factory=TrainBPE)
    """TrainBPE() trains one on the training documents of `tokenizer_part`; TokenizerFile(path) takes one that
    exists."""
    tokenizer_part: str | None = None
    """Part that the tokenizer is trained on; null will do if there is one part, or the tokenizer is loaded."""
    vocab_size: int = 4096
    """Tokens of the byte-level BPE, or the most that a loaded tokenizer may have; at least 257."""
    validation_fraction: float = 0.05
    """Share of each part's text, in bytes, held out by whole documents; in (0, 1)."""
    seed: int = 0
    """Decides which documents are held out, which remain under max_bytes, and their order; >= 0."""
    dedup_threshold: float | None = 0.8
    """Jaccard similarity of 5-word shingles, in (0, 1], that makes a document a repeat of one in the same part; null
    keeps all."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file; at least 1."""

    json_default: ClassVar[type] = CorpusConfig
    """Where both are allowed, an object that names no type is a CorpusConfig."""

    def validate(self) -> None:
        """Raise ValueError, in the words of the config, if a field is out of range; touches no files."""
        if not self.parts:
            raise ValueError("data.parts is empty; give at least one part, such as {'code': MixturePart(source=...)}")
        folded: dict[str, str] = {}
        for name, part in self.parts.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"data.parts: the name {name!r} may hold letters, digits, '_' and '-' only")
            if (other := folded.setdefault(name.lower(), name)) != name:
                raise ValueError(f"data.parts: the names {other!r} and {name!r} clash; they differ in case only")
            if not 0 < part.weight < math.inf:
                raise ValueError(
                    f"data.parts.{name}.weight={part.weight:g} must be a finite number above 0; leave the part out, or "
                    "give it a weight here and 0 in the weights of some phases"
                )
            if part.max_epochs is not None and not part.max_epochs > 0:
                raise ValueError(
                    f"data.parts.{name}.max_epochs={part.max_epochs} must be above 0, or null for no limit"
                )
            for other, its in self.parts.items():
                # Whatever max_bytes: what one holds out the other might train on.
                if other != name and its.source == part.source:
                    raise ValueError(
                        f"data.parts: {name!r} and {other!r} have the same source; "
                        "give it once, with the sum of the weights"
                    )
            with _in_words_of_part(name):
                self.corpus(name).validate()
        self.shares()
        if self.tokenizer_part is None and isinstance(self.tokenizer, TrainBPE) and len(self.parts) > 1:
            raise ValueError(
                "data.tokenizer_part is not set: name the part whose text the tokenizer is trained on "
                f"({', '.join(self.names)}), or load one with data.tokenizer=PATH"
            )
        if self.tokenizer_part is not None and self.tokenizer_part not in self.parts:
            raise ValueError(
                f"data.tokenizer_part={self.tokenizer_part!r} is no part; parts are {', '.join(self.parts)}"
            )
        if self.tokenizer_part is not None and not isinstance(self.tokenizer, TrainBPE):
            raise ValueError(
                f"data.tokenizer_part={self.tokenizer_part!r} says what to train a tokenizer on, but data.tokenizer "
                "loads one; drop one of the two"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The parts in the order of all reports and schedules: by name, whatever the order of the configuration."""
        return tuple(sorted(self.parts))

    def preparation_order(self) -> tuple[str, ...]:
        """The part that the tokenizer is trained on, then the others."""
        first = self.tokenizer_part or self.names[0]
        return (first, *(name for name in self.names if name != first))

    def shares(self, weights: Mapping[str, float] | None = None, where: str = "data.parts") -> tuple[Fraction, ...]:
        """Share of the samples that each part of `names` gives, by its own weight or by `weights` of all parts.

        raises ValueError, in the words of `where`, for weights that cannot be or are not those of all parts
        """
        given = {name: part.weight for name, part in self.parts.items()} if weights is None else weights
        if missing := [name for name in self.names if name not in given]:
            raise ValueError(f"{where} lacks {missing[0]!r}; give every part a weight, 0 to leave it out")
        if unknown := [name for name in given if name not in self.parts]:
            raise ValueError(f"{where} has {unknown[0]!r}, which is no part; parts are {', '.join(self.names)}")
        return exact_shares({name: given[name] for name in self.names}, where)

    def corpus(self, name: str, tokenizer: TokenizerConfig | None = None) -> CorpusConfig:
        """The configuration of one part as a corpus of its own; the tokenizer by default the mixture's."""
        part = self.parts[name]
        return CorpusConfig(
            source=part.source,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
            vocab_size=self.vocab_size,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
            max_bytes=part.max_bytes,
            dedup_threshold=self.dedup_threshold,
            shard_tokens=self.shard_tokens,
        )


@dataclass(frozen=True)
class Mixture:
    """The opened corpora of a mixture. Means over parts are weighted by their shares.

    raises ValueError if their tokenizers differ
    """

    cfg: MixtureConfig
    corpora: dict[str, Corpus]
    """By name, in the order of `cfg.names`."""

    def __post_init__(self) -> None:
        first = next(iter(self.corpora))
        for name, corpus in self.corpora.items():
            if corpus.tokenizer.fingerprint() != self.corpora[first].tokenizer.fingerprint():
                raise ValueError(
                    f"data.parts: the tokenizers of {first!r} ({self.corpora[first].vocab_size} tokens) and {name!r} "
                    f"({corpus.vocab_size} tokens) differ, and a model has one; prepare both with the same "
                    f"data.tokenizer, such as {self.corpora[first].folder / TOKENIZER}"
                )

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self.corpora.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of names, tokenizer and token streams; the weights are no part of it."""
        state = blake2b(digest_size=16)
        for name, corpus in self.corpora.items():
            state.update(f"{name}\0{corpus.fingerprint}\0".encode())
        return state.hexdigest()

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the samples by its own weight."""
        return {name: float(share) for name, share in zip(self.corpora, self.cfg.shares(), strict=True)}

    @property
    def gzip_bits_per_byte(self) -> float:
        """That of the parts' validation texts, mixed like the samples: a part counts by its share of the bytes."""
        num_bytes = {
            name: self.shares[name] * corpus.num_bytes("validation") / corpus.num_tokens("validation")
            for name, corpus in self.corpora.items()
        }
        bits = sum(num_bytes[name] * corpus.gzip_bits_per_byte for name, corpus in self.corpora.items())
        return bits / sum(num_bytes.values())

    def num_tokens(self, split: Split) -> int:
        return sum(corpus.num_tokens(split) for corpus in self.corpora.values())

    def num_bytes(self, split: Split) -> int:
        return sum(corpus.num_bytes(split) for corpus in self.corpora.values())

    def num_documents(self, split: Split) -> int:
        return sum(corpus.num_documents(split) for corpus in self.corpora.values())


def open_data(
    cfg: CorpusConfig | MixtureConfig, cache_dir: Path, progress: Progress = lambda line: None
) -> Corpus | Mixture:
    """The corpus or mixture of a configuration, prepared if that was not done before; see `prepare`."""
    if isinstance(cfg, CorpusConfig):
        data: Corpus | Mixture = prepare(cfg, cache_dir, progress)
    else:
        cfg.validate()
        data = Mixture(cfg, _prepare_parts(cfg, cache_dir, progress))
    note = places_of(data, cache_dir)
    file = _note_file(cfg, cache_dir)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # a corpus that was prepared elsewhere (data.source=corpus:FOLDER) leaves this folder unmade
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(note), encoding="utf-8")
    partial.replace(file)
    return data


def look_up_data(
    cfg: CorpusConfig | MixtureConfig, cache_dir: Path, progress: Progress = lambda line: None
) -> Corpus | Mixture | dict[str, Survey]:
    """What `open_data` would give if that lies prepared, every byte checked, else what it would read, by part.

    Nothing is written. raises ValueError for what `open_data` refuses, as far as `check_source` sees it
    """
    if isinstance(cfg, CorpusConfig):
        return find_prepared(cfg, cache_dir, progress) or {ONE_CORPUS: check_source(cfg)}
    cfg.validate()
    shared: TokenizerConfig | None = cfg.tokenizer
    corpora: dict[str, Corpus] = {}
    surveys: dict[str, Survey] = {}
    for name in cfg.preparation_order():
        with _in_words_of_part(name):
            # without the tokenizer that is yet to be trained, no other part can be there
            found = find_prepared(cfg.corpus(name, shared), cache_dir, progress) if shared is not None else None
            if found is None:
                surveys[name] = check_source(cfg.corpus(name))
            else:
                corpora[name] = found
        if isinstance(shared, TrainBPE):
            shared = TokenizerFile(str(found.folder / TOKENIZER)) if found is not None else None
    return surveys or Mixture(cfg, {name: corpora[name] for name in cfg.names})


def find_data(cfg: CorpusConfig | MixtureConfig, cache_dir: Path) -> Corpus | Mixture | None:
    """What `open_data` last made of a configuration, None if that is nothing or gone. Reads no source: quick, but it
    does not see that a source has changed since.
    """
    try:
        note = json.loads(_note_file(cfg, cache_dir).read_text(encoding="utf-8"))
        return open_places(cfg, cache_dir, note)
    except (OSError, ValueError):
        return None


def places_of(data: Corpus | Mixture, cache_dir: Path) -> dict[str, str]:
    """Where the corpora lie, by name: below cache_dir, or a whole path for one that was prepared elsewhere."""

    def place(folder: Path) -> str:
        return folder.name if folder.parent.resolve() == cache_dir.resolve() else str(folder.resolve())

    return {name: place(corpus.folder) for name, corpus in corpora_of(data).items()}


def open_places(cfg: CorpusConfig | MixtureConfig, cache_dir: Path, places: dict[str, str]) -> Corpus | Mixture:
    """The data of a configuration from where `places_of` says that it lies; reads no source, and of the shards their
    sizes. raises ValueError as `open_corpus`
    """
    corpora = {name: open_corpus(cache_dir / place) for name, place in places.items()}
    return Mixture(cfg, corpora) if isinstance(cfg, MixtureConfig) else corpora[ONE_CORPUS]


def corpora_of(data: Corpus | Mixture) -> dict[str, Corpus]:
    """The corpora of a run's data by name; a corpus that is no mixture goes by `ONE_CORPUS`."""
    return data.corpora if isinstance(data, Mixture) else {ONE_CORPUS: data}


def training_streams(data: Corpus | Mixture, span_len: int) -> dict[str, TokenStream | KeptDocuments]:
    """The training text of each part, long documents (more than span_len tokens) left out where that was asked for.

    Keys are those of the sample order: "" for a corpus that is no mixture.
    """
    if isinstance(data, Corpus):
        return {"": data.stream("train")}
    streams: dict[str, TokenStream | KeptDocuments] = {}
    for name, corpus in data.corpora.items():
        stream = corpus.stream("train")
        drop = data.cfg.parts[name].long_documents == "drop"
        streams[name] = KeptDocuments(stream, span_len) if drop else stream
        if len(streams[name]) <= span_len:
            what = f"of its documents no longer than seq_len={span_len}" if drop else "in all"
            raise ValueError(
                f"data.parts.{name} has {len(streams[name])} training tokens {what}, and one sample needs "
                f"{span_len + 1}; lower seq_len, give it more text"
                + (f", or set data.parts.{name}.long_documents=cut" if drop else "")
            )
    return streams


def _prepare_parts(cfg: MixtureConfig, cache_dir: Path, progress: Progress) -> dict[str, Corpus]:
    """Prepare the part that the tokenizer is trained on, then the others with its tokenizer."""
    shared = cfg.tokenizer
    corpora: dict[str, Corpus] = {}
    for name in cfg.preparation_order():

        def tell(line: str, name: str = name) -> None:
            progress(f"{name}: {line}")

        with _in_words_of_part(name):
            corpora[name] = prepare(cfg.corpus(name, shared), cache_dir, tell)
        if isinstance(shared, TrainBPE):
            shared = TokenizerFile(str(corpora[name].folder / TOKENIZER))
    return {name: corpora[name] for name in cfg.names}


def _note_file(cfg: CorpusConfig | MixtureConfig, cache_dir: Path) -> Path:
    if isinstance(cfg, MixtureConfig):
        # Weights and the like say how the corpora are read, not what they are.
        parts = {
            name: replace(part, weight=1.0, max_epochs=None, long_documents="cut") for name, part in cfg.parts.items()
        }
        cfg = replace(cfg, parts=parts)
    return cache_dir / f".{config_hash(cfg)}.found.json"


@contextmanager
def _in_words_of_part(name: str) -> Iterator[None]:
    """Errors about `data.source` and `data.max_bytes` are about those of the part."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bdata\.(source|max_bytes)\b", rf"data.parts.{name}.\1", str(error))
        raise ValueError(text if text != str(error) else f"data.parts.{name}: {text}") from error
