from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pithwood.data.sources import Document, StdlibSource
from pithwood.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    Tokenizer,
    TokenizerFile,
    TrainBPE,
    load_tokenizer,
    train_tokenizer,
)
from tests.data.texts import AWKWARD, prose


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([prose(seed, 300) for seed in range(10)], 320)


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("".join(AWKWARD))
@example("a<|endoftext|>b")
def test_tokens_spell_the_text_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    content = text.encode()
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.bytes_per_token()[ids].sum()) == len(content)
    assert END_OF_TEXT_ID not in ids


@pytest.mark.slow
def test_bytes_are_exact_over_the_standard_library():
    documents = [item for item in StdlibSource().documents() if isinstance(item, Document)]
    trained = train_tokenizer((document.text for document in documents[::40]), 512)
    lengths = trained.bytes_per_token().numpy()
    for document, ids in zip(documents, trained.encode_batch([d.text for d in documents]), strict=True):
        assert lengths[np.array(ids)].sum() == len(document.content), document.name
        assert trained.decode_bytes(ids) == document.content, document.name


def test_batch_encoding_equals_single_encoding(tokenizer):
    texts = [*AWKWARD, "", *(prose(seed, 40) for seed in range(70))]
    assert list(tokenizer.encode_batch(texts)) == [tokenizer.encode(text) for text in texts]


def test_vocabulary_is_as_asked_with_end_of_text_first(tokenizer):
    assert tokenizer.vocab_size == 320
    lengths = tokenizer.bytes_per_token()
    assert lengths.shape == (320,)
    assert lengths[END_OF_TEXT_ID] == 0
    assert (lengths[1:] >= 1).all()
    assert tokenizer.decode([END_OF_TEXT_ID, *tokenizer.encode("x")]) == "x"


def test_half_a_character_decodes_to_the_replacement_mark(tokenizer):
    ids = tokenizer.encode("東")
    assert len(ids) == 3
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_saved_tokenizer_encodes_alike(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    for text in [*AWKWARD, prose(99, 50)]:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_training_gives_the_same_tokenizer_in_every_process():
    code = (
        "from pithwood.data.tokenizer import train_tokenizer\n"
        "from tests.data.texts import prose\n"
        "print(train_tokenizer([prose(s, 300) for s in range(10)], 320).fingerprint())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert prints == {train_tokenizer([prose(s, 300) for s in range(10)], 320).fingerprint()}


def test_impossible_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"data\.vocab_size=256 must be at least 257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(ValueError, match=r"data\.vocab_size=2000 is more than .* set data\.vocab_size=\d+ or less"):
        train_tokenizer(["one two three one two three"], 2000)
    assert train_tokenizer(["text"], 257).encode("é") != []


def test_unusable_tokenizer_files_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="is missing"):
        load_tokenizer(path)
    path.write_text('{"half": ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(path)

    def changed(**parts: object) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        for name, part in parts.items():
            setattr(backend, name, part)
        return backend

    def smallest(**more: object) -> tokenizers.Tokenizer:
        """All bytes and nothing else, with parts of the model changed."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], **more))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return backend

    def special(backend: tokenizers.Tokenizer, *names: str) -> tokenizers.Tokenizer:
        backend.add_special_tokens(list(names))
        return backend

    underscores = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(False)])
    swallowing = special(smallest(), END_OF_TEXT)
    swallowing.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    for backend, message in [
        (changed(normalizer=normalizers.Lowercase()), "the normalizer Lowercase changes the bytes"),
        (changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), "NFC, Strip changes"),
        (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), "not byte-level"),
        (changed(pre_tokenizer=underscores), "Metaspace may take bytes"),
        (special(smallest(dropout=0.1), END_OF_TEXT), "dropout"),
        (special(smallest(byte_fallback=True), END_OF_TEXT), "byte_fallback"),
        (special(smallest(end_of_word_suffix="</w>"), END_OF_TEXT), "end_of_word_suffix"),
        (swallowing, "'<mask>' swallows"),
        (special(smallest(), "<a>", "<b>"), "name one with data.tokenizer.end_of_text, among these: <a>, <b>"),
        (smallest(), "it has none"),
        (tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "the model is WordLevel"),
        (without_bytes(tokenizer, {END_OF_TEXT: 0, "a": 1}), "256 single bytes"),
        (without_bytes(tokenizer, {END_OF_TEXT: 0, "\u6771": 1}), "byte-level alphabet"),
        (without_bytes(tokenizer, {END_OF_TEXT: 0, "a": 7}), "not contiguous"),
    ]:
        path.write_text(backend.to_str())
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)


def without_bytes(tokenizer: Tokenizer, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    parts = json.loads(tokenizer.to_json())
    parts["model"] |= {"vocab": vocab, "merges": []}
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def foreign(
    end_of_text: str, *, more: tuple[str, ...] = (), normalizer=None, pre_tokenizer=None
) -> tokenizers.Tokenizer:
    """A byte-level BPE as others publish them: merges first, special tokens after them."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([prose(seed, 300) for seed in range(10)], trainer)
    backend.add_special_tokens([*more, end_of_text])
    backend.enable_truncation(8)
    backend.enable_padding()
    return backend


GPT4_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(GPT4_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.mark.parametrize(
    ("end_of_text", "parts"),
    [
        ("<|endoftext|>", {}),  # GPT-2
        ("<|end_of_text|>", {"more": ("<|begin_of_text|>",), "pre_tokenizer": SPLIT}),  # Llama 3
        ("<|endoftext|>", {"more": ("<|im_start|>",), "normalizer": normalizers.NFC(), "pre_tokenizer": SPLIT}),  # Qwen
    ],
)
def test_foreign_tokenizers_spell_the_text_byte_for_byte(tmp_path, end_of_text, parts):
    backend = foreign(end_of_text, **parts)
    backend.add_tokens(["<think>"])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    loaded = TokenizerFile(str(tmp_path)).load()
    assert loaded.end_of_text == end_of_text
    assert loaded.end_of_text_id == backend.token_to_id(end_of_text) > 256
    assert loaded.bytes_per_token()[loaded.end_of_text_id] == 0
    assert loaded.bytes_per_token()[backend.token_to_id("<think>")] == len("<think>")
    for text in [*AWKWARD, f"a{end_of_text}b<|im_start|><think>c", prose(99, 50)]:
        ids = loaded.encode(text)
        assert loaded.decode_bytes(ids) == text.encode()
        assert loaded.end_of_text_id not in ids
    plain = foreign(end_of_text, **parts)
    plain.no_truncation()
    plain.no_padding()
    assert loaded.encode(prose(99, 50)) == plain.encode(prose(99, 50)).ids


def test_a_saved_foreign_tokenizer_remembers_its_end_of_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign("<stop>", more=("<|endoftext|>",)).save(str(path))
    loaded = TokenizerFile(str(path), end_of_text="<stop>").load()
    loaded.save(path)
    again = load_tokenizer(path)
    assert (again.end_of_text, again.end_of_text_id) == ("<stop>", loaded.end_of_text_id)
    assert again.fingerprint() == loaded.fingerprint()
    assert tokenizers.Tokenizer.from_file(str(path)).encode("x").ids == [loaded.end_of_text_id, *loaded.encode("x")]


def test_the_end_of_text_may_be_named_by_the_model_folder(tmp_path):
    foreign("<stop>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"data\.tokenizer\.end_of_text, among these: <stop>"):
        TokenizerFile(str(tmp_path)).load()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert TokenizerFile(str(tmp_path)).load().end_of_text == "<stop>"
    with pytest.raises(ValueError, match="'<other>' is not a special token"):
        TokenizerFile(str(tmp_path), "<other>").load()


def test_a_missing_tokenizer_is_named_in_the_words_of_the_config(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path='.*' is not a tokenizer\.json nor a folder"):
        TokenizerFile(str(tmp_path)).load()
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path is empty"):
        TokenizerFile("").validate()
    with pytest.raises(ValueError, match=r"data\.tokenizer\.sample_bytes=0"):
        TrainBPE(sample_bytes=0).validate()
