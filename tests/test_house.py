"""Checks on the tree itself: rooms depend one way, files stay small, every setting is explained, all is finished."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import io
import os
import re
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pithwood.config import field_hints
from pithwood.schema import field_docs

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "pithwood").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]

LAYERS: tuple[set[str], ...] = (
    {"synonyms"},
    {"config", "errors"},
    {"schema", "ops", "losses"},
    {"parallel"},
    {"optim", "data", "checkpoint", "observe"},
    {"attention"},
    {"moe"},
    {"models"},
    {"objectives"},
    {"run"},
    {"memory", "run_folder", "recipes"},
    {"plan"},
    {"generate", "evaluate", "facts", "estimate"},
    {"passes"},
    {"trainer"},
    {"finish", "delete_run"},
    {"train", "report"},
    {"bench"},
    {"check", "pages", "preflight"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""Rooms and single modules of the package from the ground up: each may import itself and what earlier rows hold."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def nodes_of(path: Path) -> list[Any]:
    return list(ast.walk(tree_of(path)))


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT / "pithwood").parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import from the package, wherever in the file it stands."""
    node: Any
    for node in nodes_of(path):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules = ["pithwood.a relative import"]
        elif isinstance(node, ast.ImportFrom) and node.module == "pithwood":
            modules = [f"pithwood.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.startswith("pithwood."):
                yield node.lineno, module.split(".")[1]


def test_rooms_import_only_what_lies_below_them():
    rank = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    wrong = []
    for path in PACKAGE:
        room = room_of(path)
        if room == "__init__":  # the package's face may offer names from any room
            continue
        assert room in rank, f"pithwood/{room} has no place in LAYERS of tests/test_house.py; say what it may import"
        for line, other in imported_rooms(path):
            if other != room and rank.get(other, len(LAYERS)) >= rank[room]:
                wrong.append(f"{name_of(path)}:{line}: {room} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_unfinished_methods_stand_only_in_the_mixers_base():
    found = []
    for path in PACKAGE:
        if name_of(path) != "pithwood/attention/base.py":
            for node in nodes_of(path):
                if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                    found.append(f"{name_of(path)}:{node.lineno}")
    assert not found, found


def test_no_bare_except():
    found = []
    for path in SOURCES:
        for node in nodes_of(path):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{name_of(path)}:{node.lineno}")
    assert not found, found


def test_only_the_command_line_and_observation_write_to_stdout():
    found = []
    for path in PACKAGE:
        if room_of(path) not in ("cli", "observe"):
            for node in nodes_of(path):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    where = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "file"]
                    if where != ["sys.stderr"]:
                        found.append(f"{name_of(path)}:{node.lineno}")
    assert not found, found


def test_comments_hold_no_leftovers():
    banned = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING) and banned.search(token.string):
                found.append(f"{name_of(path)}:{token.start[0]}: {token.string[:60]}")
    assert not found, "\n".join(found)


def test_files_can_be_read_in_one_sitting():
    long = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    assert not {name: lines for name, lines in long.items() if lines > 600}


def settings_classes() -> list[type]:
    """Every dataclass that holds settings: by its name, or because it can be reached from Run."""
    names = re.compile(r".*Config$|^(Run|Phase|Mesh)$")
    found: dict[type, None] = {}
    for path in PACKAGE:
        classes = [
            node.name for node in tree_of(path).body if isinstance(node, ast.ClassDef) and names.match(node.name)
        ]
        if classes:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found |= dict.fromkeys(getattr(module, name) for name in classes)
    queue: list[Any] = list(found)
    seen: set[Any] = set()
    while queue:
        hint = queue.pop()
        if hint in seen:
            continue
        seen.add(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found[hint] = None
            queue += [*field_hints(hint).values(), *hint.__subclasses__()]
        # Literal["a"] has the value "a" among its arguments; only what may be an annotation is followed.
        queue += [arg for arg in typing.get_args(hint) if isinstance(arg, type) or typing.get_origin(arg)]
    return [cls for cls in found if dataclasses.is_dataclass(cls) and cls.__module__.startswith("pithwood.")]


def test_every_setting_is_explained_under_its_field():
    classes = settings_classes()
    names = {cls.__name__ for cls in classes}
    assert {"Run", "Phase", "MoBAConfig", "MoEConfig", "CorpusConfig", "MuonConfig", "WarmupStableDecay"} <= names
    missing = []
    for cls in classes:
        docs = field_docs(cls)
        missing += [f"{cls.__module__}.{cls.__name__}.{name}" for name in field_hints(cls) if not docs.get(name)]
    assert not missing, "no docstring under these fields:\n" + "\n".join(missing)


def test_no_file_names_a_place_on_somebodys_machine():
    place = re.compile(
        r"(?<![\w.$}~-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers")) + r")/\w"
    )
    skipped = {"runs", "build", "dist", "__pycache__"}
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name == ".ci" or not (name in skipped or name.startswith(".") or name.endswith(".egg-info"))
        ]
        # in a second working tree .git is a file that names the first one
        for path in (Path(folder, name) for name in files if name != ".git"):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture
            found += [f"{name_of(path)}: {match.group()}" for match in place.finditer(text)]
    assert not found, "\n".join(found)


def test_the_make_targets_that_the_readme_and_ci_use_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {"demo", "test", "quick", "test-slow", "lint", "clean", "help"}
    for name in ("README.md", ".ci/run"):
        path = ROOT / name
        used |= set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= targets, used - targets
