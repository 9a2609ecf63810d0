"""Machinery for run configurations: dataclasses in and out of JSON, `a.b=c` overrides, validation, JSON schema.

The dataclasses themselves live beside the code that reads them; this file knows none of them and imports nothing heavy.
A field's annotation says all there is to know: None, bool, int, float, str, Path, Literal, tuples, lists, dicts, other
dataclasses, and unions of these; Any holds plain JSON. Where an annotation leaves the class open (a base class, or a
union of several classes) the JSON form carries a "type" key: the short name for classes of pithwood, `module.Class` for
all others; only the class that another one of a union names as its `json_default` goes without. Infinite and undefined
floats are written as the strings "inf", "-inf" and "nan", which JSON can hold.
`pithwood.schema` turns the same annotations into a JSON schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import sys
import types as python_types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pithwood.synonyms import meant_elsewhere

T = TypeVar("T")
_Edit = tuple[list[str], str]  # path below here, text; an empty path replaces what stands here

_SCALARS = (bool, int, float, str, Path)
NON_FINITE = ("inf", "-inf", "nan")
_NONE_WORDS = ("none", "null")


def to_dict(obj: Any) -> dict[str, Any]:
    """The JSON form of a dataclass tree: dicts, lists and scalars that `json.dumps` takes as they are.

    raises  ValueError, naming the path, if a value does not fit its field's annotation or cannot be written as JSON
    """
    return _encode_dataclass(obj, "", tagged=False)


def from_dict(cls: type[T], data: Any, types: Iterable[type] = ()) -> T:
    """A `cls` built from its JSON form; the inverse of `to_dict`.

    types   classes that a "type" key may name besides the annotation's own classes and their subclasses imported so far
    raises  ValueError, naming the path, for unknown or missing keys, values of the wrong type, unknown classes, and
            whatever a dataclass's own `__post_init__` or `validate()` objects to (called bottom-up)
    """
    return _decode_class(data, (cls,), "", tuple(types))


def apply_overrides(run: T, overrides: Iterable[str], types: Iterable[type] = ()) -> T:
    """A new tree with the `a.b=c` overrides applied and every dataclass in it validated again; `run` is not touched.

    Paths go through fields, tuple indices (`attention.0.block_size=64`, `*` for all entries) and dict keys. Values are
    read by the field's annotation: 4096, 4_096 or 1e6 for an int, true or false, none, bare text for a string, `1,2,3`
    or JSON for a tuple, a class name or JSON with a "type" key for a dataclass (which replaces it whole; its other
    fields take that class's defaults, or the values of overrides that follow). A class with a `from_text` method reads
    any other text itself: `data.source=notes` is a folder. A dataclass is validated after all overrides below it; of
    two for one path the later wins.

    raises  ValueError in the words of the config: the path, what was given, what is allowed, the nearest known key
    """
    to_dict(run)  # checks the types of everything that the overrides leave alone
    edits: list[_Edit] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"{override!r} is not an override; write path=value, for example steps=100")
        edits.append((path.strip().split("."), text))
    return _rebuild(run, type(run), edits, "", tuple(types))


def config_hash(obj: Any, exclude: Iterable[str] = ()) -> str:
    """Twelve hex digits that change with any field outside `exclude`; the same in every process and on every machine.

    exclude  paths such as "steps" or "optim.schedule.decay_steps" (`*` for all entries), with all below them
    raises   ValueError if the first part of an excluded path is not a field of obj
    """
    data = to_dict(obj)
    for path in exclude:
        parts = path.split(".")
        if parts[0] not in data:
            raise ValueError(_unknown_key("", parts[0], data, type(obj)))
        _remove(data, parts)
    text = json.dumps([type_name(type(obj)), data], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def type_name(cls: type) -> str:
    """What a "type" key calls a class: its short name for classes of pithwood, `module.Class` for all others."""
    own = cls.__module__.partition(".")[0] == "pithwood"
    return cls.__qualname__ if own else f"{cls.__module__}.{cls.__qualname__}"


def field_hints(cls: Any) -> dict[str, Any]:
    """Annotation of each constructor field of a dataclass, resolved from its string."""
    return _resolve_hints(cls)


@functools.cache
def _resolve_hints(cls: type) -> dict[str, Any]:
    try:
        resolved = typing.get_type_hints(cls)
    except NameError as error:
        raise ValueError(
            f"{cls.__qualname__}: annotation cannot be resolved ({error}); "
            f"define or import the name at the top of {cls.__module__}"
        ) from error
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if "type" in names:
        raise ValueError(
            f"{cls.__qualname__}.type: the key 'type' names the class in JSON; give the field another name"
        )
    return {name: resolved[name] for name in names}


def is_config_class(hint: Any) -> bool:
    """Whether an annotation is a configuration class: a dataclass, or a base whose subclasses are."""
    return isinstance(hint, type) and hint not in (*_SCALARS, type(None), Any, tuple, list, dict)


def union_members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    if typing.get_origin(hint) in (typing.Union, python_types.UnionType):
        return tuple(m for member in typing.get_args(hint) for m in union_members(member))
    return (hint,)


def origin_of(hint: Any) -> Any:
    """tuple for tuple[int, ...], Literal for Literal["a"], the annotation itself where nothing is subscripted."""
    return typing.get_origin(hint) or hint


def _item_hints(hint: Any, count: int, path: str) -> list[Any]:
    """Annotation of each of `count` entries of a tuple or list."""
    args = typing.get_args(hint)
    if not args:
        return [Any] * count
    if origin_of(hint) is list or (len(args) == 2 and args[1] is Ellipsis):
        return [args[0]] * count
    args = () if args == ((),) else args
    if len(args) != count:
        raise ValueError(f"{path} has {count} entries; {len(args)} are needed: {describe(hint)}")
    return list(args)


def describe(hint: Any) -> str:
    """What a field accepts, in words."""
    members = union_members(hint)
    if len(members) > 1:
        return " or ".join(describe(member) for member in members)
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string", Path: "a path"}
    if hint is type(None):
        return "none"
    if hint in names:
        return names[hint]
    origin, args = origin_of(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(value) for value in args)
    if origin in (tuple, list):
        if not args:
            return "a list"
        if origin is list or args[-1] is Ellipsis:
            return f"a list, each entry {describe(args[0])}"
        return "a list of [" + ", ".join(describe(arg) for arg in args) + "]"
    if origin is dict:
        return f"an object, each value {describe(args[1])}" if args else "an object"
    if is_config_class(hint):
        names_of = sorted(class_names((hint,), ()))
        return (
            f"an object of type {' or '.join(names_of)}" if names_of else f"{hint.__qualname__}, which has no JSON form"
        )
    return "plain JSON" if hint is Any else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether the outer shape of a Python or JSON value suits one alternative of a union; contents come later."""
    origin = origin_of(hint)
    if hint is Any:
        return True
    if hint in (None, type(None)):
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if hint is float:
        return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in NON_FINITE
    if hint is str:
        return isinstance(value, str)
    if hint is Path:
        return isinstance(value, (str, Path))
    if origin in (tuple, list):
        return isinstance(value, (tuple, list))
    if origin is dict:
        return isinstance(value, dict)
    return is_config_class(hint) and (isinstance(value, (hint, dict)))


def _pick(value: Any, hint: Any, path: str) -> tuple[Any, tuple[type, ...]]:
    """The alternative of `hint` that a value belongs to, and if that is a class, all classes among the alternatives."""
    members = union_members(hint)
    classes = tuple(member for member in members if is_config_class(member))
    fitting = [member for member in members if _fits(value, member)]
    if not fitting:
        raise ValueError(f"{path or 'the value'}={_show(value)} is not allowed; give {describe(hint)}")
    # An int written in a field of int | float stays one, and 2.0 stays a float: the exact Python type goes first.
    exact = [member for member in fitting if member is type(value) or origin_of(member) is Literal]
    chosen = (exact or fitting)[0]
    return chosen, classes if is_config_class(chosen) else ()


def _show(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (str, bool, type(None))) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_instance(value: Any) -> bool:
    """Whether a value is an instance of a dataclass (the class itself is not)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def join_path(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unknown_key(path: str, key: str, known: Iterable[str], cls: type) -> str:
    names = list(known)
    close = meant_elsewhere(path, key, names)
    close = close or [join_path(path, name) for name in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(names) or 'none'}"
    return f"{join_path(path, key)} is unknown: {cls.__name__} has no field {key!r}; {hint}"


def _candidates(classes: tuple[type, ...], types: tuple[type, ...]) -> list[type]:
    """Dataclasses that an annotation admits: its own, all their subclasses imported so far, and those of `types`."""
    found: dict[str, type] = {}
    queue = [*classes, *(cls for cls in types if issubclass(cls, classes))]
    while queue:
        cls = queue.pop(0)
        if dataclasses.is_dataclass(cls):
            # slots=True makes a second class of the same name; the one that the module shows is the last.
            found[f"{cls.__module__}.{cls.__qualname__}"] = cls
        queue.extend(cls.__subclasses__())
    return list(found.values())


def _is_open(cls: type, candidates: list[type]) -> bool:
    """Whether a class is a mere base, with nothing of its own to build: it has no fields and others derive from it."""
    if not dataclasses.is_dataclass(cls):
        return True
    return not dataclasses.fields(cls) and any(other is not cls and issubclass(other, cls) for other in candidates)


def class_names(classes: tuple[type, ...], types: tuple[type, ...]) -> dict[str, type]:
    """Buildable classes by the name that a "type" key gives them."""
    candidates = _candidates(classes, types)
    return {type_name(cls): cls for cls in candidates if not (cls in classes and _is_open(cls, candidates))}


def untyped_class(classes: tuple[type, ...]) -> type | None:
    """The class of a JSON object without a "type" key: the only one, or what one of several has as `json_default`.

    So a union may take in further classes without changing what was written before, nor its hash.
    """
    if len(classes) == 1:
        return classes[0]
    return next((cls for cls in classes if any(getattr(other, "json_default", None) is cls for other in classes)), None)


def _class_called(name: Any, classes: tuple[type, ...], path: str, types: tuple[type, ...]) -> type:
    where = join_path(path, "type")
    if not isinstance(name, str):
        raise ValueError(f"{where}={_show(name)} is not allowed; give the name of a class")
    candidates = _candidates(classes, types)
    matches = [cls for cls in candidates if name in (type_name(cls), f"{cls.__module__}.{cls.__qualname__}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        full = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in matches)
        raise ValueError(f"{where}={_show(name)} names several classes; give one of {full}")
    names = sorted(class_names(classes, types))
    module, _, short = name.rpartition(".")
    if module and module not in sys.modules:
        raise ValueError(
            f"{where}={_show(name)} is not known; import the module {module} first, it should define {short}"
        )
    same = [full for full in names if full.rpartition(".")[2] == short]
    close = same or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(
        f"{where}={_show(name)} is not known; {hint}allowed are {', '.join(names)}; "
        "import the module of any other class first"
    )


def _construct(cls: type, values: dict[str, Any], path: str) -> Any:
    """Call the constructor and `validate()`; their objections get the path in front."""
    try:
        obj = cls(**values)
        if callable(check := getattr(obj, "validate", None)):
            check()
    except ValueError as error:
        raise ValueError(_with_path(path, str(error), cls)) from error
    return obj


def _with_path(path: str, message: str, cls: type) -> str:
    """A class's own objection with the path in front, said once: it may begin with the class or the path's end."""
    message = message.removeprefix(f"{cls.__name__}: ")
    if not path:
        return message
    parts = path.split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        if message.startswith(f"{tail}."):
            return ".".join([*parts[:start], message])
    return f"{path}: {message}"


def _encode_dataclass(obj: Any, path: str, tagged: bool) -> dict[str, Any]:
    if not is_instance(obj):
        raise ValueError(f"{path or 'the configuration'}={_show(obj)} is not a dataclass instance")
    data: dict[str, Any] = {"type": type_name(type(obj))} if tagged else {}
    for name, hint in field_hints(type(obj)).items():
        data[name] = encode(getattr(obj, name), hint, join_path(path, name))
    return data


def encode(value: Any, hint: Any, path: str) -> Any:
    """The JSON form of one value under its annotation; ValueError names the path if it does not fit."""
    if is_instance(value):
        classes = tuple(member for member in union_members(hint) if is_config_class(member))
        if not isinstance(value, classes):
            raise ValueError(f"{path} is a {type_name(type(value))}; give {describe(hint)}")
        return _encode_dataclass(value, path, tagged=type(value) is not untyped_class(classes))
    chosen, classes = _pick(value, hint, path)
    origin = origin_of(chosen)
    if classes:
        raise ValueError(f"{path}={_show(value)} is not a dataclass instance; give {describe(hint)}")
    if origin in (tuple, list):
        hints = _item_hints(chosen, len(value), path)
        return [
            encode(item, item_hint, join_path(path, i))
            for i, (item, item_hint) in enumerate(zip(value, hints, strict=True))
        ]
    if origin is dict:
        _, value_hint = typing.get_args(chosen) or (Any, Any)
        return {str(key): encode(item, value_hint, join_path(path, key)) for key, item in value.items()}
    if chosen is float:
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if chosen is int and not isinstance(value, int):
        raise ValueError(f"{path}={_show(value)} is a float; give an int: {int(value)}")
    if chosen is Path:
        return Path(value).as_posix()
    if chosen is Any:
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}={_show(value)} cannot be written as JSON; give plain JSON, or annotate the field"
            ) from error
    return value


def _decode_class(data: Any, classes: tuple[type, ...], path: str, types: tuple[type, ...]) -> Any:
    if not isinstance(data, dict):
        names = " or ".join(sorted(class_names(classes, types)))
        raise ValueError(f"{path or 'the configuration'}={_show(data)} is not allowed; give an object of type {names}")
    named = "type" in data
    cls = _class_called(data["type"], classes, path, types) if named else untyped_class(classes)
    if cls is None or (not named and _is_open(cls, _candidates(classes, types))):
        names = ", ".join(sorted(class_names(classes, types)))
        raise ValueError(f"{join_path(path, 'type')} is missing; add one of {names}")
    hints = field_hints(cls)
    for key in data:
        if key not in hints and key != "type":
            raise ValueError(_unknown_key(path, key, hints, cls))
    values = {
        name: _decode(data[name], hint, join_path(path, name), types) for name, hint in hints.items() if name in data
    }
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise ValueError(
                f"{join_path(path, field.name)} is missing; {cls.__name__} needs {describe(hints[field.name])}"
            )
    return _construct(cls, values, path)


def _decode(data: Any, hint: Any, path: str, types: tuple[type, ...]) -> Any:
    chosen, classes = _pick(data, hint, path)
    origin = origin_of(chosen)
    if classes:
        return _decode_class(data, classes, path, types)
    if origin in (tuple, list):
        hints = _item_hints(chosen, len(data), path)
        items = [
            _decode(item, h, join_path(path, i), types) for i, (item, h) in enumerate(zip(data, hints, strict=True))
        ]
        return items if origin is list else tuple(items)
    if origin is dict:
        key_hint, value_hint = typing.get_args(chosen) or (str, Any)
        return {
            _dict_key(key, key_hint, path): _decode(v, value_hint, join_path(path, key), types)
            for key, v in data.items()
        }
    if chosen in (int, float, Path):
        return chosen(data)
    return data


def _dict_key(key: str, hint: Any, path: str) -> Any:
    if hint is int:
        try:
            return int(key)
        except ValueError as error:
            raise ValueError(f"{path} has the key {key!r}; its keys are ints") from error
    return key


def _rebuild(value: Any, hint: Any, edits: list[_Edit], path: str, types: tuple[type, ...]) -> Any:
    """`value` with the edits applied in their order, dataclasses constructed anew from the leaves up."""
    whole = [i for i, (parts, _) in enumerate(edits) if not parts]
    if whole:
        text, edits = edits[whole[-1]][1], edits[whole[-1] + 1 :]
        value = _class_with_fields(text, hint, edits, path, types)
        if value is None:
            value = _from_text(text, hint, path, types)
    keys = [parts[0] for parts, _ in edits]

    def child(item: Any, item_hint: Any, key: object, *names: str) -> Any:
        below = [(parts[1:], text) for parts, text in edits if parts[0] in (str(key), *names)]
        return _rebuild(item, item_hint, below, join_path(path, key), types)

    if is_instance(value):
        hints = field_hints(type(value))
        for key in keys:
            if key not in hints:
                raise ValueError(_unknown_key(path, key, hints, type(value)))
        return _construct(type(value), {k: child(getattr(value, k), h, k) for k, h in hints.items()}, path)
    if isinstance(value, (tuple, list)):
        for key in keys:
            if key != "*" and not (key.isdecimal() and int(key) < len(value)):
                allowed = f"give 0 to {len(value) - 1} or *" if value else "give it whole"
                raise ValueError(f"{join_path(path, key)} is unknown: {path} has {len(value)} entries; {allowed}")
        item_hints = _item_hints(_pick(value, hint, path)[0], len(value), path)
        items = [child(item, h, i, "*") for i, (item, h) in enumerate(zip(value, item_hints, strict=True))]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        key_hint, value_hint = typing.get_args(_pick(value, hint, path)[0]) or (str, Any)
        entries = {key: child(item, value_hint, key) for key, item in value.items()}
        for key in dict.fromkeys(keys):
            if (name := _dict_key(key, key_hint, path)) not in entries:
                if not any(parts == [key] for parts, _ in edits):
                    raise ValueError(f"{join_path(path, key)} is unknown: {path} has no such entry; set it whole first")
                entries[name] = child(None, value_hint, key)
        return entries
    if keys:
        raise ValueError(
            f"{join_path(path, keys[0])} cannot be set: {path} is {_show(value)}; give {path} whole: {describe(hint)}"
        )
    return value


def _class_with_fields(text: str, hint: Any, edits: list[_Edit], path: str, types: tuple[type, ...]) -> Any:
    """The class that a bare name chooses, its required fields taken from the edits below it; None for other texts.

    It is not yet validated: the edits of its other fields come first.
    """
    classes = tuple(member for member in union_members(hint) if is_config_class(member))
    if not classes or not edits or not re.fullmatch(r"[A-Za-z_][\w.]*", text):
        return None
    if any(_is_short_text(text, member, types) for member in classes):
        return None
    cls = _class_called(text, classes, path, types)
    values = {}
    for field in dataclasses.fields(cls):
        texts = [value for parts, value in edits if parts == [field.name]]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and texts:
            values[field.name] = _from_text(texts[-1], field_hints(cls)[field.name], join_path(path, field.name), types)
        elif required:
            return None
    return cls(**values)


def _from_text(text: str, hint: Any, path: str, types: tuple[type, ...]) -> Any:
    """The value that an override's text stands for, read by the field's annotation."""
    members = union_members(hint)
    refusal = ValueError(f"{path}={text} is not allowed; give {describe(hint)}")
    classes = tuple(member for member in members if is_config_class(member))
    for member in sorted(members, key=_text_priority):
        parsed = _scalar_from_text(text, member)
        if member is int and float in members and isinstance(parsed, float):
            continue  # 2.0 in a field of int | float is the float
        if parsed is not _NO_VALUE:
            return _decode(parsed, member, path, types)
        origin = origin_of(member)
        if origin in (tuple, list) and not text.lstrip().startswith(("[", "{")):
            # `1,2,3` without brackets; a text that may also be a class name or a scalar is not taken apart.
            if len(members) == 1 or "," in text:
                parts = [part.strip() for part in text.split(",")] if text.strip() else []
                hints = _item_hints(member, len(parts), path)
                items = [
                    _from_text(p, h, join_path(path, i), types)
                    for i, (p, h) in enumerate(zip(parts, hints, strict=True))
                ]
                return items if origin is list else tuple(items)
        elif origin in (tuple, list, dict) or member in classes or member is Any:
            if member in classes and _is_short_text(text, member, types):
                return member.from_text(text)
            if member in classes and re.fullmatch(r"[A-Za-z_][\w.]*", text) and str not in members:
                return _decode_class({"type": text}, classes, path, types)
            try:
                data = json.loads(text)
            except json.JSONDecodeError as error:
                if text.lstrip().startswith(("[", "{")) or member is Any:
                    raise ValueError(f"{path}={text} is not JSON ({error}); give {describe(hint)}") from error
                continue
            if _fits(data, member):
                return _decode(data, hint, path, types)
    raise refusal


def _is_short_text(text: str, cls: Any, types: tuple[type, ...]) -> bool:
    """Whether a text is one that the class reads by a `from_text` of its own: no JSON, nor the name of a class."""
    return hasattr(cls, "from_text") and not text.lstrip().startswith("{") and text not in class_names((cls,), types)


_NO_VALUE = object()


def _text_priority(member: Any) -> int:
    """Strings accept any text, so they are asked last; None, true and Literal words are asked first."""
    order = [type(None), Literal, bool, int, float]
    origin = origin_of(member)
    return order.index(origin) if origin in order else (len(order) + 1 if member in (str, Path) else len(order))


def _scalar_from_text(text: str, hint: Any) -> Any:
    """The scalar a text stands for under one alternative of an annotation, `_NO_VALUE` if it stands for none."""
    word = text.strip().lower()
    if hint is type(None):
        return None if word in _NONE_WORDS else _NO_VALUE
    if hint is bool:
        return {"true": True, "false": False}.get(word, _NO_VALUE)
    if origin_of(hint) is Literal:
        for choice in typing.get_args(hint):
            if text == choice or (not isinstance(choice, str) and word == str(choice).lower()):
                return choice
        return _NO_VALUE
    if hint is int:
        try:
            return int(word)
        except ValueError:
            pass
    if hint in (int, float):
        try:
            number = float(word)
        except ValueError:
            return _NO_VALUE
        return number if hint is float or number.is_integer() else _NO_VALUE
    if hint in (str, Path):
        # Quotes make a string of a word that would mean something else, as in name="none".
        if len(text) >= 2 and text[0] == text[-1] == '"':
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                return text
        return text
    return _NO_VALUE


def _remove(data: Any, parts: list[str]) -> None:
    """Delete one path from a JSON tree; parts that are not there (another class of a union) leave nothing to delete."""
    head, rest = parts[0], parts[1:]
    if isinstance(data, list):
        for i, item in enumerate(data):
            if head in ("*", str(i)) and rest:
                _remove(item, rest)
    elif isinstance(data, dict) and head == "*" and rest:
        for item in data.values():
            _remove(item, rest)
    elif isinstance(data, dict) and head in data:
        if rest:
            _remove(data[head], rest)
        else:
            del data[head]
