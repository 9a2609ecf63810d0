"""What a case of bad input is, and how it is tried: a command line in a copy of a small world of text and runs.

The world is a folder of notes, a run `debug` of four steps with checkpoints at 2 and 4, and the corpus that it read.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pithwood.checkpoint.lock import RunLock
from tests.command_lines import Finished, Limits, Server

TRAIN = "train debug data.source=notes seq_len=64 checkpoint_every=2 keep_checkpoints=9"
"""The command of the world's run but for its steps."""
NO_LIMITS = Limits()


def nothing(world: Path) -> None:
    """Leave the world as it is."""


@dataclass(frozen=True)
class Case:
    """One way to get it wrong."""

    name: str
    what: str
    """What is wrong, as the page says it."""
    command: str
    """Command line after `pithwood`."""
    words: tuple[str, ...]
    """What the line that the user sees has to hold."""
    code: int = 2
    arrange: Callable[[Path], None] = nothing
    """Brings about what is wrong in the world."""
    limits: Limits = NO_LIMITS
    first: str = ""
    """Command line that goes before, and may fail."""
    first_limits: Limits = NO_LIMITS
    locked: bool = False
    """Whether another process holds the run folder."""
    adds: tuple[str, ...] = ()
    """Patterns of the new files that the command may write, besides locks; `*` stays within a folder."""
    rewrites: tuple[str, ...] = ()
    """Patterns of the files that it may change or remove; all others must stay as they are."""


@dataclass(frozen=True)
class Seen:
    """What came of a case."""

    finished: Finished
    line: str
    """The line of stderr that tells of it, the same on any machine; empty if none holds the words."""
    harmed: list[str]
    """Files that changed, went or came without leave."""


def run_folder(world: Path) -> Path:
    """The world's run."""
    return next((world / "runs").glob("debug-*"))


def corpus_folder(world: Path) -> Path:
    """The world's corpus."""
    return next((world / "runs" / "corpora").glob("[!.]*/"))


def newest_checkpoint(world: Path) -> Path:
    """The checkpoint of the last step."""
    return run_folder(world) / "checkpoints" / "step-00000004"


class Worlds:
    """Makes the world once and tries cases in copies of it."""

    def __init__(self, server: Server, scratch: Path) -> None:
        """scratch: folder for the world and its copies"""
        self._server, self._scratch = server, scratch
        self._world = scratch / "world"
        (self._world / "notes").mkdir(parents=True)
        for note in range(60):
            lines = [
                f"note {note} says {word} things about oak{note * word} and elm{note + word}" for word in range(40)
            ]
            (self._world / "notes" / f"{note}.txt").write_text("\n".join(lines) + "\n")
        made = self.call(f"{TRAIN} steps=4", self._world)
        assert made.code == 0, made.err

    def call(self, command: str, folder: Path, limits: Limits | None = None) -> Finished:
        """`pithwood COMMAND` in a folder, to its end."""
        return self._server.call(shlex.split(command), folder, limits)

    def copy(self) -> Path:
        """A world of its own for one test."""
        world = Path(tempfile.mkdtemp(dir=self._scratch))
        return Path(shutil.copytree(self._world, world, dirs_exist_ok=True))

    @functools.cache  # noqa: B019 (one object for all tests)
    def attempt(self, case: Case) -> Seen:
        """Try a case."""
        world = self.copy()
        case.arrange(world)
        if case.first:
            self.call(case.first, world, case.first_limits)
        before = hashes(world)
        with RunLock(run_folder(world)) if case.locked else nullcontext():
            finished = self.call(case.command, world, case.limits)
        after = hashes(world)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        harmed = [
            name
            for name in changed
            if not any(PurePosixPath(name).match(p) for p in (case.rewrites if name in before else case.adds))
        ]
        lines = [plain(line, world) for line in finished.err.splitlines()]
        line = next((line for line in lines if all(word in line for word in case.words)), "")
        for path in (world, *world.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(world)
        return Seen(finished, line, harmed)


def hashes(world: Path) -> dict[str, str]:
    """Name and SHA-256 of every file but locks, which hold the number of the last process."""
    files = [path for path in world.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path.relative_to(world).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def plain(line: str, world: Path) -> str:
    """A line without what differs from machine to machine: places, process numbers, hashes, sizes."""
    line = line.replace(f"{world.resolve()}/", "").replace(f"{world}/", "").replace(str(world), ".")
    for pattern, instead in (
        (r"\b(debug|other|large)-[0-9a-f]{8}\b", r"\1-1a2b3c4d"),
        (r"\b[0-9a-f]{24}\b", "5e6f7a8b"),
        (r"\b[0-9a-f]{64}\b", "9c0d..."),
        (r"process \d+ on [^;\s]+", "process 1234 on host"),
        (r"(\.tmp-[\w-]*?)-\d+\b", r"\1-1234"),
        (r"but (this machine's memory|the memory [^;]*?) is [\d,.]+ GB", "but this machine's memory is 16.0 GB"),
        (r"has \d+ bytes, manifest.json says \d+", "has 1000 bytes, manifest.json says 2000"),
        (r"the train split has \d+", "the train split has 33000"),
        (r" \(asked for [^)]*\)", ""),
        # what depends on the processor, the Python version, or what else there is to choose from
        (r"(step \d+/\d+) \|.*", r"\1 | ..."),
        (r"\((?:Expecting|Extra|Illegal|Unterminated|Invalid)[^()]*\(char \d+\)\)", "(...)"),
        (r"\(choose from [^)]*\)", "(choose from ...)"),
        (r"recipes are [^;]*;", "recipes are ...;"),
    ):
        line = re.sub(pattern, instead, line)
    return line
