"""What worker processes of `prepare` compute: one task reads a slice of an index, and leaves a file when it is done.

Every task is a pure function of its arguments and the spool. Its last file appears by a rename: where that file is, the
task need not be done again.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pithwood.data.corpus import VALIDATION_TEXT
from pithwood.data.dedup import NUM_MINHASHES, band_keys, minhashes, rows_per_band, shingles, sketch
from pithwood.data.pieces import PieceEncoder
from pithwood.data.spool import SpoolReader, rank, write_array, write_whole
from pithwood.data.tokenizer import load_tokenizer
from pithwood.errors import naming


def measured_dtype(threshold: float | None) -> np.dtype[Any]:
    """What `Measure` finds: the rank that splits; for deduplication also shingle count, band keys and sketch."""
    fields: list[Any] = [("split", "V16")]
    if threshold is not None:
        fields += [
            ("shingles", "<i8"),
            ("bands", "<u8", (NUM_MINHASHES // rows_per_band(threshold),)),
            ("sketch", "u1", (NUM_MINHASHES,)),
        ]
    return np.dtype(fields)


@dataclass(frozen=True)
class Measure:
    """Write [stop - start] `measured_dtype` of the documents at these rows of an index."""

    spool: str
    index: str
    start: int
    stop: int
    seed: int
    threshold: float | None
    out: str

    def done(self) -> bool:
        return Path(self.out).is_file()

    def run(self) -> None:
        rows = np.load(self.index)[self.start : self.stop]
        measured = np.zeros(len(rows), dtype=measured_dtype(self.threshold))
        with SpoolReader(Path(self.spool)) as reader:
            for row, record in enumerate(rows):
                content = reader.content(record)
                measured["split"][row] = rank(f"split/{self.seed}", content)
                if self.threshold is not None:
                    found = shingles(content)
                    measured["shingles"][row] = found.size
                    least = minhashes(found)
                    measured["bands"][row] = band_keys(least, rows_per_band(self.threshold))
                    measured["sketch"][row] = sketch(least)
        write_array(Path(self.out), measured)


@dataclass(frozen=True)
class Encode:
    """Write the tokens of the documents at these rows: OUT.bin, their records OUT.jsonl, and their lengths OUT.npy.

    A document's tokens begin with the end-of-text token. All but the first token of a split are trained on (or scored):
    `loss_tokens` of a record.
    """

    spool: str
    index: str
    start: int
    stop: int
    split: str
    first: bool
    """Whether the split begins here."""
    tokenizer: str
    dtype: str
    out: str

    def done(self) -> bool:
        return Path(f"{self.out}.npy").is_file()

    def run(self) -> None:
        rows = np.load(self.index, mmap_mode="r")[self.start : self.stop]
        encoder, end_of_text_id = _encoder(self.tokenizer)
        lengths = np.zeros(len(rows), dtype="<i8")
        dtype = np.dtype(self.dtype).newbyteorder("<")
        with (
            naming(f"{self.out}.bin"),
            SpoolReader(Path(self.spool)) as reader,
            Path(f"{self.out}.bin").open("wb") as tokens,
            Path(f"{self.out}.jsonl").open("wb") as lines,
        ):
            for row, record in enumerate(rows):
                ids = encoder.encode(reader.content(record).decode("utf-8"))
                np.array([end_of_text_id], dtype=dtype).tofile(tokens)
                np.frombuffer(ids, dtype=np.uintc).astype(dtype).tofile(tokens)
                lengths[row] = len(ids) + 1
                line = {
                    "name": reader.name(record),
                    "split": self.split,
                    "bytes": int(record["size"]),
                    "tokens": len(ids) + 1,
                    "loss_tokens": len(ids) + (0 if self.first and row == 0 else 1),
                    "blake2b": record["content"].tobytes().hex(),
                }
                lines.write(json.dumps(line).encode() + b"\n")
        write_array(Path(f"{self.out}.npy"), lengths)


@dataclass(frozen=True)
class WriteValidationText:
    """Write the documents at these rows one after another, and what `gzip -9` makes of them in `gzip.json`."""

    spool: str
    index: str
    start: int
    stop: int
    out: str
    """Folder of the two files."""

    def done(self) -> bool:
        return (Path(self.out) / "gzip.json").is_file()

    def run(self) -> None:
        rows, folder = np.load(self.index, mmap_mode="r")[self.start : self.stop], Path(self.out)
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        size = packed = 0
        text = folder / VALIDATION_TEXT
        with naming(text), SpoolReader(Path(self.spool)) as reader, text.open("wb") as file:
            for record in rows:
                content = reader.content(record)
                file.write(content)
                packed += len(packer.compress(content))
                size += len(content)
        packed += len(packer.flush())
        write_whole(folder / "gzip.json", json.dumps({"bytes": size, "gzip_bytes": packed}).encode())


Task = Measure | Encode | WriteValidationText
TASKS: dict[str, type[Task]] = {cls.__name__: cls for cls in (Measure, Encode, WriteValidationText)}


def to_line(task: Task) -> bytes:
    """A task as a line of JSON."""
    return json.dumps([type(task).__name__, asdict(task)]).encode() + b"\n"


def from_line(line: bytes) -> Task:
    """The task of a line."""
    name, fields = json.loads(line)
    return TASKS[name](**fields)


def _encoder(path: str) -> tuple[PieceEncoder, int]:
    return _loaded(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _loaded(path: str, written_ns: int) -> tuple[PieceEncoder, int]:
    # Kept between tasks: the encoder has learned, and a vocabulary of 150,000 tokens takes longer to load than a task.
    tokenizer = load_tokenizer(Path(path))
    return PieceEncoder(tokenizer), tokenizer.end_of_text_id
