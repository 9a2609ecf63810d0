"""The configuration machinery: JSON round trips, typed overrides, errors in the words of the config, hashes, schema."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithwood.config import apply_overrides, config_hash, from_dict, to_dict, type_name
from pithwood.schema import field_docs, schema

pytestmark = pytest.mark.quick
HERE = __name__


@dataclass(frozen=True)
class Base:
    """A base that a plugin derives from."""


@dataclass(frozen=True)
class Full(Base):
    """Everything."""

    window: int | None = None
    """Tokens seen;
    none sees all."""


@dataclass(frozen=True)
class Sparse(Full):
    block_size: int = 64
    """Keys per block."""
    top_k: int = 4

    def validate(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")


@dataclass
class Warm:
    steps: int
    """Warmup length."""
    shape: Literal["linear", "cosine", 3, None] = "linear"


@dataclass(frozen=True)
class SGD:
    lr: float = 0.1
    """Step size."""


@dataclass(frozen=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warm: Warm = field(default_factory=lambda: Warm(10))


@dataclass(frozen=True)
class Place:
    """Read from a short text of its own."""

    city: str
    street: str = "none"

    @classmethod
    def from_text(cls, text: str) -> Place:
        return Place(*text.split("/"))

    def validate(self) -> None:
        if not self.city:
            raise ValueError("city is empty")


@dataclass
class Tree:
    """A small run."""

    name: str
    """What it is called."""
    steps: int = 100
    fast: bool = False
    scale: float = 1.0
    ratio: int | float = 1
    limit: float | None = None
    note: str | None = None
    where: Path = Path("runs")
    optim: SGD | Adam = field(default_factory=SGD)
    mixer: Base = field(default_factory=Full)
    layers: Base | tuple[Base, ...] = (Full(), Sparse())
    sizes: tuple[int, ...] = (1, 2)
    tags: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    by_step: dict[int, SGD] = field(default_factory=dict)
    extra: Any = None
    heads: int = 4
    groups: int = 2
    place: Place | None = None

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"groups={self.groups} must divide heads={self.heads}")


@dataclass(frozen=True)
class Outer:
    tree: Tree = field(default_factory=lambda: Tree("inner"))


def over(*overrides: str, tree: Tree | None = None) -> Tree:
    return apply_overrides(Tree("t") if tree is None else tree, overrides)


def in_new_process(code: str) -> str:
    """Standard output of a fresh interpreter whose string hashes differ from ours."""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=root).stdout.strip()


def round_trip(tree: Tree) -> Tree:
    return from_dict(Tree, json.loads(json.dumps(to_dict(tree), allow_nan=False)))


def test_round_trip_restores_every_kind_of_field():
    tree = Tree(
        "x", ratio=0.5, limit=math.inf, note="none", where=Path("a/b"),
        optim=Adam(betas=(0.1, 0.2), warm=Warm(3, None)), mixer=Sparse(window=7), layers=Sparse(top_k=2),
        sizes=(), tags=["a"], scales={"w.*": -math.inf}, by_step={5: SGD(0.5)}, extra={"k": [1, None]},
    )  # fmt: skip
    assert round_trip(tree) == tree
    assert isinstance(round_trip(tree).layers, Sparse)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(),
    scale=st.floats(allow_nan=False),
    note=st.none() | st.text(),
    ratio=st.integers() | st.floats(allow_nan=False),
    sizes=st.lists(st.integers(), max_size=3),
    scales=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    layers=st.lists(st.sampled_from([Full(), Sparse(), Full(window=3)]), max_size=4),
)
def test_any_values_round_trip_exactly(steps, scale, note, ratio, sizes, scales, layers):
    tree = Tree(
        "t", steps, scale=scale, note=note, ratio=ratio, sizes=tuple(sizes), scales=scales, layers=tuple(layers)
    )
    back = round_trip(tree)
    assert back == tree
    assert type(back.ratio) is type(tree.ratio)


def test_type_key_stands_only_where_the_annotation_leaves_the_class_open():
    data = to_dict(Tree("t", optim=Adam()))
    assert data["optim"]["type"] == f"{HERE}.Adam"
    assert data["mixer"]["type"] == f"{HERE}.Full"
    assert "type" not in data["optim"]["warm"]
    assert "type" not in data


def test_classes_of_the_package_go_by_their_short_name():
    assert type_name(type("C", (), {"__module__": "pithwood.attention.moba", "__qualname__": "C"})) == "C"
    assert type_name(type("C", (), {"__module__": "pithwoodish", "__qualname__": "C"})) == "pithwoodish.C"


def test_values_from_outside_a_base_class_need_types_or_an_import():
    data = to_dict(Tree("t"))
    data["mixer"] = {"type": "somewhere.else_.Mixer"}
    with pytest.raises(ValueError, match=r"mixer\.type=.*import the module somewhere\.else_ first"):
        from_dict(Tree, data)
    with pytest.raises(ValueError, match=r"did you mean .*Sparse\?"):
        from_dict(Tree, data | {"mixer": {"type": f"{HERE}.Sparze"}})
    with pytest.raises(ValueError, match=r"mixer\.type is missing; add one of"):
        from_dict(Tree, data | {"mixer": {}})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=4096", 4096), ("steps=4_096", 4096), ("steps=1e6", 1_000_000), ("steps=-2", -2),
        ("scale=3e-4", 3e-4), ("scale=2", 2.0), ("scale=inf", math.inf),
        ("fast=true", True), ("fast=False", False),
        ("limit=none", None), ("limit=0.5", 0.5), ("ratio=2", 2), ("ratio=2.0", 2.0),
        ("name=none", "none"), ("note=none", None), ('note="none"', "none"), ("note=a=b c", "a=b c"), ("note=", ""),
        ("where=x/y", Path("x/y")),
        ("optim.lr=0.5", SGD(0.5)), ("optim=Adam", None), (f"optim={HERE}.Adam", Adam()),
        (f'optim={{"type": "{HERE}.Adam", "betas": [0, 1]}}', Adam(betas=(0.0, 1.0))),
        ("layers.0.window=3", (Full(3), Sparse())), ("layers.1.top_k=1", (Full(), Sparse(top_k=1))),
        ("layers.*.window=9", (Full(9), Sparse(9))),
        (f"layers={HERE}.Full", Full()), (f'layers=[{{"type": "{HERE}.Sparse"}}]', (Sparse(),)),
        ("sizes=4,5,6", (4, 5, 6)), ("sizes=[7]", (7,)), ("sizes=", ()), ("sizes.0=1e3", (1000, 2)),
        ("tags=a, b", ["a", "b"]),
        ("scales.w=0.5", {"w": 0.5}), ('scales={"a.b": 1}', {"a.b": 1.0}), ('by_step={"3": {"lr": 1}}', {3: SGD(1.0)}),
        ('extra={"a": [1]}', {"a": [1]}),
    ],
)  # fmt: skip
def test_overrides_are_read_by_the_fields_annotation(override, value):
    path = override.partition("=")[0].partition(".")[0]
    if override == "optim=Adam":  # outside the package the short name is not enough
        with pytest.raises(ValueError, match=rf"did you mean {HERE}\.Adam\?"):
            over(override)
        return
    got = getattr(over(override), path)
    assert got == value
    assert type(got) is type(value)


def test_overrides_leave_the_given_tree_alone_and_the_later_wins():
    tree = Tree("t", scales={"a": 1.0}, tags=["x"])
    new = over("steps=1", "scales.a=2", "steps=2", "tags.0=y", tree=tree)
    assert (new.steps, new.scales, new.tags) == (2, {"a": 2.0}, ["y"])
    assert tree == Tree("t", scales={"a": 1.0}, tags=["x"])


def test_replacing_a_class_and_setting_its_fields_go_together():
    new = over(f"optim={HERE}.Adam", "optim.lr=0.25", "optim.warm.steps=7", "optim.warm.shape=none")
    assert new.optim == Adam(lr=0.25, warm=Warm(7, None))
    assert over("optim.lr=9", f"optim={HERE}.Adam").optim == Adam()


def test_required_fields_of_a_class_chosen_by_name_are_taken_from_the_overrides_that_follow():
    assert over(f"place={HERE}.Place", "place.street=b", "place.city=a").place == Place("a", "b")
    with pytest.raises(ValueError, match=r"^place\.city is missing; Place needs a string$"):
        over(f"place={HERE}.Place", "place.street=b")
    with pytest.raises(ValueError, match=r"^place: city is empty$"):
        over(f"place={HERE}.Place", "place.city=")


def test_a_class_with_from_text_reads_its_own_short_form():
    assert over("place=a/b").place == Place("a", "b")
    assert over("place=a", "place.street=c").place == Place("a", "c")
    assert over("place=none").place is None
    assert over('place={"city": "x"}').place == Place("x")
    with pytest.raises(ValueError, match=r"^place: city is empty$"):
        over("place=/b")


def test_fields_that_only_fit_together_are_validated_together():
    new = over("heads=9", "groups=3")
    assert (new.heads, new.groups) == (9, 3)
    with pytest.raises(ValueError, match=r"^groups=2 must divide heads=9$"):
        over("heads=9")


def test_objections_of_a_part_carry_its_path():
    with pytest.raises(ValueError, match=r"^layers\.1: top_k=0 must be at least 1$"):
        over("layers.1.top_k=0")
    with pytest.raises(ValueError, match=r"^tree: groups=3 must divide heads=4$"):
        from_dict(Outer, {"tree": {"name": "x", "groups": 3}})
    with pytest.raises(ValueError, match=r"^layers\.1: top_k=-1"):
        over(tree=Tree("t", layers=(Full(), Sparse(top_k=-1))))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", r"stpes is unknown: Tree has no field 'stpes'; did you mean steps\?"),
        ("optim.zzzzz=3", r"optim.zzzzz is unknown: SGD has no field 'zzzzz'; allowed are lr"),
        ("steps=2.5", r"steps=2.5 is not allowed; give an int"),
        ("steps=many", r"steps=many is not allowed; give an int"),
        ("steps=true", r"steps=true is not allowed; give an int"),
        ("fast=1", r"fast=1 is not allowed; give true or false"),
        ("scale=fast", r"scale=fast is not allowed; give a float"),
        ("limit=fast", r"limit=fast is not allowed; give a float or none"),
        ("layers.7.window=1", r"layers.7 is unknown: layers has 2 entries; give 0 to 1 or \*"),
        ("steps.x=1", r"steps.x cannot be set: steps is 100; give steps whole: an int"),
        ("by_step.3.lr=1", r"by_step.3 is unknown: by_step has no such entry"),
        ("by_step.x=1", r"by_step has the key 'x'; its keys are ints"),
        ("sizes=1,x", r"sizes.1=x is not allowed; give an int"),
        ("sizes=[1", r"sizes=\[1 is not JSON"),
        ("optim={lr: 1}", r"optim=\{lr: 1\} is not JSON"),
        ('optim={"lr": 1}', r"optim.type is missing; add one of"),
        ("steps", r"'steps' is not an override; write path=value"),
        ("=3", r"'=3' is not an override"),
    ],
)
def test_bad_overrides_name_the_path_what_was_given_and_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=message):
        over(override)


def test_literals_list_their_values():
    with pytest.raises(ValueError, match=r'warm.shape=square is not allowed; give one of "linear", "cosine", 3, null'):
        apply_overrides(Adam(), ["warm.shape=square"])
    assert apply_overrides(Adam(), ["warm.shape=3"]).warm.shape == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "3"}, 'steps="3" is not allowed; give an int'),
        ({"steps": True}, "steps=true is not allowed"),
        ({"fast": 1}, "fast=1 is not allowed; give true or false"),
        ({"name": None}, "name=null is not allowed; give a string"),
        ({"sizes": [1, "a"]}, r'sizes.1="a" is not allowed'),
        ({"optim": {"type": HERE + ".Adam", "betas": [1]}}, r"optim.betas has 1 entries; 2 are needed"),
        ({"optim": {"type": HERE + ".Adam", "warm": {}}}, "optim.warm.steps is missing; Warm needs an int"),
        (
            {"layers": [{"type": HERE + ".Sparse", "topk": 1}]},
            r"layers.0.topk is unknown.*did you mean layers.0.top_k\?",
        ),
        ({"mixer": {"type": 3}}, "mixer.type=3 is not allowed"),
        ({"colour": 1}, "colour is unknown"),
    ],
)
def test_bad_json_is_refused_with_its_path(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Tree, to_dict(Tree("t")) | change)
    with pytest.raises(ValueError, match=r"name is missing; Tree needs a string"):
        from_dict(Tree, {})


def test_a_tree_built_with_wrong_types_is_refused_before_it_is_written():
    with pytest.raises(ValueError, match=r'steps="7" is not allowed; give an int'):
        to_dict(Tree("t", steps="7"))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"optim is a .*Warm; give an object of type .*SGD or an object of type .*Adam"
    ):
        to_dict(Tree("t", optim=Warm(1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"extra=.* cannot be written as JSON"):
        over("steps=1", tree=Tree("t", extra=object()))


def test_hash_follows_values_not_spelling_and_ignores_what_is_excluded():
    base = config_hash(Tree("t"))
    assert len(base) == 12
    assert config_hash(Tree("t", scale=1)) == base  # an int where a float is meant is the same number
    one, two = Tree("t", scales={"a": 1.0, "b": 2.0}), Tree("t", scales={"b": 2.0, "a": 1.0})
    assert config_hash(one) == config_hash(two)
    assert config_hash(Tree("t", layers=(Full(), Sparse(top_k=3)))) != base
    assert config_hash(Tree("t", optim=Adam()), {"optim"}) == config_hash(Tree("t"), {"optim"})
    changed = Tree("t", steps=5, layers=(Full(3), Sparse()))
    assert config_hash(changed, {"steps", "layers.*.window"}) == config_hash(Tree("t"), {"steps", "layers.*.window"})
    assert config_hash(changed, {"steps"}) != config_hash(Tree("t"), {"steps"})
    with pytest.raises(ValueError, match=r"stepz is unknown.*did you mean steps"):
        config_hash(Tree("t"), {"stepz"})


def test_hash_is_the_same_in_another_process():
    code = f"from {HERE} import *; print(config_hash(Tree('t', scales={{'b': 1.0, 'a': 2.0}})))"
    assert in_new_process(code) == config_hash(Tree("t", scales={"a": 2.0, "b": 1.0}))


def test_field_docs_come_from_the_source_and_are_inherited():
    assert field_docs(Sparse) == {"window": "Tokens seen;\nnone sees all.", "block_size": "Keys per block."}


def test_schema_tells_types_defaults_enums_and_docs():
    whole = schema(Tree)
    json.dumps(whole, allow_nan=False)
    tree = whole["$defs"][f"{HERE}.Tree"]
    assert whole["$ref"] == f"#/$defs/{HERE}.Tree"
    assert tree["required"] == ["name"]
    assert tree["additionalProperties"] is False
    assert tree["description"] == "A small run."
    assert tree["properties"]["name"] == {"type": "string", "description": "What it is called."}
    assert tree["properties"]["steps"] == {"type": "integer", "default": 100}
    assert tree["properties"]["optim"]["default"] == {"type": f"{HERE}.SGD", "lr": 0.1}
    assert {option["$ref"].rpartition(".")[2] for option in tree["properties"]["mixer"]["anyOf"]} == {"Full", "Sparse"}
    assert whole["$defs"][f"{HERE}.Warm"]["properties"]["shape"]["enum"] == ["linear", "cosine", 3, None]
    assert "description" not in whole["$defs"][f"{HERE}.Warm"]  # the generated signature is no description


def test_schema_and_reader_know_the_same_keys():
    whole = schema(Tree)
    for cls in (Tree, Adam, SGD, Warm, Full, Sparse):
        known = set(whole["$defs"][f"{HERE}.{cls.__name__}"]["properties"]) - {"type"}
        assert known == set(cls.__dataclass_fields__)


def test_a_field_named_type_is_refused():
    with pytest.raises(ValueError, match=r"Typed.type: the key 'type' names the class"):
        to_dict(Typed())


@dataclass
class Typed:
    type: str = ""


def test_config_imports_no_torch():
    code = "import sys, pithwood.config, pithwood.schema; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert in_new_process(code) == "False False"
