"""Where text comes from: documents in a fixed order, each with a name that does not depend on the machine.

A source reads everything it names into memory: it is meant for corpora of up to a few gigabytes.
"""

from __future__ import annotations

import sys
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Document:
    name: str
    """POSIX path below the source's root."""
    content: bytes
    """Valid, non-empty UTF-8, byte for byte what the file holds (no newline translation, byte order marks kept)."""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8")


@dataclass(frozen=True)
class SourceText:
    """What a source read."""

    documents: tuple[Document, ...]
    """Sorted by name."""
    description: str
    undecodable: int = 0
    """Files left out because they are not UTF-8."""
    empty: int = 0
    """Files left out because they hold no bytes."""


@dataclass(frozen=True)
class Source(ABC):
    """Base of all text sources; one from outside this package needs only to subclass it."""

    @abstractmethod
    def read(self) -> SourceText:
        """Read all documents; raises ValueError in the words of the config if there is nothing to read."""

    def validate(self) -> None:  # noqa: B027 (a source without fields has nothing to check)
        """Raise ValueError if a field is out of range; touches no files."""


@dataclass(frozen=True)
class StdlibSource(Source):
    """The Python standard library's own source, as installed beside this interpreter.

    Left out: its tests, installed packages, bundled wheels, files generated for one machine, and files that are not
    UTF-8 (counted in `undecodable`: a module may declare another encoding).
    """

    def read(self) -> SourceText:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [(name, path) for name, path in _files(root, "**/*.py") if not _outside_stdlib(name)]
        if not paths:
            raise ValueError(
                f"data.source=StdlibSource: no .py files under {root} (this Python may ship its library compiled); "
                "use TextFolder(path, pattern) with a folder of text"
            )
        version = ".".join(str(part) for part in sys.version_info[:3])
        return _read(paths, f"Python {version} standard library without tests", skip_undecodable=True)


@dataclass(frozen=True)
class TextFolder(Source):
    """Every file of a folder that matches a glob pattern, one document per file; all must be UTF-8."""

    path: str
    """Folder to read; relative to the working directory, `~` allowed."""
    pattern: str = "**/*.txt"
    """Glob pattern below `path`; `**` crosses folders."""

    def validate(self) -> None:
        pattern = PurePosixPath(self.pattern)
        if not self.pattern or pattern.is_absolute() or ".." in pattern.parts:
            raise ValueError(
                f"data.source.pattern={self.pattern!r} must be a glob below data.source.path, such as '**/*.txt'"
            )

    def read(self) -> SourceText:
        self.validate()
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ValueError(
                f"data.source.path={self.path!r} is not a folder; give the folder that holds the text files"
            )
        paths = _files(root, self.pattern)
        if not paths:
            raise ValueError(
                f"data.source.pattern={self.pattern!r} matches no file under data.source.path={self.path!r}; "
                "change the pattern ('**/*' takes every file)"
            )
        return _read(paths, f"files {self.pattern} of folder {root.name}", skip_undecodable=False)


_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"}
)
_EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})


def _outside_stdlib(name: str) -> bool:
    """True for tests, installed packages and files that a build wrote for one machine."""
    *folders, file = PurePosixPath(name).parts
    return (
        not _EXCLUDED_FOLDERS.isdisjoint(folders)
        or (bool(folders) and folders[0].startswith("config-"))
        or file in _EXCLUDED_FILES
        or file.startswith(("test_", "_sysconfigdata"))
    )


def _files(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """(name, path) of the files below root that match, sorted by name: the order of a folder listing is not defined."""
    found = {path.relative_to(root).as_posix(): path for path in root.glob(pattern) if path.is_file()}
    return sorted(found.items())


def _read(paths: list[tuple[str, Path]], description: str, skip_undecodable: bool) -> SourceText:
    documents: list[Document] = []
    undecodable = empty = 0
    for name, path in paths:
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            if not skip_undecodable:
                raise ValueError(
                    f"{path} is not UTF-8 (byte {error.start}: {error.reason}); "
                    "convert it, or narrow data.source.pattern"
                ) from error
            undecodable += 1
            continue
        if content:
            documents.append(Document(name, content))
        else:
            empty += 1
    return SourceText(tuple(documents), description, undecodable, empty)
