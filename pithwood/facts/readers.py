"""Which code reads a setting, found in the package's source by names and annotations.

An expression `base.field` counts if the base surely or very likely is the setting's class: a parameter annotated with
it, `self` inside it, the name of a field that holds it (`run.optim.lr`; also with `.cfg` behind it, `mesh.cfg.pp`), the
name of a part that keeps it (`block.mlp.cfg.top_k`), or the usual name of a configuration in a file that mentions the
class. What goes through `getattr` or a loop over all
fields is not found.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from pithwood.config import union_members

PACKAGE = Path(__file__).parents[1]
_USUAL = {"cfg", "config", "settings", "self.cfg", "self.config"}


def readers(cls: type, name: str, places: list[str]) -> list[dict[str, Any]]:
    """Rows {file, line, where} of the functions that read a field, each once, the class's own checks left out.

    places  paths at which the class may stand in a configuration
    """
    module = vars(sys.modules[cls.__module__])
    unions = {alias for alias, value in module.items() if cls in union_members(value) and value is not cls}
    classes = {base.__name__ for base in cls.__mro__ if base.__module__ != "builtins"} | unions
    holders = {part for place in places for part in [place.removesuffix(".*").rpartition(".")[2]] if part}
    # the whole configuration, and entries of a list, go by their class's name or the last word of it
    words = re.findall("[A-Z][a-z]+", cls.__name__)
    if any(place == "" or place.endswith(".*") for place in places) and words and words[-1] != "Config":
        holders |= {words[-1].lower()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    own = inspect.getsourcefile(cls)
    # a class of one's own is read where it stands
    outside = [Path(own)] if own is not None and not Path(own).is_relative_to(PACKAGE) else []
    for file in [*sorted(PACKAGE.rglob("*.py")), *outside]:
        shown = file if file in outside else file.relative_to(PACKAGE.parent)
        for read in _reads(file).get(name, ()):
            bases = {read["base"], read["source"] or read["base"]}
            # below the whole configuration its path says what a usual name holds, and a part says what it keeps
            source = read["source"] or ""
            bases -= _USUAL if re.match(r"(self\.)?run\.", source) or _kept_by(source) else set()
            if any(_meant({**read, "base": base}, classes, holders, _names(file)) for base in bases):
                row = {
                    "file": shown.as_posix(),
                    "line": read["line"],
                    "where": read["where"],
                }
                found.setdefault((row["file"], row["where"]), row)
    return list(found.values())


def _meant(read: dict[str, Any], classes: set[str], holders: set[str], names: set[str]) -> bool:
    base = read["base"]
    if base == "self":
        return read["class"] in classes
    annotated = read["annotations"].get(base)
    if annotated is not None:
        return bool(annotated & classes)
    if base in _USUAL:
        return bool(names & classes)
    # what a configuration makes bears its name and keeps it: `mesh.cfg.pp` reads what `run.mesh.pp` does
    return base.removesuffix(".cfg").rpartition(".")[2] in holders or bool(_kept_by(base) & classes)


def _kept_by(base: str) -> set[str]:
    """The classes of `base` where it is the configuration of a part: `block.mlp.cfg`."""
    part, _, last = base.rpartition(".")
    return _keepers().get(part.rpartition(".")[2], set()) if last == "cfg" else set()


@functools.cache
def _keepers() -> dict[str, set[str]]:
    """Names under which a class of the package holds a part that keeps its configuration -> the classes of that
    configuration: `mlp` -> {MoEConfig}, since a block has `self.mlp: MoELayer`, and that has `self.cfg: MoEConfig`."""
    held: dict[str, set[str]] = {}
    kept: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                kept.setdefault(node.name, set()).update(_attributes(node).get("self.cfg", ()))
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target).startswith("self."):
                held.setdefault(ast.unparse(node.target)[len("self.") :], set()).update(_words(node.annotation))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                for target in map(ast.unparse, node.targets):
                    if target.startswith("self."):
                        held.setdefault(target[len("self.") :], set()).add(ast.unparse(node.value.func))
    return {name: set().union(*(kept.get(cls, set()) for cls in classes)) for name, classes in held.items()}


@functools.cache
def _names(file: Path) -> set[str]:
    """Every name that a file uses or imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


@functools.cache
def _reads(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Attribute name -> where the file reads it, each {base, source, line, where, class, annotations}; source is what
    the base was set to."""
    found: dict[str, list[dict[str, Any]]] = {}
    _visit(ast.parse(file.read_text(encoding="utf-8")), [], "", {}, found, {})
    return found


def _visit(
    node: ast.AST,
    scope: list[str],
    inside: str,
    annotations: dict[str, set[str]],
    found: dict[str, list[dict[str, Any]]],
    sources: dict[str, str],
) -> None:
    if isinstance(node, ast.ClassDef):
        scope, inside, annotations = [*scope, node.name], node.name, _attributes(node)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if node.name in ("validate", "__post_init__"):
            return
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        own = {arg.arg: _words(arg.annotation) for arg in arguments if arg.annotation is not None}
        scope, annotations = [*scope, node.name], {**annotations, **own}
        set_to = _set_to(node)
        annotations |= {name: annotations[source] for name, source in set_to.items() if source in annotations}
        sources = {**sources, **{name: source for name, source in set_to.items() if source not in annotations}}
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        base = node.value
        while isinstance(base, (ast.Call, ast.Subscript)):
            base = base.func if isinstance(base, ast.Call) else base.value
        found.setdefault(node.attr, []).append(
            {
                "base": ast.unparse(base),
                "source": sources.get(ast.unparse(base)),
                "line": node.lineno,
                "where": ".".join(scope) or "module",
                "class": inside,
                "annotations": annotations,
            }
        )
    for child in ast.iter_child_nodes(node):
        _visit(child, scope, inside, annotations, found, sources)


def _attributes(node: ast.ClassDef) -> dict[str, set[str]]:
    """`self.x` -> class names in its annotation, or in that of the parameter of `__init__` that it is set to."""
    known: dict[str, set[str]] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            known[f"self.{statement.target.id}"] = _words(statement.annotation)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            given = {arg.arg: _words(arg.annotation) for arg in statement.args.args if arg.annotation is not None}
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Name) and inner.value.id in given:
                    known |= {ast.unparse(target): given[inner.value.id] for target in inner.targets}
    return known


def _set_to(function: ast.AST) -> dict[str, str]:
    """Local names and what they are set to where that is a name or an attribute: `cfg = self.cfg`,
    `moe, stage = run.model.moe, run.stages()[0]`."""
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=False) if both else [(target, value)]  # type: ignore[attr-defined]
            for name, source in pairs:
                if isinstance(name, ast.Name) and isinstance(source, (ast.Name, ast.Attribute)):
                    found[name.id] = ast.unparse(source)
    return found


def _words(annotation: ast.expr | None) -> set[str]:
    return set(re.findall(r"\w+", ast.unparse(annotation))) if annotation is not None else set()
