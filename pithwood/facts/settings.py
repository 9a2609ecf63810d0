"""What every setting means: its paths, type, default and meaning, when it is refused, and which code reads it.

All of it is read from the configuration classes and from the package's source; nothing is written down twice.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pithwood.attention.base import MixerConfig
from pithwood.config import (
    class_names,
    describe,
    encode,
    field_hints,
    is_config_class,
    origin_of,
    type_name,
    union_members,
)
from pithwood.facts.readers import readers
from pithwood.run import Run
from pithwood.schema import field_docs
from pithwood.synonyms import meant_elsewhere

ROOMS = ("attention", "data", "moe", "models", "observe", "optim")
"""Rooms whose modules may define classes that stand in a base class's place."""


def import_rooms() -> None:
    """Import all modules that define settings, so that every class which may stand somewhere is known.

    A module that needs a library that is not installed (kernels need Triton) is left out: none of them defines any.
    """
    for room in ROOMS:
        package = importlib.import_module(f"pithwood.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            try:
                importlib.import_module(f"pithwood.{room}.{module.name}")
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] == "pithwood":
                    raise


def places_of_classes(root: type = Run, package: str | None = None) -> dict[type, list[str]]:
    """Each class that a configuration may hold, with the paths at which it may stand; `*` is any entry.

    package  of classes that may stand in another's place only those of this package; None: all that are imported
    """
    places: dict[type, list[str]] = {root: [""]}
    queue: list[tuple[type, str, tuple[type, ...]]] = [(root, "", (root,))]
    while queue:
        cls, path, above = queue.pop(0)
        for name, hint in field_hints(cls).items():
            for found, suffix in classes_in(hint, package):
                place = f"{path}.{name}{suffix}".removeprefix(".")
                # a class that may hold its own kind, such as a mixture of corpora, is followed once
                if found not in above and place not in places.setdefault(found, []):
                    places[found].append(place)
                    queue.append((found, place, (*above, found)))
    return places


def classes_in(hint: Any, package: str | None = None) -> list[tuple[type, str]]:
    """The classes in an annotation that can be built, each with what its path has after the field's name."""
    found: list[tuple[type, str]] = []
    for member in union_members(hint):
        if is_config_class(member):
            known = [cls for cls in class_names((member,), ()).values() if not _only_derived_from(cls)]
            found += [(cls, "") for cls in known if package in (None, cls.__module__.partition(".")[0])]
        elif origin_of(member) in (tuple, list):
            for arg in typing.get_args(member):
                found += (
                    [(cls, f".*{suffix}") for cls, suffix in classes_in(arg, package)] if arg is not Ellipsis else []
                )
        elif origin_of(member) is dict:
            found += [
                (cls, f".*{suffix}") for arg in typing.get_args(member)[1:] for cls, suffix in classes_in(arg, package)
            ]
    return found


def explain(key: str, package: str | None = None) -> list[dict[str, Any]]:
    """What is known of a setting, or of each that a key may mean.

    key      a path as in overrides (model.attention.top_k; entries of lists by number or *, of objects by name or *),
             the end of one (attention.top_k, top_k), a class (MoBAConfig) or one of its fields (MoBAConfig.top_k)
    package  as of `places_of_classes`
    returns  rows {class, field, paths, type, default: JSON, or None where one must be given, required, meaning,
             refused: what the class's own checks say of it, holds: class -> its fields, readers: rows {file, line,
             where}}
    raises   ValueError, naming the nearest setting, if there is none
    """
    import_rooms()
    places = places_of_classes(package=package)
    wanted = key.strip()
    rows = [(cls, name) for cls in places for name in field_hints(cls)]
    paths = {(cls, name): [f"{place}.{name}".removeprefix(".") for place in places[cls]] for cls, name in rows}
    by_path = [row for row in rows if any(_means(wanted, path) for path in paths[row])]
    by_class = [row for row in rows if wanted in (type_name(row[0]), f"{type_name(row[0])}.{row[1]}")]
    by_end = [row for row in rows if any(_ends(wanted, path) for path in paths[row])]
    # entries of plain lists and objects are explained by what holds them
    by_entry = [row for row in rows if any(_means(wanted, f"{path}.*") for path in paths[row])]
    found = by_path or by_class or by_end or [row for row in by_entry if _has_entries(field_hints(row[0])[row[1]])]
    if not found:
        raise ValueError(_unknown(key, [*(path for row in rows for path in paths[row]), *map(type_name, places)]))
    return [explain_field(cls, name, places[cls]) for cls, name in found]


def explain_field(cls: type, name: str, places: list[str]) -> dict[str, Any]:
    """The row of one field; see `explain`."""
    hint = field_hints(cls)[name]
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    default, required = None, False
    if field.default is not dataclasses.MISSING:
        default = encode(field.default, hint, name)
    elif field.default_factory is not dataclasses.MISSING:
        default = encode(field.default_factory(), hint, name)
    else:
        required = True
    return {
        "class": type_name(cls),
        "field": name,
        "paths": [f"{place}.{name}".removeprefix(".") for place in places],
        "type": describe(hint),
        "default": default,
        "required": required,
        "meaning": " ".join(field_docs(cls).get(name, "").split()),
        "refused": list(dict.fromkeys(refusals(cls, name))),
        "holds": {type_name(part): list(field_hints(part)) for part, _ in classes_in(hint)},
        "readers": readers(cls, name, places),
    }


def refusals(cls: type, name: str) -> Iterator[str]:
    """The messages of a class's own checks that concern a field, with `...` for what depends on the values."""
    for owner in cls.__mro__:
        for check in ("validate", "__post_init__"):
            function = owner.__dict__.get(check)
            if inspect.isfunction(function) and dataclasses.is_dataclass(owner):
                yield from _messages(_tree_of(function), name, [])


def _messages(node: ast.AST, name: str, around: list[ast.AST]) -> Iterator[str]:
    """Messages of the raises below a node; `around` holds the conditions and loops that lead there."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        message = node.exc.args[0]
        loop = next((node for node in around if isinstance(node, ast.For) and _has_text(node.iter, name)), None)
        if loop is not None:
            variable = next(part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name))
            yield _message_text(message, {variable: name})
        elif any(_reads_self(part, name) for part in (*around[-1:], message) if not isinstance(part, ast.For)):
            yield _message_text(message, {})
        return
    here = list(around)
    if isinstance(node, (ast.If, ast.For)):
        here.append(node.test if isinstance(node, ast.If) else node)
    for child in ast.iter_child_nodes(node):
        yield from _messages(child, name, here)


def _message_text(message: ast.expr, known: dict[str, str]) -> str:
    """The words of a message; variables that are known are filled in, other values become dots."""
    text = ""
    for part in message.values if isinstance(message, ast.JoinedStr) else [message]:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        else:
            text += known.get(ast.unparse(part.value), "...") if isinstance(part, ast.FormattedValue) else "..."
    return text


def _reads_self(expression: ast.AST, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "self"
        for node in ast.walk(expression)
    )


def _has_text(expression: ast.expr, text: str) -> bool:
    return any(isinstance(node, ast.Constant) and node.value == text for node in ast.walk(expression))


@functools.cache
def _tree_of(function: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _has_entries(hint: Any) -> bool:
    return any(origin_of(member) in (tuple, list, dict) for member in union_members(hint))


def _means(key: str, path: str) -> bool:
    """Whether a key is a path, in which `*` stands for any entry of a list or an object."""
    parts, known = key.split("."), path.split(".")
    return len(parts) == len(known) and all(k in ("*", part) for part, k in zip(parts, known, strict=True))


def _ends(key: str, path: str) -> bool:
    parts = path.split(".")[1:]
    return any(_means(key, ".".join(parts[start:])) for start in range(len(parts)) if parts[start] != "*")


def _unknown(key: str, known: list[str]) -> str:
    fields = {path.rpartition(".")[2]: path for path in reversed(known)}
    path, _, name = key.rpartition(".")
    at = [*fields, *(other.partition(".")[0] for other in known)] if not path or path in known else []
    if elsewhere := meant_elsewhere(path, name, at) if at else []:
        return (
            f"no setting {key!r}; did you mean {' or '.join(elsewhere)}? `pithwood explain` lists the settings of a run"
        )
    close = difflib.get_close_matches(key, [*dict.fromkeys(known), *fields], n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(key.rpartition(".")[2], fields, n=1, cutoff=0.5)
    hint = f"did you mean {fields.get(close[0], close[0])}? " if close else ""
    return f"no setting {key!r}; {hint}`pithwood explain` lists the settings of a run"


def _only_derived_from(cls: type) -> bool:
    """Whether a class cannot stand in a configuration itself."""
    return inspect.isabstract(cls) or getattr(cls, "build", None) is MixerConfig.build
