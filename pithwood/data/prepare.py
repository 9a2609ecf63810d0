"""From a source of text to a prepared corpus on disk: read, choose, drop near-duplicates, split, train the BPE, encode.

The result is a pure function of the configuration and the documents, whatever the number of worker processes. It is
built in a hidden staging folder beside its final place (`build.py`) and renamed when complete, so a corpus is whole or
absent; a second call with the same inputs opens what the first one made.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pithwood.data.build import build, nothing_chosen, read_line
from pithwood.data.choice import check_distinct
from pithwood.data.corpus import MANIFEST, Corpus, open_corpus
from pithwood.data.job import CorpusConfig, Job, plain
from pithwood.data.prepared import PreparedCorpus
from pithwood.data.progress import Bar, Progress, Work
from pithwood.data.sources import Survey
from pithwood.data.spool import Tally, read_chunks
from pithwood.data.tokenizer import Tokenizer, TokenizerFile
from pithwood.errors import EXHAUSTED, explain_os_error

__all__ = ["CorpusConfig", "Progress", "check_source", "find_prepared", "prepare"]

_TRIED_BYTES = 100_000_000
"""Text of this size is read within a second or so."""


def prepare(
    cfg: CorpusConfig,
    cache_dir: Path,
    progress: Progress = lambda line: None,
    *,
    out: Path | None = None,
    workers: int | None = None,
    bar: Bar | None = None,
) -> Corpus:
    """The corpus of this configuration, from the cache if it was made before.

    cache_dir    holds one folder per (configuration, content); created if missing
    progress     called with one line of text at each stage
    out          the corpus's folder, instead of one in cache_dir
    workers      processes, at least 1; by default one per core, but one for a small source
    bar          called with (stage, bytes done, bytes in all or None); without it progress gets lines now and then
    raises       ValueError if the configuration is out of range, the source holds too little usable text, the
                 disk cannot be written, `out` holds something else, or the prepared corpus is altered

    Processes that prepare the same corpus at once wait for the first (a file lock, so POSIX only).
    """
    cfg.validate()
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if isinstance(cfg.source, PreparedCorpus):
        return _open_prepared(cfg.source, cfg.vocab_size, progress)
    job = _job(cfg, cache_dir, Work(progress, bar), out, workers)
    # What is complete never changes, so neither a lock nor a folder that can be written is needed to open it.
    if not job.staging.exists():
        found = _find(job)
        if found is not None:
            return found
    with _writing(job):
        job.parent.mkdir(parents=True, exist_ok=True)
        with _lock(job.parent / f".{job.name}.lock", progress):
            found = _find(job)
            if found is not None:
                shutil.rmtree(job.staging, ignore_errors=True)
                return found
            try:
                final = build(job)
            except ValueError:
                # What is refused must be changed, and then nothing of this is the same.
                shutil.rmtree(job.staging, ignore_errors=True)
                raise
            shutil.rmtree(job.staging, ignore_errors=True)
    return open_corpus(final)


def find_prepared(cfg: CorpusConfig, cache_dir: Path, progress: Progress = lambda line: None) -> Corpus | None:
    """The corpus of this configuration if it lies prepared, every byte checked; None if `prepare` has yet to make it.

    Nothing is written. raises ValueError for what `prepare` refuses before it reads
    """
    cfg.validate()
    if isinstance(cfg.source, PreparedCorpus):
        return _open_prepared(cfg.source, cfg.vocab_size, progress)
    return _find(_job(cfg, cache_dir, Work(progress)))


def check_source(cfg: CorpusConfig) -> Survey:
    """What `prepare` would read, tried without writing anything; raises ValueError for what it would refuse.

    Up to 100 MB are read to the end. Of more, or of unknown size, only the beginning is: what is wrong behind it is
    found when it is prepared.
    """
    cfg.validate()
    _load_tokenizer(cfg)
    survey = cfg.source.survey()
    whole = survey.bytes is not None and survey.bytes <= _TRIED_BYTES
    distinct: set[bytes] = set()
    tally = Tally()
    for _, _, hashes in read_chunks(cfg.source, tally):
        distinct.update(hashes)
        if len(distinct) >= 2 and not whole:
            return survey
    if not distinct or (cfg.max_bytes is not None and cfg.max_bytes < tally.smallest):
        raise ValueError(nothing_chosen(cfg, tally))
    check_distinct(len(distinct))
    return survey


def _job(cfg: CorpusConfig, cache_dir: Path, work: Work, out: Path | None = None, workers: int | None = None) -> Job:
    """The corpus to be made or found; raises ValueError if its tokenizer or its source cannot be had."""
    loaded = _load_tokenizer(cfg)
    cfg = replace(cfg, source=cfg.source.pinned())
    return Job(cfg, loaded, cache_dir, out, cfg.source.survey(), work, workers)


def _find(job: Job) -> Corpus | None:
    """The corpus if it lies there complete; raises ValueError if something else lies in its place."""
    if job.out is None:
        candidates = [path for path in job.parent.glob(f"{job.settings}*") if path.is_dir()]
    else:
        candidates = [job.out.absolute()] if _made_alike(job) else []
    if not candidates:
        return None
    tally, digests = Tally(), []
    if job.cfg.source.identity() is None:
        job.work.begin("reading", job.survey.bytes)
        for digest, documents, _ in read_chunks(job.cfg.source, tally):
            digests.append(digest)
            job.work.advance(sum(len(document.content) for document in documents))
    key = job.key(digests)
    if job.out is not None and _manifest(job.out)["key"] != key:
        raise ValueError(
            f"{job.out} holds a corpus of the same settings, but the text of its source has changed since; "
            "choose another --out, or delete it"
        )
    final = job.final(key)
    if not final.exists():
        return None
    corpus = open_corpus(final)
    # An altered token would train silently, or fail far from its cause.
    corpus.verify()
    if digests:
        job.work.tell(read_line(job, tally))
    job.work.tell(f"corpus: found prepared in {final}")
    return corpus


def _made_alike(job: Job) -> bool:
    """Whether `out` holds a corpus of these settings; raises ValueError if it holds anything else."""
    assert job.out is not None
    if not job.out.exists() or (job.out.is_dir() and not any(job.out.iterdir())):
        return False
    if not (job.out / MANIFEST).is_file():
        raise ValueError(f"{job.out} exists and is no prepared corpus; choose another --out, nothing was changed in it")
    manifest = _manifest(job.out)
    if str(manifest.get("key", ""))[: len(job.settings)] == job.settings:
        return True
    old, new = _leaves(manifest.get("config", {})), _leaves(json.loads(json.dumps(plain(job.cfg))))
    differing = [
        f"{name} (there {json.dumps(old.get(name))}, asked {json.dumps(new.get(name))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    raise ValueError(
        f"{job.out} holds a corpus of other settings: {', '.join(differing) or 'another tokenizer'}; "
        "choose another --out, ask for the same settings, or delete it"
    )


def _open_prepared(source: PreparedCorpus, vocab_size: int, progress: Progress) -> Corpus:
    """The corpus that the source names, every byte checked."""
    corpus = source.open()
    corpus.verify()
    if corpus.vocab_size > vocab_size:
        raise ValueError(_too_many_tokens(vocab_size, corpus.vocab_size, f"data.source.path={source.path!r}"))
    progress(f"corpus: found prepared in {source.path}")
    return corpus


def _load_tokenizer(cfg: CorpusConfig) -> Tokenizer | None:
    """The tokenizer that the configuration names, None if one is to be trained."""
    if not isinstance(cfg.tokenizer, TokenizerFile):
        return None
    tokenizer = cfg.tokenizer.load()
    if tokenizer.vocab_size > cfg.vocab_size:
        where = f"data.tokenizer.path={cfg.tokenizer.path!r}"
        raise ValueError(_too_many_tokens(cfg.vocab_size, tokenizer.vocab_size, where))
    return tokenizer


def _too_many_tokens(allowed: int, given: int, where: str) -> str:
    return (
        f"data.vocab_size={allowed} is less than the {given} tokens of {where}; set data.vocab_size={given} "
        "(and model.vocab_size no lower)"
    )


def _leaves(value: Any, path: str = "data") -> dict[str, Any]:
    """Path -> value of all settings that hold no others."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, item in value.items() for name, leaf in _leaves(item, f"{path}.{key}").items()}


def _manifest(folder: Path) -> dict[str, Any]:
    return open_corpus(folder).manifest


@contextmanager
def _writing(job: Job) -> Iterator[None]:
    """Say in the user's words what keeps files from being written."""
    try:
        yield
    except OSError as error:
        if error.errno in EXHAUSTED:
            told = explain_os_error(error, unnamed=str(job.staging))
            raise OSError(
                error.errno,
                f"{told} (about three times the text is needed); everything else is intact, and the same command goes "
                f"on where it stopped. Deleting {job.staging} gives up what was done",
            ) from error
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
            errno.ENOENT,
        ):
            where = error.filename or job.parent
            raise ValueError(
                f"cannot write {where}: {error.strerror}; choose a folder that can be written, with "
                f"{'--runs-dir' if job.out is None else '--out'}"
            ) from error
        raise


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on a file that stays behind; the system releases it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("corpus: another process prepares the same; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
