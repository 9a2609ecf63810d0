"""Byte-level BPE: text in, token ids out, and the exact number of bytes that every token stands for.

Nothing normalises the text and no space is put before it, so the tokens of a text always spell its UTF-8 bytes exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
"""Begins every document in the token stream; no text encodes to it, not even text that spells its name."""
MIN_VOCAB_SIZE = 257
"""The end-of-text token and the 256 bytes."""

# Merges never cross these pieces. Compared with splitting at spaces alone, punctuation keeps the line break and
# indentation that follow it, and a word its space and one mark before it: 6 % fewer tokens on Python source at a
# vocabulary of 4096.
_PIECES = r" ?[^\s\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\s*\n\s*)?|\s+(?!\S)|\s+"
_ENCODE_CHUNK = 64


class Tokenizer:
    """A trained byte-level BPE. Made by `train_tokenizer` or `load_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizers.Tokenizer; raises ValueError unless it is a byte-level BPE as this module trains them."""
        if backend.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
            raise ValueError(
                f"tokenizer has {END_OF_TEXT} at {backend.token_to_id(END_OF_TEXT)}; it must be token {END_OF_TEXT_ID}"
            )
        if backend.normalizer is not None:
            raise ValueError("tokenizer has a normalizer; it would change the bytes of the text, remove it")
        if '"add_prefix_space": true' in json.dumps(json.loads(backend.to_str())["pre_tokenizer"]):
            raise ValueError("tokenizer has add_prefix_space=true; it would add a byte to the text, set it to false")
        # A document that spells the end-of-text token must not end there.
        backend.encode_special_tokens = True
        self._backend = backend
        vocab = backend.get_vocab(with_added_tokens=True)
        self._bytes = [b""] * len(vocab)
        for token, index in vocab.items():
            if index >= len(vocab):
                raise ValueError(f"tokenizer ids are not contiguous: id {index} with {len(vocab)} tokens")
            if index != END_OF_TEXT_ID:
                self._bytes[index] = _token_bytes(token)
        if not {bytes([value]) for value in range(256)}.issubset(self._bytes):
            raise ValueError("tokenizer lacks some of the 256 single bytes, so it cannot spell every text")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def to_json(self) -> str:
        """The contents of tokenizer.json, readable by the `tokenizers` library."""
        return self._backend.to_str(pretty=True)

    def fingerprint(self) -> str:
        """Hash of what decides the ids: equal for tokenizers that encode alike."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return blake2b(canonical.encode(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no end-of-text token is added, and none comes out of the text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Token ids of each text in order, a chunk of texts at a time on all cores."""
        for start in range(0, len(texts), _ENCODE_CHUNK):
            chunk = list(texts[start : start + _ENCODE_CHUNK])
            for encoding in self._backend.encode_batch_fast(chunk, add_special_tokens=False):
                yield encoding.ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids spell; end-of-text spells none."""
        return b"".join(self._bytes[index] for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no valid UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> Tensor:
        """[vocab_size] int64: UTF-8 bytes each token stands for, 0 for end-of-text."""
        return torch.tensor([len(token) for token in self._bytes], dtype=torch.int64)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly vocab_size tokens; the same texts always give the same tokenizer.

    raises ValueError if vocab_size < 257 or if the texts hold too few repeated pairs for so many tokens

    Sennrich et al. 2016, "Neural machine translation of rare words with subword units", section 3.2; over bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"data.vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and {END_OF_TEXT}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is more than the training text supports: "
            f"no pair repeats after {reached} tokens; set data.vocab_size={reached} or less, or train on more text"
        )
    return Tokenizer(backend)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json; raises ValueError if it is missing, unreadable, or not a byte-level BPE of this form."""
    if not path.is_file():
        raise ValueError(f"tokenizer {path} is missing; delete its folder to prepare the corpus again")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises bare Exception for anything it cannot parse.
    except Exception as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    return Tokenizer(backend)


def _byte_of_character() -> dict[str, int]:
    """The byte behind each character of the byte-level alphabet: printable Latin-1, then U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + rank): value for rank, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError as error:
        raise ValueError(f"token {token!r} is not spelled in the byte-level alphabet; give a byte-level BPE") from error
