from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from pithwood.data.sources import StdlibSource
from pithwood.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, Tokenizer, load_tokenizer, train_tokenizer
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


def test_bytes_are_exact_over_the_standard_library():
    documents = StdlibSource().read().documents
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

    for backend, message in [
        (changed(normalizer=normalizers.Lowercase()), "normalizer"),
        (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (tokenizers.Tokenizer(tokenizers.models.BPE({END_OF_TEXT: 0, "a": 1}, [])), "256 single bytes"),
        (tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, END_OF_TEXT: 1}, [])), "must be token 0"),
        (tokenizers.Tokenizer(tokenizers.models.BPE({END_OF_TEXT: 0, "\u6771": 1}, [])), "byte-level alphabet"),
        (tokenizers.Tokenizer(tokenizers.models.BPE({END_OF_TEXT: 0, "a": 7}, [])), "not contiguous"),
    ]:
        path.write_text(backend.to_str())
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)
