"""Names that other programs give to settings are answered with the setting that does the same here."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pithwood.config import apply_overrides
from pithwood.data.prepare import CorpusConfig
from pithwood.facts.settings import explain
from pithwood.recipes import load_recipe
from pithwood.synonyms import SYNONYMS

pytestmark = pytest.mark.quick


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError, match="is unknown") as refused:
        apply_overrides(load_recipe("debug"), overrides)
    return str(refused.value)


@pytest.mark.parametrize("path", sorted({path for paths in SYNONYMS.values() for path in paths}))
def test_every_answer_is_a_setting_of_a_run(path: str):
    assert explain(path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        # transformers
        ("model.hidden_size", "model.model_dim"),
        ("hidden_size", "model.model_dim"),
        ("num_hidden_layers", "model.num_layers"),
        ("model.num_key_value_heads", "model.num_kv_heads"),
        ("num_experts_per_tok", "model.moe.top_k"),
        ("model.moe.num_experts_per_tok", "model.moe.top_k"),
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("max_steps", "steps"),
        ("warmup_ratio", "optim.schedule.warmup_fraction"),
        ("per_device_train_batch_size", "samples_per_micro_batch"),
        ("logging_steps", "log_every"),
        ("gradient_checkpointing", "recompute"),
        # nanoGPT
        ("batch_size", "samples_per_step"),
        ("n_embd", "model.model_dim"),
        ("max_iters", "steps"),
        ("grad_clip", "optim.clip_norm"),
        ("block_size", "seq_len or model.attention.block_size"),
        # Megatron
        ("global-batch-size", "samples_per_step"),
        ("moe-router-topk", "model.moe.top_k"),
        ("train_iters", "steps"),
        ("num_query_groups", "model.num_kv_heads"),
        ("model.ffn_hidden_size", "model.moe.expert_dim or model.dense_dim"),
        # names of our own in the wrong place
        ("optim.warmup_steps", "optim.schedule.warmup_steps"),
        ("rope_theta", "model.rope_theta"),
        ("model.seq_len", "seq_len"),
        ("vocab_size", "model.vocab_size or data.vocab_size"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(given: str, meant: str):
    assert refusal(f"{given}=1").endswith(f"did you mean {meant}?")


def test_an_entry_of_a_list_is_named_with_its_number():
    listed = ['model.attention=[{"type": "MoBAConfig"}, {"type": "MoBAConfig"}]', "model.attention.1.moba_topk=3"]
    assert refusal(*listed).endswith("did you mean model.attention.1.top_k?")


def test_a_setting_of_another_class_is_no_name_from_elsewhere():
    message = refusal("model.attention=FullAttentionConfig", "model.attention.block_size=64")
    assert message.endswith("FullAttentionConfig has no field 'block_size'; allowed are rope, softmax_scale, key_conv")


def test_the_nearest_name_answers_the_rest():
    assert refusal("stpes=3").endswith("did you mean steps?")
    assert refusal("model.modle_dim=3").endswith("did you mean model.model_dim?")


def test_what_is_set_alone_is_not_answered_with_what_lies_outside():
    corpus = load_recipe("debug").data
    assert isinstance(corpus, CorpusConfig)
    with pytest.raises(ValueError, match="batch_size is unknown") as refused:
        apply_overrides(corpus, ["batch_size=3"])
    fields = {field.name for field in dataclasses.fields(CorpusConfig)}
    assert re.findall(r"did you mean (\w+)\?", str(refused.value))[0] in fields


def test_explain_knows_them_too():
    with pytest.raises(ValueError, match=r"no setting 'model\.hidden_size'; did you mean model\.model_dim\?"):
        explain("model.hidden_size")
    with pytest.raises(ValueError, match=r"no setting 'learning_rate'; did you mean optim\.lr\?"):
        explain("learning_rate")
