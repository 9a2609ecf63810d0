"""Byte-level BPE: text in, token ids out, and the exact number of bytes that every token stands for.

A tokenizer is trained on the corpus or read from a `tokenizer.json` (GPT-2, Llama 3, Qwen and their like). Nothing
normalises the text and no space is put before it, so the tokens of a text always spell its UTF-8 bytes exactly.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
"""What END_OF_TEXT is in a tokenizer trained here; any other has its own, `Tokenizer.end_of_text_id`."""
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""Names of the token between documents in published byte-level tokenizers, the likeliest first."""
MIN_VOCAB_SIZE = 257
"""The end-of-text token and the 256 bytes."""

# Merges never cross these pieces. Compared with splitting at spaces alone, punctuation keeps the line break and
# indentation that follow it, and a word its space and one mark before it: 6 % fewer tokens on Python source at a
# vocabulary of 4096.
_PIECES = r" ?[^\s\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\s*\n\s*)?|\s+(?!\S)|\s+"
_ENCODE_CHUNK = 64
_PROBE = (
    "\ufeffA probe:\r\n\tna\u00efve  caf\u00e9 e\u0301 \u6771\u4eac \U0001f642 "
    "1234567 \u00a0\u2028\x00 'll x_y(z) {\n\n    } "
)
# Under this name the post-processor of a saved tokenizer says which token begins a document.
_DOCUMENT_MARK = "pithwood:document"


@dataclass(frozen=True)
class TokenizerConfig(ABC):
    """Base: where a corpus gets its tokenizer from. In short text, `data.tokenizer=PATH` is TokenizerFile(PATH)."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ValueError if a field is out of range; touches no files."""

    @classmethod
    def from_text(cls, text: str) -> TokenizerConfig:
        """The tokenizer that an override's short text means: the path of a file or folder."""
        return TokenizerFile(text)


@dataclass(frozen=True)
class TrainBPE(TokenizerConfig):
    """Train a byte-level BPE of data.vocab_size tokens on the training documents."""

    sample_bytes: int = 100_000_000
    """Train on the first so many bytes of the (shuffled) training documents, in whole documents; at least 1."""

    def validate(self) -> None:
        """Raise ValueError if sample_bytes is below 1."""
        if self.sample_bytes < 1:
            raise ValueError(f"data.tokenizer.sample_bytes={self.sample_bytes} must be at least 1")


@dataclass(frozen=True)
class TokenizerFile(TokenizerConfig):
    """Take an existing byte-level BPE, of at most data.vocab_size tokens."""

    path: str
    """A tokenizer.json, or a folder that holds one (a Hugging Face model, a run, a corpus)."""
    end_of_text: str | None = None
    """The special token that begins documents; null takes <|endoftext|>, <|end_of_text|> or what else the tokenizer
    declares."""

    def validate(self) -> None:
        """Raise ValueError if the path is empty."""
        if not self.path:
            raise ValueError("data.tokenizer.path is empty; give a tokenizer.json or a folder that holds one")

    def load(self) -> Tokenizer:
        """The tokenizer; raises ValueError in the words of the config if there is none or it cannot be used."""
        given = Path(self.path).expanduser()
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise ValueError(
                f"data.tokenizer.path={self.path!r} is not a tokenizer.json nor a folder that holds one; "
                "give such a path, or train one with data.tokenizer=TrainBPE"
            )
        return load_tokenizer(file, self.end_of_text)


class Tokenizer:
    """A byte-level BPE. Made by `train_tokenizer` or `load_tokenizer`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, end_of_text: str | None = None, config_file: Path | None = None
    ) -> None:
        """Wrap a tokenizers.Tokenizer.

        end_of_text  special token that begins documents; by default the one that the tokenizer declares
        config_file  a tokenizer_config.json, asked for its eos_token if the tokenizer declares none
        raises       ValueError unless it is a byte-level BPE whose tokens spell every text's bytes exactly
        """
        parts = json.loads(backend.to_str())
        _check_parts(parts)
        # NFC is left out rather than refused: it alters few texts, and without it the tokens spell the bytes as given.
        backend.normalizer = None
        # A document that spells a special token must not contain it, and documents are neither cut nor padded.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bytes = _bytes_of_tokens(backend.get_vocab(with_added_tokens=True), parts["added_tokens"])
        self.end_of_text = end_of_text or _declared_end_of_text(parts, config_file)
        """The token that begins every document in the stream; no text encodes to it, not even one that spells it."""
        if self.end_of_text not in {token["content"] for token in parts["added_tokens"] if token["special"]}:
            raise ValueError(
                f"{self.end_of_text!r} is not a special token of the tokenizer; name one that is: "
                f"{_special_tokens(parts)}"
            )
        self.end_of_text_id: int = backend.get_vocab(with_added_tokens=True)[self.end_of_text]
        if self.end_of_text_id != END_OF_TEXT_ID or self.end_of_text != END_OF_TEXT:
            _mark_document(backend, self.end_of_text, self.end_of_text_id)
        if self.decode_bytes(self.encode(_PROBE)) != _PROBE.encode():
            raise ValueError("tokenizer does not give back the bytes of a text; it cannot be used")

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

    def encode_piece(self, spelled: str) -> list[int]:
        """Token ids of one piece of text that the pre-tokenizer would not cut, spelled by `byte_characters`."""
        return [token.id for token in self._backend.model.tokenize(spelled)]

    def encode_batch(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Token ids of each text in order, a chunk of texts at a time on all cores."""
        for start in range(0, len(texts), _ENCODE_CHUNK):
            chunk = list(texts[start : start + _ENCODE_CHUNK])
            for encoding in self._backend.encode_batch_fast(chunk, add_special_tokens=False):
                yield encoding.ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids spell; special tokens spell none."""
        return b"".join(self._bytes[index] for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no valid UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> Tensor:
        """[vocab_size] int64: UTF-8 bytes each token stands for, 0 for end-of-text and other special tokens."""
        import torch  # here only: the worker processes of `prepare` encode without it

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


def load_tokenizer(path: Path, end_of_text: str | None = None) -> Tokenizer:
    """Read a tokenizer.json (a tokenizer_config.json beside it may name the end-of-text token).

    raises ValueError if it is missing, unreadable, or no byte-level BPE that spells every text exactly
    """
    if not path.is_file():
        raise ValueError(f"tokenizer {path} is missing; delete its folder to prepare the corpus again")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises bare Exception for anything it cannot parse.
    except Exception as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    try:
        return Tokenizer(backend, end_of_text, path.with_name("tokenizer_config.json"))
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from error


def _check_parts(parts: dict[str, Any]) -> None:
    """Refuse whatever keeps tokens from spelling the bytes of the text, saying what it is."""
    model = parts["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte_fallback (SentencePiece style)" if model.get("byte_fallback") else model["type"]
        raise ValueError(f"the model is {kind}; give a byte-level BPE such as those of GPT-2, Llama 3 or Qwen")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"the model has {name}={model[name]!r}; its tokens do not spell texts the same way always")
    normalizers = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise ValueError(
            f"the normalizer {', '.join(normalizers)} changes the bytes of the text; only NFC can be done without"
        )
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    if "ByteLevel" not in [step["type"] for step in steps]:
        raise ValueError("the pre_tokenizer is not byte-level; give a byte-level BPE such as those of GPT-2 or Qwen")
    for step in steps:
        if step.get("add_prefix_space"):
            raise ValueError("the pre_tokenizer has add_prefix_space=true, which adds a byte to texts; set it to false")
        if step["type"] not in ("ByteLevel", "Split", "Digits", "Punctuation") or step.get("behavior") == "Removed":
            raise ValueError(f"the pre_tokenizer {step['type']} may take bytes from the text; it cannot be used")
    for token in parts["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            raise ValueError(f"the added token {token['content']!r} swallows the white space beside it")


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is None:
        return []
    return [step for item in part[inner] for step in _steps(item, inner)] if part["type"] == "Sequence" else [part]


def _bytes_of_tokens(vocab: dict[str, int], added_tokens: list[dict[str, Any]]) -> list[bytes]:
    """The bytes that each id stands for: none for special tokens, their own text for other added ones."""
    added = {token["id"]: b"" if token["special"] else token["content"].encode() for token in added_tokens}
    spelled = [b""] * len(vocab)
    for token, index in vocab.items():
        if index >= len(vocab):
            raise ValueError(f"tokenizer ids are not contiguous: id {index} with {len(vocab)} tokens")
        spelled[index] = added[index] if index in added else _token_bytes(token)
    if not {bytes([value]) for value in range(256)}.issubset(spelled):
        raise ValueError("tokenizer lacks some of the 256 single bytes, so it cannot spell every text")
    return spelled


def _special_tokens(parts: dict[str, Any]) -> str:
    names = [token["content"] for token in parts["added_tokens"] if token["special"]]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "it has none"


def _declared_end_of_text(parts: dict[str, Any], config_file: Path | None) -> str:
    """The token that begins documents: as this module marked it, by its well-known name, or the eos_token of the config
    file."""
    marks = (parts["post_processor"] or {}).get("special_tokens", {})
    if isinstance(marks, dict) and _DOCUMENT_MARK in marks:
        return marks[_DOCUMENT_MARK]["tokens"][0]
    special = {token["content"] for token in parts["added_tokens"] if token["special"]}
    known = [name for name in END_OF_TEXT_NAMES if name in special]
    if known:
        return known[0]
    if config_file is not None and config_file.is_file():
        eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
        name = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(name, str) and name in special:
            return name
    raise ValueError(
        "no special token is known to end a text; name one with data.tokenizer.end_of_text, among these: "
        f"{_special_tokens(parts)}"
    )


def _mark_document(backend: tokenizers.Tokenizer, token: str, index: int) -> None:
    """Make the saved file say which token begins a document; other programs that read it put it there too."""
    mark = {"id": _DOCUMENT_MARK, "ids": [index], "tokens": [token]}
    template = {"SpecialToken": {"id": _DOCUMENT_MARK, "type_id": 0}}
    text_a, text_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    state = {
        "type": "TemplateProcessing",
        "single": [template, text_a],
        "pair": [template, text_a, template, text_b],
        "special_tokens": {_DOCUMENT_MARK: mark},
    }
    processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    processor.__setstate__(json.dumps(state).encode())
    backend.post_processor = processor


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level tokenizers: printable Latin-1, then U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + rank) for rank, value in enumerate(others)}


_BYTE_OF_CHARACTER = {character: value for value, character in byte_characters().items()}


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError as error:
        raise ValueError(f"token {token!r} is not spelled in the byte-level alphabet; give a byte-level BPE") from error
