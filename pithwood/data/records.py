"""Sources of many documents per file: JSON lines, Parquet columns, and Hugging Face datasets.

The last two, and JSON lines compressed as .zst, need the extra `data` (pyarrow, datasets).
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pithwood.data.sources import (
    Document,
    LeftOut,
    Source,
    Survey,
    check_pattern,
    resolve_files,
    split_glob,
    survey_files,
)


@dataclass(frozen=True)
class JsonLinesSource(Source):
    """Files of JSON objects, one a line, with the text in one field; plain, .gz or .zst."""

    path: str
    """File, glob, or folder to read; relative to the working directory, `~` allowed."""
    field: str = "text"
    """Key that holds the text; `a.b` looks into objects."""
    pattern: str = "**/*.json*"
    """Glob below `path` where that is a folder."""

    def validate(self) -> None:
        """Raise ValueError if the field is empty or the pattern leaves the folder."""
        if not self.field:
            raise ValueError("data.source.field is empty; give the key that holds the text")
        check_pattern(self.pattern, "**/*.jsonl.gz")

    def documents(self) -> Iterator[Document | LeftOut]:
        keys = self.field.split(".")
        for name, path in self._paths():
            for number, line in _lines(path):
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8 (byte {error.start}: {error.reason})") from error
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON ({error}); each line must be one object") from error
                yield _document(f"{name}:{number}", _at(record, keys, self.field, where))

    def survey(self) -> Survey:
        return survey_files(f"field {self.field!r} of JSON lines in {Path(self.path).name}", self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        self.validate()
        folder, pattern = split_glob(self.path)
        return resolve_files(folder, pattern or self.pattern, "the .jsonl files")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank; a broken file is refused where it breaks."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        broken = path.suffix in (".gz", ".zst")
        what = f"is broken after line {number}" if broken else "cannot be read"
        raise ValueError(f"{path} {what}: {error}; {'fetch it again' if broken else 'check it'}") from error


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return cast(io.BufferedIOBase, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        pyarrow = need("pyarrow", f"{path.name} is compressed as .zst")
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


def _at(record: Any, keys: list[str], field: str, where: str) -> Any:
    """The value of a record's field; ValueError, with the fields it has, if it is not there."""
    for key in keys:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {type(record).__name__}, not an object with the field {field!r}")
        if key not in record:
            raise ValueError(
                f"{where} has no field {field!r}; set data.source.field to one of: {', '.join(list(record)[:12])}"
            )
        record = record[key]
    if record is not None and not isinstance(record, str):
        raise ValueError(f"{where}: the field {field!r} holds {type(record).__name__}, not text; set data.source.field")
    return record


def _document(name: str, text: str | None) -> Document | LeftOut:
    """A record's text as a document; nothing and half a surrogate pair (which UTF-8 lacks) are left out."""
    if not text:
        return LeftOut(name, "empty")
    try:
        return Document(name, text.encode("utf-8"))
    except UnicodeEncodeError:
        return LeftOut(name, "not UTF-8")


@dataclass(frozen=True)
class ParquetSource(Source):
    """A text column of Parquet files, one document per row; needs pyarrow (extra `data`)."""

    path: str
    """File, glob, or folder to read; relative to the working directory, `~` allowed."""
    column: str = "text"
    """Column that holds the text."""
    pattern: str = "**/*.parquet"
    """Glob below `path` where that is a folder."""

    def validate(self) -> None:
        """Raise ValueError if the column is empty or the pattern leaves the folder."""
        if not self.column:
            raise ValueError("data.source.column is empty; give the column that holds the text")
        check_pattern(self.pattern, "**/*.parquet")

    def documents(self) -> Iterator[Document | LeftOut]:
        parquet = need("pyarrow.parquet", "data.source=ParquetSource")
        for name, path in self._paths():
            row = 0
            try:
                with parquet.ParquetFile(path) as file:
                    _check_column(file.schema_arrow, self.column, path)
                    for block in file.iter_batches(batch_size=1024, columns=[self.column]):
                        for text in block.column(0).to_pylist():
                            yield _document(f"{name}:{row}", text)
                            row += 1
            except OSError as error:
                raise ValueError(f"{path} is broken after row {row}: {error}; fetch it again") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, near row {row}: the text is not UTF-8 ({error.reason})") from error
            except Exception as error:
                # pyarrow's own errors derive from ValueError or nothing in common; its module name tells them.
                if type(error).__module__.partition(".")[0] != "pyarrow":
                    raise
                raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from error

    def survey(self) -> Survey:
        return survey_files(f"column {self.column!r} of Parquet files in {Path(self.path).name}", self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        self.validate()
        folder, pattern = split_glob(self.path)
        return resolve_files(folder, pattern or self.pattern, "the .parquet files")


def _check_column(schema: Any, column: str, path: Path) -> None:
    names = [str(name) for name in schema.names]
    if column not in names:
        raise ValueError(
            f"{path} has no column {column!r}; set data.source.column to one of: {', '.join(names[:12]) or 'none'}"
        )
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: column {column!r} holds {kind}, not text; set data.source.column")


@dataclass(frozen=True)
class HuggingFaceSource(Source):
    """A dataset of the Hugging Face hub (or of a local folder), streamed by `datasets` (extra `data`)."""

    name: str
    """Dataset id, such as roneneldan/TinyStories, or the path of a local folder that `datasets` can load."""
    config: str | None = None
    """Configuration of the dataset; null takes its default."""
    split: str = "train"
    """Split of the dataset to read; validation documents are held out of it."""
    field: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Commit (40 hex digits) of the dataset; null asks the hub for the newest each time. A pinned corpus that is
    prepared is found without a network."""
    max_documents: int | None = None
    """Read only the first so many rows, at least 1; null reads all."""

    def validate(self) -> None:
        """Raise ValueError if a field is empty or out of range."""
        for key in ("name", "split", "field"):
            if not getattr(self, key):
                raise ValueError(f"data.source.{key} is empty; a Hugging Face dataset needs it")
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"data.source.revision={self.revision!r} must be a commit of 40 hex digits, which names the data for "
                "ever, or null for the newest"
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"data.source.max_documents={self.max_documents} must be at least 1, or null for all")

    def documents(self) -> Iterator[Document | LeftOut]:
        self.validate()
        datasets = need("datasets", f"data.source=hf:{self.name}")
        with self._refusing("loaded"):
            stream = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        if self.max_documents is not None:
            stream = stream.take(self.max_documents)
        rows = iter(stream)
        row = 0
        while True:
            with self._refusing(f"read after row {row}"):
                record = next(rows, None)
            if record is None:
                return
            if self.field not in record:
                raise ValueError(
                    f"data.source.field={self.field!r} is no column of {self.name}; it has: "
                    f"{', '.join(list(record)[:12])}"
                )
            text = record[self.field]
            if text is not None and not isinstance(text, str):
                raise ValueError(f"data.source.field={self.field!r} holds {type(text).__name__} in row {row}, not text")
            yield _document(f"{self.split}:{row}", text)
            row += 1

    def survey(self) -> Survey:
        return Survey(f"Hugging Face dataset {self.name}", None, None)

    def identity(self) -> str | None:
        return None if self._is_local() or self.revision is None else f"{self.name}@{self.revision}"

    def pinned(self) -> HuggingFaceSource:
        """The same at the commit that the hub calls the newest; raises ValueError where it cannot be asked."""
        if self.revision is not None or self._is_local():
            return self
        hub = need("huggingface_hub", f"data.source=hf:{self.name}")
        with self._refusing("found"):
            sha = hub.HfApi().dataset_info(self.name, timeout=20).sha
        return HuggingFaceSource(self.name, self.config, self.split, self.field, sha, self.max_documents)

    def _is_local(self) -> bool:
        return Path(self.name).expanduser().is_dir()

    def _refusing(self, what: str) -> _Refusing:
        return _Refusing(f"data.source=hf:{self.name} cannot be {what}")


class _Refusing:
    """Turns whatever a library of the hub raises into one line. They raise errors of many packages: of the network,
    the file system, the formats, and bare Exceptions."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
            raise ValueError(
                f"{self._what} ({reason}); check the name, the split and the network, or download the files and give "
                "their path"
            ) from error


def need(module: str, what: str) -> Any:
    """A module of the extra `data`; raises ValueError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{what} needs the package {package}: pip install 'pithwood[data]' ({error})") from error
