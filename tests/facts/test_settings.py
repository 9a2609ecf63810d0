"""Settings explained from the code itself: where they stand, what refuses them, who reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from pithwood.attention.moba import MoBAConfig
from pithwood.config import field_hints, to_dict
from pithwood.facts import settings
from pithwood.facts.compare import flatten_settings
from pithwood.facts.settings import explain_field, import_rooms
from pithwood.recipes import list_recipes, load_recipe

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
# Other test files define mixers of their own, which the same process may have imported.
explain = cache(partial(settings.explain, package="pithwood"))
places_of_classes = partial(settings.places_of_classes, package="pithwood")


def test_a_path_explains_one_setting():
    (row,) = explain("model.attention.top_k")
    assert (row["class"], row["field"], row["default"], row["required"]) == ("MoBAConfig", "top_k", 8, False)
    assert "model.attention.*.top_k" in row["paths"]
    assert "phases.*.attention.top_k" in row["paths"]
    assert row["type"] == "an int"
    assert "own block counts" in row["meaning"]
    assert row["refused"] == ["top_k=... must be >= 1"]


def test_entries_of_lists_are_named_by_number_or_star():
    assert explain("model.attention.0.window") == explain("model.attention.*.window")
    assert explain("phases.1.until_step")[0]["class"] == "Phase"


def test_the_end_of_a_path_explains_all_that_it_may_mean():
    assert {row["class"] for row in explain("top_k")} == {"MoBAConfig", "MoEConfig"}
    assert [row["class"] for row in explain("attention.top_k")] == ["MoBAConfig"]
    assert {row["class"] for row in explain("lr")} == {"MuonConfig", "AdamWConfig"}


def test_a_class_explains_its_fields_and_a_field_of_it_only_that():
    assert [row["field"] for row in explain("MoBAConfig")] == list(field_hints(MoBAConfig))
    assert explain("MoBAConfig.tie") == explain("model.attention.tie")


def test_a_setting_that_holds_a_class_names_the_fields_in_it():
    (row,) = explain("data")
    assert row["required"]
    assert "vocab_size" in row["holds"]["CorpusConfig"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("stpes", "steps"),
        ("model.atention.top_k", "model.attention.top_k"),
        ("MoBaConfig", "MoBAConfig"),
        ("optim.lrr", "optim.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"no setting '{key}'; did you mean \S*{nearest}\?"):
        explain(key)


def test_a_key_near_nothing_is_refused_all_the_same():
    with pytest.raises(ValueError, match="no setting 'zzzzzzzz'; `pithwood explain` lists"):
        explain("zzzzzzzz")


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_every_path_of_a_recipes_settings_is_explained(name):
    for path in flatten_settings(to_dict(load_recipe(name))):
        if path.rpartition(".")[2] != "type":
            for row in explain(path):
                patterns = [re.escape(known).replace(r"\*", r"[^.]+") + r"(\.\w+)?" for known in row["paths"]]
                assert any(re.fullmatch(pattern, path) for pattern in patterns)


def test_messages_are_those_of_the_checks_with_the_fields_name_filled_in():
    (row,) = explain("seq_len")
    assert "seq_len=... must be at least 1" in row["refused"]
    assert "seq_len=... leaves nothing to attend to; give at least 2 tokens per sample" in row["refused"]
    messages = explain("samples_per_micro_batch")[0]["refused"]
    assert "samples_per_micro_batch=... must divide samples_per_step=...; try one of ..." in messages
    assert explain("max_skipped_steps")[0]["refused"] == [
        "max_skipped_steps=... must be at least 1",
        "max_skipped_steps=... must be below 2**31 = ...",
    ]


def test_readers_are_lines_that_read_the_field():
    import_rooms()
    for cls, places in places_of_classes().items():
        for name in field_hints(cls):
            for reader in explain_field(cls, name, places)["readers"]:
                line = (ROOT / reader["file"]).read_text().splitlines()[reader["line"] - 1]
                assert f".{name}" in line, (cls, name, reader)


def test_readers_behind_a_name_that_a_configuration_was_set_to_are_found():
    # `cfg, stage = run.model.moe, ...`
    (row,) = explain("chunk_tokens")
    assert ("pithwood/estimate/work.py", "repeated") in {(r["file"], r["where"]) for r in row["readers"]}


def test_readers_behind_the_part_that_keeps_a_configuration_are_found():
    (row,) = (row for row in explain("top_k") if row["class"] == "MoEConfig")
    found = {(r["file"], r["where"]) for r in row["readers"]}
    # `cfg = block.mlp.cfg`, `block.mlp.cfg.top_k`
    assert {("pithwood/estimate/work.py", "_add_mlp"), ("pithwood/models/qwen3_moe.py", "Qwen3MoE.num_params")} <= found


def test_settings_of_one_name_have_readers_of_their_own():
    readers = {row["class"]: {(r["file"], r["where"]) for r in row["readers"]} for row in explain("top_k")}
    assert "pithwood/attention/moba.py" in {file for file, _ in readers["MoBAConfig"]}
    assert "pithwood/moe/layer.py" in {file for file, _ in readers["MoEConfig"]}
    assert not readers["MoBAConfig"] & readers["MoEConfig"]


def test_every_setting_is_read_by_something():
    import_rooms()
    unread = [
        f"{cls.__name__}.{name}"
        for cls, places in places_of_classes().items()
        for name in field_hints(cls)
        if not explain_field(cls, name, places)["readers"]
    ]
    assert not unread, f"no code found that reads {unread}: a dead setting, or one read in a way that readers.py misses"


@dataclass(frozen=True)
class Nested:
    parts: tuple[Nested, ...] = ()
    """More of its kind."""


def test_a_class_that_may_hold_its_own_kind_is_followed_once():
    assert settings.places_of_classes(Nested) == {Nested: [""]}
