"""Where text comes from: documents in a fixed order, each with a name that does not depend on the machine.

A source yields one document after another and never holds more than one (or one block of a columnar file) in memory.
Here are the base, files of text, and what Python itself installs; `pithwood/data/records.py` reads JSON lines, Parquet
and Hugging Face datasets.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

SHORT_FORMS = (
    "a folder, file or glob of text, *.jsonl[.gz|.zst], *.parquet, stdlib, packages, hf:DATASET[/CONFIG], "
    "corpus:FOLDER (prepared before), "
    "or several separated by commas"
)
"""What `data.source=...` and `pithwood prepare` take besides JSON and class names."""


@dataclass(frozen=True)
class Document:
    name: str
    """POSIX path below the source's root, with the line or row where a file holds many."""
    content: bytes
    """Valid, non-empty UTF-8, byte for byte what the file holds (no newline translation, byte order marks kept)."""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8")


@dataclass(frozen=True)
class LeftOut:
    """A file or record that became no document."""

    name: str
    why: Literal["not UTF-8", "empty"]


@dataclass(frozen=True)
class Survey:
    """What a source would read, found without reading it."""

    description: str
    files: int | None
    """None where that is known only to a server."""
    bytes: int | None
    """Size of the files as they lie there, compressed or not; None where that is known only to a server."""


@dataclass(frozen=True)
class Source(ABC):
    """Base of all text sources; one from outside this package needs only to subclass it."""

    @abstractmethod
    def documents(self) -> Iterator[Document | LeftOut]:
        """All documents, in the same order on every machine, and what was left out between them.

        raises ValueError in the words of the config if there is nothing to read, or something cannot be read
        """

    @abstractmethod
    def survey(self) -> Survey:
        """What `documents` would read; raises ValueError if there is nothing."""

    def identity(self) -> str | None:
        """A text that stands for the content for ever (a pinned revision), so that it need not be read to be known.

        None, as for everything that lies in a file system, if only the content tells.
        """
        return None

    def pinned(self) -> Source:
        """The same source with everything that moves made fast (a dataset's newest revision, asked of its server)."""
        return self

    def validate(self) -> None:  # noqa: B027 (a source without fields has nothing to check)
        """Raise ValueError if a field is out of range; touches no files."""

    @classmethod
    def from_text(cls, text: str) -> Source:
        """The source that a short text means: see SHORT_FORMS. Its parts must exist only when it is read."""
        from pithwood.data.prepared import PreparedCorpus
        from pithwood.data.records import HuggingFaceSource, JsonLinesSource, ParquetSource  # they derive from Source

        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 1:
            return SeveralSources(tuple(Source.from_text(part) for part in parts))
        word = parts[0]
        if not word:
            raise ValueError(f"data.source is empty; give {SHORT_FORMS}")
        if word.startswith("corpus:"):
            return PreparedCorpus(word.removeprefix("corpus:"))
        if word.startswith("hf:"):
            name, _, config = _split_dataset(word.removeprefix("hf:"))
            return HuggingFaceSource(name, config=config or None)
        if word in ("stdlib", "packages"):
            return StdlibSource() if word == "stdlib" else PackagesSource()
        if re.search(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", word):
            return JsonLinesSource(word)
        if word.endswith(".parquet"):
            return ParquetSource(word)
        folder, pattern = split_glob(word)
        return TextFolder(folder, pattern or "**/*")


def _split_dataset(text: str) -> tuple[str, str, str]:
    """Name and configuration of a dataset written as name, owner/name or owner/name/config."""
    owner, _, rest = text.partition("/")
    name, slash, config = rest.partition("/")
    return (f"{owner}/{name}" if name else owner), slash, config


@dataclass(frozen=True)
class StdlibSource(Source):
    """The Python standard library's own source, as installed beside this interpreter.

    Left out: its tests, installed packages, bundled wheels, files generated for one machine, and files that are not
    UTF-8 (a module may declare another encoding).
    """

    def documents(self) -> Iterator[Document | LeftOut]:
        return read_files(self._paths(), skip_undecodable=True)

    def survey(self) -> Survey:
        version = ".".join(str(part) for part in sys.version_info[:3])
        return survey_files(f"Python {version} standard library without tests", self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        # installed packages, tens of thousands of files, often lie below the library: their folders are not entered
        found = {}
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _INSTALLED and not name.startswith(".")]
            below = PurePosixPath(Path(folder).relative_to(root).as_posix())
            for file in files:
                if file.endswith(".py") and not file.startswith(".") and not _outside_stdlib(str(below / file)):
                    found[str(below / file)] = Path(folder, file)
        paths = sorted((name, path) for name, path in found.items() if path.is_file())
        if not paths:
            raise ValueError(
                f"data.source=StdlibSource: no .py files under {root} (this Python may ship its library compiled); "
                "use TextFolder(path, pattern) with a folder of text"
            )
        return paths


@dataclass(frozen=True)
class PackagesSource(Source):
    """The Python source of the packages installed for this interpreter, without their tests."""

    only: tuple[str, ...] = ()
    """Import names of packages to read, such as numpy; empty reads all."""

    def documents(self) -> Iterator[Document | LeftOut]:
        return read_files(self._paths(), skip_undecodable=True)

    def survey(self) -> Survey:
        what = ", ".join(self.only) if self.only else "installed Python packages"
        return survey_files(f"{what} without tests", self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        roots = dict.fromkeys(Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib"))
        found = {name: path for root in roots for name, path in find_files(root, "**/*.py")}
        packages = {PurePosixPath(name).parts[0].removesuffix(".py") for name in found}
        if absent := [name for name in self.only if name not in packages]:
            raise ValueError(
                f"data.source.only names {', '.join(absent)}, which {', '.join(map(str, roots))} does not hold; "
                "give import names of installed packages"
            )
        paths = [
            (name, path)
            for name, path in sorted(found.items())
            if not _is_test(name) and (not self.only or PurePosixPath(name).parts[0].removesuffix(".py") in self.only)
        ]
        if not paths:
            raise ValueError(f"data.source=PackagesSource: no .py files under {', '.join(map(str, roots))}")
        return paths


@dataclass(frozen=True)
class TextFolder(Source):
    """Files of text or code, one document per file: those of a folder that match a glob pattern, or a single file."""

    path: str
    """Folder (or file) to read; relative to the working directory, `~` allowed."""
    pattern: str = "**/*.txt"
    """Glob pattern below `path`; `**` crosses folders. Hidden files and folders are left out unless it names them."""
    undecodable: Literal["refuse", "skip"] = "refuse"
    """What to do with a file that is not UTF-8: stop, or leave it out and count it."""
    max_document_bytes: int = 16_777_216
    """A larger file becomes several documents, cut after a line's end; 1024 at least."""

    def validate(self) -> None:
        """Raise ValueError if the pattern leaves the folder or a document may be too small."""
        check_pattern(self.pattern, "**/*.txt")
        if self.max_document_bytes < 1024:
            raise ValueError(f"data.source.max_document_bytes={self.max_document_bytes} must be at least 1024")

    def documents(self) -> Iterator[Document | LeftOut]:
        paths = self._paths()
        return read_files(paths, skip_undecodable=self.undecodable == "skip", limit=self.max_document_bytes)

    def survey(self) -> Survey:
        name = Path(self.path).expanduser().resolve().name
        return survey_files(f"files {self.pattern} of folder {name}", self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        self.validate()
        return resolve_files(self.path, self.pattern, "the text files")


@dataclass(frozen=True)
class SeveralSources(Source):
    """Several sources, one after another; names begin with the source's number."""

    sources: tuple[Source, ...]
    """At least one source; a document in an earlier one takes precedence over its repetitions in later ones."""

    def validate(self) -> None:
        """Raise ValueError if there is no source."""
        if not self.sources:
            raise ValueError("data.source.sources is empty; give at least one source")

    def documents(self) -> Iterator[Document | LeftOut]:
        for number, source in enumerate(self.sources):
            for item in source.documents():
                name = f"{number}/{item.name}"
                yield Document(name, item.content) if isinstance(item, Document) else LeftOut(name, item.why)

    def survey(self) -> Survey:
        parts = [source.survey() for source in self.sources]

        def total(values: Iterable[int | None]) -> int | None:
            known = [value for value in values if value is not None]
            return sum(known) if len(known) == len(parts) else None

        description = " + ".join(part.description for part in parts)
        return Survey(description, total(part.files for part in parts), total(part.bytes for part in parts))

    def identity(self) -> str | None:
        parts = [source.identity() for source in self.sources]
        known = [part for part in parts if part is not None]
        return " + ".join(known) if len(known) == len(parts) else None

    def pinned(self) -> Source:
        return SeveralSources(tuple(source.pinned() for source in self.sources))


_INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"})
_TESTS = frozenset({"test", "tests", "idle_test"})
_EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})


def _is_test(name: str) -> bool:
    *folders, file = PurePosixPath(name).parts
    return not _TESTS.isdisjoint(folders) or file.startswith("test_")


def _outside_stdlib(name: str) -> bool:
    """True for tests, installed packages and files that a build wrote for one machine."""
    *folders, file = PurePosixPath(name).parts
    return (
        _is_test(name)
        or not _INSTALLED.isdisjoint(folders)
        or (bool(folders) and folders[0].startswith("config-"))
        or file in _EXCLUDED_FILES
        or file.startswith("_sysconfigdata")
    )


def check_pattern(pattern: str, example: str) -> None:
    """Raise ValueError unless a glob pattern stays below its folder."""
    parts = PurePosixPath(pattern)
    if not pattern or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"data.source.pattern={pattern!r} must be a glob below data.source.path, such as {example!r}")


def split_glob(path: str) -> tuple[str, str]:
    """The folder before the first part with a `*`, `?` or `[`, and the glob from there on ("" if there is none)."""
    parts = PurePosixPath(path).parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return str(PurePosixPath(*parts[:first])), "/".join(parts[first:])


def resolve_files(path: str, pattern: str, what: str) -> list[tuple[str, Path]]:
    """(name, path) of the file, or of the files below the folder that match, sorted by name.

    what    what the folder should hold, for the message
    raises  ValueError in the words of the config if there is none
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise ValueError(
            f"data.source.path={path!r} is not a folder or file; give the folder that holds {what} "
            f"(data.source takes {SHORT_FORMS})"
        )
    paths = find_files(root, pattern)
    if not paths:
        raise ValueError(
            f"data.source.pattern={pattern!r} matches no file under data.source.path={path!r}; "
            "change the pattern ('**/*' takes every file)"
        )
    return paths


def find_files(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """(name, path) of the files below root that match, sorted by name: the order of a folder listing is not defined."""
    hidden = any(part.startswith(".") for part in PurePosixPath(pattern).parts)
    found = {}
    for path in root.glob(pattern):
        relative = path.relative_to(root)
        if (hidden or not any(part.startswith(".") for part in relative.parts)) and path.is_file():
            found[relative.as_posix()] = path
    return sorted(found.items())


def survey_files(description: str, paths: list[tuple[str, Path]]) -> Survey:
    """Count and size of the files."""
    return Survey(description, len(paths), sum(path.stat().st_size for _, path in paths))


def read_files(
    paths: list[tuple[str, Path]], *, skip_undecodable: bool, limit: int | None = None
) -> Iterator[Document | LeftOut]:
    """One document per file, or several named `file#1`, `file#2`, ... where it is larger than `limit` bytes."""
    for name, path in paths:
        try:
            size = path.stat().st_size
            pieces = _pieces(path, limit) if limit is not None and size > limit else iter([path.read_bytes()])
            for number, content in enumerate(pieces, 1):
                piece = name if limit is None or size <= limit else f"{name}#{number}"
                if not content:
                    yield LeftOut(piece, "empty")
                    continue
                try:
                    content.decode("utf-8")
                except UnicodeDecodeError as error:
                    if not skip_undecodable:
                        raise ValueError(
                            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it, narrow "
                            "data.source.pattern, or leave such files out with data.source.undecodable=skip"
                        ) from error
                    yield LeftOut(piece, "not UTF-8")
                    continue
                yield Document(piece, content)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _pieces(path: Path, limit: int) -> Iterator[bytes]:
    """A file in pieces of at most `limit` bytes that end after a line's end, or between characters if there is none."""
    rest = b""
    with path.open("rb") as file:
        while block := rest + file.read(limit - len(rest)):
            if len(block) < limit:
                yield block
                return
            end = block.rfind(b"\n") + 1
            if end == 0:
                end = len(block)
                # A byte 10xxxxxx continues a character that begins up to three bytes before it.
                while end > len(block) - 4 and end > 1 and block[end - 1] & 0xC0 == 0x80:
                    end -= 1
                if block[end - 1] & 0xC0 == 0xC0:
                    end -= 1
                end = end or len(block)
            yield block[:end]
            rest = block[end:]
