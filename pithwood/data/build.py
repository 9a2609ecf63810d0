"""Make a corpus in its staging folder, stage after stage, going on with what an interrupted prepare left there.

Every stage is a function of files that are whole or absent, so it can be repeated at any point:

    spool/          the text once, in chunks of 4 MB (`spool.py`)
    measured/       per chunk: ranks, and for deduplication shingle counts, band keys and sketches (`tasks.py`)
    work-<key>/     for this content: dropped.npy, plan.npy (the order), tokenizer.json, encoded pieces
    corpus/         the finished files (`shards.py`; layout as in `corpus.py`), renamed last

Memory: some 400 bytes per document, and a few chunks per process. Disk: while it works about three times the text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pithwood.data.choice import choose, slices, split
from pithwood.data.corpus import FORMAT_VERSION, MANIFEST, SPLITS, TOKENIZER, VALIDATION_TEXT, Split, hash_file
from pithwood.data.dedup import near_duplicates
from pithwood.data.job import CorpusConfig, Job, hash_json, plain
from pithwood.data.shards import assemble, sync
from pithwood.data.spool import CHUNK_BYTES, Spool, SpoolReader, Tally, write_array, write_whole
from pithwood.data.tasks import Encode, Measure, Task, WriteValidationText
from pithwood.data.tokenizer import Tokenizer, TrainBPE, load_tokenizer, train_tokenizer
from pithwood.data.workers import Workers

_STAGING = {"staging": 2, "tokenizers": tokenizers.__version__, "numpy": np.__version__}
"""What must be the same for an interrupted prepare to go on."""


def build(job: Job) -> Path:
    """Make the corpus, going on with what lies in its staging folder; returns where it lies."""
    cfg, work = job.cfg, job.work
    _open_staging(job)
    spool = Spool(job.staging / "spool", cfg.seed)
    measured = job.staging / "measured"
    measured.mkdir(exist_ok=True)

    def measure(index: Path, start: int, stop: int, name: str) -> Measure:
        out = measured / f"{name}.npy"
        return Measure(str(spool.folder), str(index), start, stop, cfg.seed, cfg.dedup_threshold, str(out))

    def measure_chunks() -> Iterator[tuple[Task, int]]:
        for name in spool.fill(cfg.source):
            index = spool.folder / f"{name}.npy"
            rows = np.load(index)
            parts.append(measured / f"{name}.npy")
            yield measure(index, 0, len(rows), name), int(rows["size"].sum())

    parts: list[Path] = []
    with Workers(job.workers) as pool:
        work.begin("reading", job.survey.bytes)
        if cfg.max_bytes is None:
            pool.run(measure_chunks(), work.advance)
        else:
            for name in spool.fill(cfg.source):
                work.advance(int(np.load(spool.folder / f"{name}.npy")["size"].sum()))
        work.tell(read_line(job, spool.tally))
        if spool.reused:
            work.tell(f"corpus: {spool.reused} of {len(spool.digests)} chunks were read before the interruption")
        key = job.key(spool.digests)
        folder = job.staging / f"work-{key}"
        for other in job.staging.glob("work-*"):
            if other != folder:
                shutil.rmtree(other)
        (folder / "pieces").mkdir(parents=True, exist_ok=True)

        index = choose(spool.index(), cfg.max_bytes)
        if not len(index):
            raise ValueError(nothing_chosen(cfg, spool.tally))
        if cfg.max_bytes is not None:
            write_array(folder / "chosen.npy", index)
            tasks: list[tuple[Task, int]] = []
            for start, stop in slices(index["size"], CHUNK_BYTES):
                task = measure(folder / "chosen.npy", start, stop, f"{key}-{start}")
                parts.append(Path(task.out))
                tasks.append((task, int(index["size"][start:stop].sum())))
            work.begin("measuring", int(index["size"].sum()))
            pool.run(tasks, work.advance)

        dropped = _drop_duplicates(job, index, parts, spool.folder, folder / "dropped.npy")
        work.tell(f"corpus: {_size(index[~dropped])} remain, {int(dropped.sum())} near-duplicates dropped")
        rank = np.concatenate([np.load(part)["split"] for part in parts])[~dropped]
        index = index[~dropped]
        train, validation = split(index, rank, cfg.validation_fraction)
        plan = index[np.concatenate([train, validation])]
        write_array(folder / "plan.npy", plan)
        for name, rows in (("train", plan[: train.size]), ("validation", plan[train.size :])):
            work.tell(f"corpus: {name} {_size(rows)}")

        tokenizer = _make_tokenizer(job, plan[: train.size], spool.folder, folder / TOKENIZER)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        pieces = _encode(job, pool, plan, train.size, spool.folder, folder, dtype)
    return _finish(job, key, folder, pieces, plan, train.size, tokenizer, dtype, spool.tally, int(dropped.sum()))


def _open_staging(job: Job) -> None:
    """Make the staging folder, or say that work goes on in the one that an interrupted prepare left."""
    made_by = job.staging / "made_by.json"
    expected = {**_STAGING, "settings": job.settings}
    if made_by.is_file() and json.loads(made_by.read_text(encoding="utf-8")) == expected:
        job.work.tell(f"corpus: resuming the prepare that was interrupted, from {job.staging}")
        return
    if job.staging.exists():
        job.work.tell("corpus: an interrupted prepare of other settings or library versions is discarded")
        shutil.rmtree(job.staging)
    job.staging.mkdir()
    write_whole(made_by, json.dumps(expected).encode())


def _drop_duplicates(job: Job, index: NDArray[Any], parts: list[Path], spool: Path, done: Path) -> NDArray[np.bool_]:
    """[documents of the index] bool: which are near-duplicates of an earlier one."""
    threshold = job.cfg.dedup_threshold
    if threshold is None:
        return np.zeros(len(index), dtype=bool)
    if done.is_file():
        return np.load(done)

    def band(number: int) -> NDArray[np.uint64]:
        return np.concatenate([np.load(part)["bands"][:, number] for part in parts])

    num_bands = np.load(parts[0])["bands"].shape[1]
    shingle_counts = np.concatenate([np.load(part)["shingles"] for part in parts])
    ends = np.cumsum(index["size"])
    reached = 0

    def progress(count: int) -> None:
        nonlocal reached
        job.work.advance(int(ends[count - 1]) - reached)
        reached = int(ends[count - 1])

    job.work.begin("comparing", int(ends[-1]))
    with SpoolReader(spool) as reader:
        dropped = near_duplicates(
            [lambda number=number: band(number) for number in range(num_bands)],  # type: ignore[misc]
            shingle_counts,
            np.concatenate([np.load(part)["sketch"] for part in parts]),
            index["content"],
            lambda row: reader.content(index[row]),
            threshold,
            progress,
        )
    write_array(done, dropped)
    return dropped


def _make_tokenizer(job: Job, train: NDArray[Any], spool: Path, path: Path) -> Tokenizer:
    """The tokenizer of the corpus, saved at `path`: the loaded one, or one trained on the first training documents."""
    if path.is_file():
        return load_tokenizer(path)
    tokenizer, config = job.loaded, job.cfg.tokenizer
    if tokenizer is None:
        assert isinstance(config, TrainBPE)
        ends = np.cumsum(train["size"])
        taken = train[: max(1, int(np.searchsorted(ends, config.sample_bytes, side="right")))]
        job.work.tell(f"tokenizer: training {job.cfg.vocab_size} tokens on {_size(taken)}")
        job.work.begin("training the tokenizer on", int(taken["size"].sum()))

        def texts(reader: SpoolReader) -> Iterator[str]:
            for record in taken:
                yield reader.content(record).decode("utf-8")
                job.work.advance(int(record["size"]))

        with SpoolReader(spool) as reader:
            tokenizer = train_tokenizer(texts(reader), job.cfg.vocab_size)
    write_whole(path, tokenizer.to_json().encode())
    return tokenizer


def _encode(
    job: Job, pool: Workers, plan: NDArray[Any], num_train: int, spool: Path, folder: Path, dtype: str
) -> dict[Split, list[Path]]:
    """Encode all documents in their order; returns the pieces of each split."""
    text = WriteValidationText(str(spool), str(folder / "plan.npy"), num_train, len(plan), str(folder))
    tasks: list[tuple[Task, int]] = [(text, 0)]
    pieces: dict[Split, list[Path]] = {}
    for name, first, last in zip(SPLITS, (0, num_train), (num_train, len(plan)), strict=True):
        pieces[name] = []
        for start, stop in slices(plan["size"][first:last], CHUNK_BYTES):
            out = folder / "pieces" / f"{name}-{len(pieces[name]):06d}"
            pieces[name].append(out)
            task = Encode(
                spool=str(spool),
                index=str(folder / "plan.npy"),
                start=first + start,
                stop=first + stop,
                split=name,
                first=start == 0,
                tokenizer=str(folder / TOKENIZER),
                dtype=dtype,
                out=str(out),
            )
            tasks.append((task, int(plan["size"][first + start : first + stop].sum())))
    done = sum(task.done() for task, _ in tasks[1:])
    if done:
        job.work.tell(f"corpus: {done} of {len(tasks) - 1} pieces were encoded before the interruption")
    job.work.tell(f"corpus: encoding {_size(plan)}")
    job.work.begin("encoding", int(plan["size"].sum()))
    pool.run(tasks, job.work.advance)
    return pieces


def _finish(
    job: Job,
    key: str,
    work_folder: Path,
    pieces: dict[Split, list[Path]],
    plan: NDArray[Any],
    num_train: int,
    tokenizer: Tokenizer,
    dtype: str,
    tally: Tally,
    num_duplicates: int,
) -> Path:
    """Write the files of the corpus, the manifest last, and rename their folder into its place."""
    cfg, tell, folder = job.cfg, job.work.tell, job.staging / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(work_folder / TOKENIZER, folder / TOKENIZER)
    shutil.copyfile(work_folder / VALIDATION_TEXT, folder / VALIDATION_TEXT)
    sizes = {"train": int(plan["size"][:num_train].sum()), "validation": int(plan["size"][num_train:].sum())}
    splits = {}
    for name in SPLITS:
        entry = assemble(folder, name, pieces[name], dtype, cfg.shard_tokens)
        splits[name] = {"bytes": sizes[name], **entry}
        tell(f"corpus: {name} {entry['tokens']:,} tokens in {len(entry['shards'])} shards")
    gzip_bytes = json.loads((work_folder / "gzip.json").read_text(encoding="utf-8"))["gzip_bytes"]
    gzip_bits_per_byte = 8 * gzip_bytes / sizes["validation"]
    tell(f"corpus: gzip -9 of the validation text is {gzip_bits_per_byte:.4f} bits per byte")

    files = {path.name: {"size": path.stat().st_size, "blake2b": hash_file(path)} for path in sorted(folder.iterdir())}
    streams = {name: entry["blake2b"] for name, entry in files.items() if name.endswith(".bin") or name == TOKENIZER}
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "fingerprint": hash_json(streams),
        "config": plain(cfg),
        "source": {
            "description": job.survey.description,
            "documents": tally.documents,
            "bytes": tally.bytes,
            "undecodable": tally.undecodable,
            "empty": tally.empty,
            "beyond_max_bytes": tally.documents - len(plan) - num_duplicates,
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
        "splits": splits,
        "gzip_bytes": gzip_bytes,
        "gzip_bits_per_byte": gzip_bits_per_byte,
        "files": files,
    }
    for path in folder.iterdir():
        sync(path)
    tell("corpus: writing the manifest")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    tell("corpus: complete")
    sync(folder)
    final = job.final(key)
    if final.is_dir():  # an `out` that the user made, empty
        final.rmdir()
    folder.rename(final)
    sync(final.parent)
    return final


def nothing_chosen(cfg: CorpusConfig, tally: Tally) -> str:
    """Why no document is left, for the user."""
    if tally.documents:
        return f"data.max_bytes={cfg.max_bytes} is less than the smallest document ({tally.smallest} bytes)"
    return "data.source holds no documents: every file is empty or not UTF-8; give a source with text"


def _size(index: NDArray[Any]) -> str:
    return f"{len(index)} documents ({int(index['size'].sum()) / 1e6:.2f} MB)"


def read_line(job: Job, tally: Tally) -> str:
    """What was read and what was left out, for the user."""
    counts = [(tally.undecodable, "not UTF-8"), (tally.empty, "empty")]
    parts = [f"{count} {why}" for count, why in counts if count]
    left_out = f"; left out: {', '.join(parts)}" if parts else ""
    return f"corpus: {tally.documents} documents ({tally.bytes / 1e6:.2f} MB) of {job.survey.description}{left_out}"
