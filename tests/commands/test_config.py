"""`pithwood config`: settings in full, and a schema that accepts every recipe and refuses what `train` refuses."""

from __future__ import annotations

import copy
import json

import pytest

from pithwood.cli import main
from pithwood.config import apply_overrides, from_dict, to_dict
from pithwood.recipes import list_recipes, load_recipe
from pithwood.run import Run

Draft202012Validator = pytest.importorskip("jsonschema").Draft202012Validator

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def printed(capsys, *words: str) -> dict:
    assert main(["config", *words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def validator(capsys) -> Draft202012Validator:
    schema = printed(capsys, "--schema")
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_a_recipes_settings_are_printed_in_full_with_the_overrides(capsys):
    config = printed(capsys, "debug", "--json", "steps=3", "model.attention.top_k=2")
    assert from_dict(Run, config) == apply_overrides(load_recipe("debug"), ["steps=3", "model.attention.top_k=2"])


def test_every_recipe_follows_the_schema(validator):
    names = [name for name, _ in list_recipes()]
    assert len(names) >= 4
    for name in names:
        assert [error.message for error in validator.iter_errors(to_dict(load_recipe(name)))] == []


@pytest.mark.parametrize(
    "override",
    [
        "model.attention=FullAttentionConfig",
        "model.attention=SlidingWindowConfig",
        "optim=AdamWConfig",
        "optim.schedule=Cosine",
        "optim.clip_norm=inf",
        "data.max_bytes=none",
        'phases=[{"until_step": 10, "trainable": ["*"]}, {"until_step": 1000}]',
        'data.source={"type": "TextFolder", "path": "text"}',
    ],
)
def test_what_an_override_may_make_follows_the_schema(validator, override):
    run = apply_overrides(load_recipe("debug"), [override])
    assert [error.message for error in validator.iter_errors(to_dict(run))] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["stepz"], 3),
        (["steps"], "many"),
        (["precision"], "fp8"),
        (["model", "attention", "top_kk"], 3),
        (["model", "attention", "type"], "NoSuchConfig"),
        (["model", "moe", "num_experts"], 2.5),
        (["optim", "lr"], None),
        (["phases"], {}),
    ],
)
def test_what_training_refuses_does_not_follow_the_schema(validator, path, value):
    config = to_dict(load_recipe("debug"))
    spoiled = copy.deepcopy(config)
    place = spoiled
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=path[-1]):
        from_dict(Run, spoiled)
    assert not validator.is_valid(spoiled)


def test_a_required_setting_that_is_missing_does_not_follow_the_schema(validator):
    config = to_dict(load_recipe("debug"))
    del config["seq_len"]
    assert not validator.is_valid(config)


def test_the_schema_holds_meanings_and_defaults(validator):
    fields = validator.schema["$defs"]["MoBAConfig"]["properties"]
    assert "own block counts" in fields["top_k"]["description"]
    assert fields["top_k"]["default"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a recipe to print its settings, or --schema"),
        (["debug", "--schema"], "give a recipe to print its settings, or --schema"),
        (["debgu"], "did you mean debug?"),
        (["debug", "stepz=3"], "did you mean steps?"),
        (["debug", "samples_per_micro_batch=3"], "must divide samples_per_step"),
    ],
)
def test_what_cannot_be_printed_is_refused_in_one_line(words, message, capsys):
    assert main(["config", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
