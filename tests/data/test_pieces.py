from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, pre_tokenizers, trainers

from pithwood.data.pieces import PieceEncoder, ascii_pattern
from pithwood.data.sources import Document, StdlibSource
from pithwood.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from tests.data.texts import AWKWARD, prose

# As published in the tokenizer.json of the models.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def trained(pattern: str | None) -> Tokenizer:
    """A tokenizer that cuts by the pattern, or by that of GPT-2."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [*AWKWARD, *(prose(seed, 300) for seed in range(5)), "it's  we'll\n\n  don't " * 9], trainer
    )
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=["pithwood", "gpt2", "qwen", "llama3"])
def tokenizer(request) -> Tokenizer:
    if request.param == "pithwood":
        return train_tokenizer([*AWKWARD, *(prose(seed, 300) for seed in range(5))], 560)
    return trained({"gpt2": None, "qwen": QWEN, "llama3": LLAMA3}[request.param])


@given(text=st.text(st.characters(max_codepoint=127), max_size=60) | st.text("a'S1 \n\t\r.\x1c\x0b", max_size=40))
def test_ascii_text_gets_the_tokens_of_the_library(tokenizer, text):
    assert PieceEncoder(tokenizer).encode(text).tolist() == tokenizer.encode(text)


def test_the_memory_changes_nothing(tokenizer):
    encoder = PieceEncoder(tokenizer)
    texts = [*AWKWARD, *(prose(seed, 200) for seed in range(8)), "x" * 5000 + "_" * 300, ""]
    for _ in range(2):
        assert [encoder.encode(text).tolist() for text in texts] == [tokenizer.encode(text) for text in texts]


def test_source_code_gets_the_tokens_of_the_library():
    documents = [item.text for item in StdlibSource().documents() if isinstance(item, Document)][::7]
    tokenizer = train_tokenizer(documents[::5], 1000)
    encoder = PieceEncoder(tokenizer)
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        assert encoder.encode(text).tolist() == ids


def test_these_tokenizers_are_cut_by_re(tokenizer):
    assert ascii_pattern(json.loads(tokenizer.to_json())) is not None


@pytest.mark.parametrize("pattern", [r"\p{Lu}+|.", r"\w+|\W", r"[a-z&&[^b]]+|.", r"(?<=x)y|.", r"^x|."])
def test_patterns_that_may_mean_something_else_are_left_to_the_library(pattern):
    tokenizer = trained(pattern)
    text = "".join(AWKWARD) + "xyXY\nxy abc_9"
    assert PieceEncoder(tokenizer).encode(text).tolist() == tokenizer.encode(text)
    assert PieceEncoder(tokenizer).encode("xyXY\nxy abc_9").tolist() == tokenizer.encode("xyXY\nxy abc_9")


def test_added_tokens_that_are_no_special_ones_are_left_to_the_library():
    parts = json.loads(trained(None).to_json())
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": 700, "content": "<tool>", "special": False})
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)))
    assert PieceEncoder(tokenizer).encode("a <tool> b").tolist() == tokenizer.encode("a <tool> b")
    assert 700 in tokenizer.encode("a <tool> b")
