"""What a configuration class says about itself: the docstring under each field, and a JSON schema with them.

Reads the same annotations as `pithwood.config`, and the classes' source for the docstrings, which Python throws away.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import typing
from pathlib import Path
from typing import Any, Literal

from pithwood.config import (
    NON_FINITE,
    class_names,
    encode,
    field_hints,
    is_config_class,
    origin_of,
    type_name,
    union_members,
    untyped_class,
)


def schema(cls: type) -> dict[str, Any]:
    """JSON schema (2020-12) of the JSON form of `cls`: types, defaults, Literal values, the docstring of each field.

    Where an annotation is a base class, the classes are those imported so far.
    """
    defs: dict[str, Any] = {}
    _schema_class(cls, defs)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{type_name(cls)}",
        "$defs": defs,
    }


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited fields included; fields without one are left out."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and (node := _class_node(base)) is not None:
            for statement, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    docs.pop(statement.target.id, None)
                    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                        docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def _schema_class(cls: type, defs: dict[str, Any]) -> None:
    name = type_name(cls)
    if name in defs:
        return
    defs[name] = {}  # holds the place: classes may refer to each other
    docs, hints = field_docs(cls), field_hints(cls)
    properties: dict[str, Any] = {"type": {"const": name}}
    required = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        entry = _schema_hint(hints[field.name], defs)
        if field.name in docs:
            entry["description"] = docs[field.name]
        if field.default is not dataclasses.MISSING:
            entry["default"] = encode(field.default, hints[field.name], field.name)
        elif field.default_factory is not dataclasses.MISSING:
            entry["default"] = encode(field.default_factory(), hints[field.name], field.name)
        else:
            required.append(field.name)
        properties[field.name] = entry
    defs[name] = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if doc := class_doc(cls):
        defs[name]["description"] = doc


def class_doc(cls: type) -> str:
    """The docstring written under a class, "" if there is none (`cls.__doc__` would be a generated signature)."""
    node = _class_node(cls)
    return (ast.get_docstring(node) or "") if node is not None else ""


def _schema_hint(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    members = union_members(hint)
    classes = tuple(member for member in members if is_config_class(member))
    options: list[dict[str, Any]] = []
    for cls in class_names(classes, ()).values():
        _schema_class(cls, defs)
        ref = {"$ref": f"#/$defs/{type_name(cls)}"}
        options.append(ref if cls is untyped_class(classes) else {**ref, "required": ["type"]})
    plain: dict[Any, dict[str, Any]] = {
        type(None): {"type": "null"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"anyOf": [{"type": "number"}, {"enum": list(NON_FINITE)}]},
        str: {"type": "string"},
        Path: {"type": "string"},
        Any: {},
    }
    for member in members:
        origin, args = origin_of(member), typing.get_args(member)
        if origin is Literal:
            options.append({"enum": list(args)})
        elif origin in (tuple, list):
            if not args:
                options.append({"type": "array"})
            elif origin is list or args[-1] is Ellipsis:
                options.append({"type": "array", "items": _schema_hint(args[0], defs)})
            else:
                items = [_schema_hint(arg, defs) for arg in args]
                options.append({"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)})
        elif origin is dict:
            options.append(
                {"type": "object", **({"additionalProperties": _schema_hint(args[1], defs)} if args else {})}
            )
        elif member in plain:
            options.append(dict(plain[member]))
        elif member not in classes:
            raise ValueError(f"the annotation {member} has no JSON form; use str, Literal or a dataclass")
    return options[0] if len(options) == 1 else {"anyOf": options}


@functools.cache
def _module_tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _class_node(cls: type) -> ast.ClassDef | None:
    """The statement that defines a class, None if its source cannot be found (made in a shell, for instance)."""
    try:
        path = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        return None
    if path is None or not Path(path).is_file():
        return None
    node: Any = _module_tree(path)
    for part in cls.__qualname__.replace(".<locals>", "").split("."):
        inner = [
            n
            for n in ast.walk(node)
            if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part and n is not node
        ]
        if not inner:
            return None
        node = inner[0]
    return node if isinstance(node, ast.ClassDef) else None
