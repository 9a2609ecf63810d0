"""Tables of what there is: commands, recipes, ops, token mixers. Commands and ops are read from their files as text."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from pithwood.attention.base import MixerConfig
from pithwood.config import class_names
from pithwood.facts.settings import import_rooms
from pithwood.recipes import list_recipes
from pithwood.schema import class_doc

PACKAGE = Path(__file__).parents[1]


def commands_table() -> str:
    """A row per command, in the order of the command line."""
    return _table(("command", "what it does"), [(f"`pithwood {name}`", what) for name, what in list_commands()])


def recipes_table() -> str:
    """A row per recipe of the package."""
    return _table(("recipe", "what it trains"), [(f"`{name}`", what) for name, what in list_recipes()])


def ops_table() -> str:
    """A row per function of an op's folder that offers a choice, with the implementations that its `impl=` takes."""
    rows = []
    for path in sorted((PACKAGE / "ops").glob("*/__init__.py")):
        for node in _parse(path).body:
            if isinstance(node, ast.FunctionDef) and (names := _implementations(node)):
                impls, doc = ", ".join(f"`{name}`" for name in names), ast.get_docstring(node) or ""
                rows.append((f"`{path.parent.name}/`", f"`{node.name}`", impls, _first_line(doc)))
    return _table(("folder", "function", "implementations", "what it does"), rows)


def mixers_table() -> str:
    """A row per token mixer of the package."""
    import_rooms()
    known: list[type[MixerConfig]] = list(class_names((MixerConfig,), ()).values())
    own = [cls for cls in known if cls.__module__.startswith("pithwood.") and cls.build is not MixerConfig.build]
    mixers = sorted(own, key=lambda cls: cls.__name__)
    rows = [
        (f"`{cls.__name__}`", f"`attention/{cls.__module__.rpartition('.')[2]}.py`", _first_line(class_doc(cls)))
        for cls in mixers
    ]
    return _table(("configuration", "file", "what a query sees"), rows)


def list_commands() -> list[tuple[str, str]]:
    """Name and summary of each command: the keys of COMMANDS, and what each file's `add` says."""
    tree = _parse(PACKAGE / "cli.py")
    listed = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    )
    assert isinstance(listed, ast.Dict)
    files = {
        ast.literal_eval(key): ast.unparse(value) for key, value in zip(listed.keys, listed.values, strict=True) if key
    }
    return [(name, _summary(PACKAGE / "commands" / f"{file}.py", name)) for name, file in files.items()]


def _summary(path: Path, name: str) -> str:
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "add_command" and len(node.args) > 2:
            given, summary = node.args[1:3]
            if isinstance(given, ast.Constant) and given.value == name and isinstance(summary, ast.Constant):
                return str(summary.value)
    raise ValueError(f"{path.name} does not add the command {name!r} with a summary of its own")


def _implementations(function: ast.FunctionDef) -> list[str]:
    """What a function hands to check_impl, or the Literal that annotates its `impl`; [] if it offers no choice."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check_impl":
            return [str(name) for name in ast.literal_eval(node.args[1])]
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if argument.arg == "impl" and argument.annotation is not None:
            constants = [node.value for node in ast.walk(argument.annotation) if isinstance(node, ast.Constant)]
            return [str(value) for value in constants if value is not None]
    return []


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _first_line(doc: str) -> str:
    return " ".join(doc.partition("\n\n")[0].split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *escaped])
