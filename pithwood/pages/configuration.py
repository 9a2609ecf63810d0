"""The configuration page: every class of settings that can be reached from `Run`, field by field, as Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any, Literal

from pithwood.attention.base import MixerConfig
from pithwood.config import class_names, encode, field_hints, is_config_class, origin_of, type_name, union_members
from pithwood.facts.settings import import_rooms
from pithwood.run import Run
from pithwood.schema import class_doc, field_docs


def configuration() -> str:
    """A section per class, `Run` first, in the order in which its fields lead to them."""
    import_rooms()
    places = reachable(Run)
    return "\n\n".join(_section(cls, where) for cls, where in places.items())


def reachable(root: type) -> dict[type, list[str]]:
    """Each class of the package that a configuration may hold, with the paths at which it may stand."""
    places: dict[type, list[str]] = {root: [""]}
    queue: list[tuple[type, str]] = [(root, "")]
    while queue:
        cls, path = queue.pop(0)
        for name, hint in field_hints(cls).items():
            for found, suffix in _classes(hint):
                place = f"{path}.{name}{suffix}" if path else f"{name}{suffix}"
                if found not in places:
                    places[found] = [place]
                    queue.append((found, place))
                elif place not in places[found] and len(places[found]) < 3:
                    places[found].append(place)
    return places


def _classes(hint: Any) -> list[tuple[type, str]]:
    """The buildable classes of the package in an annotation; the suffix tells how a path goes into a list."""
    found: list[tuple[type, str]] = []
    for member in union_members(hint):
        if is_config_class(member):
            found += [(cls, "") for cls in _own(member)]
        elif origin_of(member) in (tuple, list):
            for arg in typing.get_args(member):
                found += [(cls, f".*{suffix}") for cls, suffix in _classes(arg)] if arg is not Ellipsis else []
        elif origin_of(member) is dict:
            found += [(cls, f".*{suffix}") for cls, suffix in _classes(typing.get_args(member)[1])]
    return found


def _own(base: type) -> list[type]:
    """What may stand where a class is asked for: itself or its subclasses, those of the package that can be built."""
    known = [cls for cls in class_names((base,), ()).values() if cls.__module__.partition(".")[0] == "pithwood"]
    return sorted((cls for cls in known if not _is_base(cls)), key=lambda cls: (cls.__module__, cls.__qualname__))


def _is_base(cls: type) -> bool:
    """Whether a class is only there to be derived from."""
    return inspect.isabstract(cls) or getattr(cls, "build", None) is MixerConfig.build


def _section(cls: type, places: list[str]) -> str:
    docs, hints = field_docs(cls), field_hints(cls)
    doc = " ".join(class_doc(cls).split())
    file = f"`{cls.__module__.replace('.', '/')}.py`"
    where = f"At {', '.join(f'`{place}`' for place in places)}; in {file}." if places != [""] else f"In {file}."
    lines = [f"### {cls.__name__}", "", doc, "", where, ""]
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if not fields:
        return "\n".join([*lines, "No settings."])
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        hint = hints[field.name]
        cells = [f"`{field.name}`", _type(hint), _default(field, hint), " ".join(docs.get(field.name, "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _type(hint: Any) -> str:
    names = {bool: "true or false", int: "int", float: "float", str: "string", Path: "path", Any: "JSON"}
    parts: list[str] = []
    for member in union_members(hint):
        origin, args = origin_of(member), typing.get_args(member)
        if member is type(None):
            parts.append("null")
        elif member in names:
            parts.append(names[member])
        elif origin is Literal:
            parts += [f"`{json.dumps(value)}`" for value in args]
        elif origin in (tuple, list):
            items = [_type(arg) for arg in args if arg is not Ellipsis]
            each = "such" if items[0] == _join(parts) else items[0]
            parts.append(f"list of {each}" if len(items) == 1 else f"list of [{', '.join(items)}]")
        elif origin is dict:
            parts.append(f"object of {_type(args[1])} by {_type(args[0])}" if args else "object")
        else:
            parts += [f"[{cls.__name__}](#{cls.__name__.lower()})" for cls in _own(member)]
    return _join(parts)


def _join(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" or " if len(parts) > 1 else "") + "".join(parts[-1:])


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"`{_call(value)}`"
    return f"`{json.dumps(encode(value, hint, field.name), ensure_ascii=False)}`"


def _call(value: Any) -> str:
    """A dataclass as the call that makes it, without what is default anyway."""
    given = []
    for field in dataclasses.fields(value):
        present = getattr(value, field.name)
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if field.init and present != default:
            text = _call(present) if dataclasses.is_dataclass(present) else json.dumps(present)
            given.append(f"{field.name}={text}")
    return f"{type_name(type(value))}({', '.join(given)})"
