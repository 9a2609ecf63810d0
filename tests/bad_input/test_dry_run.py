"""`train --dry-run`: what `train` refuses before its first step it refuses in the same words, and it writes nothing."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from pithwood.checkpoint.lock import RunLock
from tests.bad_input.case import TRAIN, Case, Worlds, corpus_folder, newest_checkpoint, plain, run_folder
from tests.bad_input.corpus_cases import CORPUS
from tests.bad_input.run_cases import RUNS, SETTINGS, SYSTEM
from tests.command_lines import Finished

TRAINING = [case for case in (*SETTINGS, *SYSTEM, *CORPUS, *RUNS) if case.command.startswith("train ")]


def listing(world: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, locks included, with its size and time of change."""
    stats = {path.relative_to(world).as_posix(): path.stat() for path in sorted(world.rglob("*"))}
    return {name: (stat.st_size if name else 0, stat.st_mtime_ns) for name, stat in stats.items()}


def dry(worlds: Worlds, world: Path, command: str) -> Finished:
    """A dry run, after which nothing may have changed."""
    before = listing(world)
    finished = worlds.call(f"{command.removesuffix('--dry-run')} --dry-run", world)
    assert listing(world) == before
    return finished


# a dry run of a mesh needs no processes but its own
REFUSED = [case for case in TRAINING if case.code == 2 and case.name != "mesh-world"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_train_refuses_is_refused_in_the_same_words(case: Case, worlds: Worlds):
    world = worlds.copy()
    case.arrange(world)
    before = listing(world)
    with RunLock(run_folder(world)) if case.locked else nullcontext():
        finished = worlds.call(f"{case.command.removesuffix('--dry-run')} --dry-run", world, case.limits)
    assert case.locked or listing(world) == before
    assert finished.code == 2, finished.err
    assert worlds.attempt(case).line in [plain(line, world) for line in finished.err.splitlines()], finished.err


@pytest.mark.parametrize("case", [case for case in TRAINING if case.code == 0], ids=lambda case: case.name)
def test_what_train_takes_is_taken(case: Case, worlds: Worlds):
    world = worlds.copy()
    case.arrange(world)
    finished = dry(worlds, world, case.command)
    assert finished.code == 0, finished.err


def test_a_corpus_that_is_not_prepared_is_called_so(worlds: Worlds):
    figures = json.loads(dry(worlds, worlds.copy(), f"{TRAIN} steps=4 data.seed=5").out)["plan"]
    assert figures["corpus"] == {"corpus": "not prepared; would read files **/* of folder notes"}
    assert figures["data"] is None
    assert (figures["state"], figures["resumes_after"]) == ("new", None)


def test_a_prepared_corpus_and_a_run_that_goes_on_are_named(worlds: Worlds):
    world = worlds.copy()
    figures = json.loads(dry(worlds, world, f"{TRAIN} steps=6").out)["plan"]
    assert figures["corpus"] == {"corpus": f"prepared in {corpus_folder(world).relative_to(world)}"}
    assert figures["data"]["parts"]["corpus"]["tokens_read"] == 6 * 8 * 64
    assert (figures["state"], figures["resumes_after"]) == ("resumes", 4)
    assert figures["run_folder"] == str(run_folder(world).relative_to(world))
    assert json.loads(dry(worlds, world, f"{TRAIN} steps=4").out)["plan"]["state"] == "finished"


def _write(path: str, *contents: bytes):
    def write(world: Path) -> None:
        (world / path).mkdir()
        for number, content in enumerate(contents):
            (world / path / f"{number}.txt").write_bytes(content)

    return write


def _later_text(world: Path) -> None:
    """The corpus no longer comes of this text, and the run was trained on the old one."""
    (world / "notes" / "1.txt").write_text("other words altogether\n" * 40)


def _foreign_events(world: Path) -> None:
    (run_folder(world) / "events.jsonl").write_bytes(b"\x00garbage\n{}\n")


@pytest.mark.parametrize(
    ("arrange", "command", "words"),
    [
        (lambda world: None, "train debug data.source=nots", "data.source.path='nots' is not a folder or file"),
        (lambda world: None, "train debug data.source=corpus:nots", "there is no folder nots"),
        (_write("void", b"", b""), "train debug data.source=void", "holds no documents"),
        (_write("one", b"only this " * 50), "train debug data.source=one", "has 1 distinct document"),
        (_write("latin", b"text " * 90, b"caf\xe9 " * 90), "train debug data.source=latin", "latin/1.txt is not UTF-8"),
        (_write("two", b"a " * 90, b"b " * 90), "train debug data.source=two data.max_bytes=9", "data.max_bytes=9"),
        (lambda world: None, f"{TRAIN} steps=4 data.tokenizer=none.json", "none.json"),
        (lambda world: None, f"{TRAIN} steps=4 offload_activations=true", "offload_activations=true"),
        (_foreign_events, f"{TRAIN} steps=6", "events.jsonl line 1 is not an event"),
        (
            lambda world: None,
            f"{TRAIN} steps=6 name=b optim=AdamWConfig --from debug@4",
            "optimizer state does not fit",
        ),
        (lambda world: None, f"{TRAIN} steps=6 --from debug@2 --new", "--new would move away"),
        (lambda world: None, f"{TRAIN} steps=6 --from debug@2", "already holds a run of these settings"),
        (lambda world: None, f"{TRAIN} steps=6 logging.trackio=true logging.project=a/b", "project='a/b'"),
    ],
)
def test_further_refusals_are_those_of_train(arrange, command: str, words: str, worlds: Worlds):
    world = worlds.copy()
    arrange(world)
    tried = dry(worlds, world, command)
    trained = worlds.call(command, world)
    errors = [[line for line in done.err.splitlines() if "error:" in line] for done in (tried, trained)]
    assert (tried.code, trained.code) == (2, 2)
    assert errors[0] == errors[1]
    assert words in errors[0][0]


def test_text_that_changed_since_the_checkpoint_is_pointed_out(worlds: Worlds):
    world = worlds.copy()
    _later_text(world)
    (warning, *_) = json.loads(dry(worlds, world, f"{TRAIN} steps=6").out)["plan"]["warnings"]
    assert "step-00000004 was trained on a corpus that is there, but the text" in warning
    assert "was trained on another corpus than `data` describes now" in worlds.call(f"{TRAIN} steps=6", world).err


def test_a_damaged_checkpoint_is_passed_over_as_train_passes_over_it(worlds: Worlds):
    world = worlds.copy()
    path = newest_checkpoint(world) / "tensors-00000.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    finished = dry(worlds, world, f"{TRAIN} steps=6")
    assert "skipped checkpoint" in finished.err
    assert json.loads(finished.out)["plan"]["resumes_after"] == 2
