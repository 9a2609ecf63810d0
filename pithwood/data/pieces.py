"""Encode ASCII text by memory: cut it into the tokenizer's pieces with `re`, and look their tokens up.

Almost all the time of the `tokenizers` library goes into cutting text and into pieces that it met before. Where a
tokenizer's pattern means the same to `re` on ASCII text, the cut is done there, and the library is asked once per
piece: 11 MB of Python source took 3.7 s in the library and 1.5 s here, on one core, and less for larger texts.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

from pithwood.data.tokenizer import Tokenizer, byte_characters

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel(use_regex=True) cuts by."""
_ASCII = {r"\s": r" \t\n\r\f\v", r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\d": "0-9", r"\r": r"\r", r"\n": r"\n"}
"""ASCII members of the classes that patterns name; `re` itself would count \\x1c to \\x1f as white space."""
_TOKEN = re.compile(r"\\p\{[A-Za-z]+\}|\\.|\(\?i:|\(\?:|\(\?!|.", re.DOTALL)

_MOST_PIECES = 400_000
_LONGEST = 64
"""Longer pieces are rare and seldom come again; they are not kept."""


class PieceEncoder:
    """Gives the tokens that the tokenizer gives, as unsigned 32-bit integers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pattern = ascii_pattern(json.loads(tokenizer.to_json()))
        self._pieces = None if pattern is None else re.compile(pattern)
        self._spelling = str.maketrans({chr(byte): character for byte, character in byte_characters().items()})
        self._known: dict[str, array[int]] = {}

    def encode(self, text: str) -> array[int]:
        """Token ids of the text, without an end-of-text token."""
        if self._pieces is None or not text.isascii():
            return self._ask_whole(text)
        found = array("I")
        extend, get, length = found.extend, self._known.get, 0
        for piece in self._pieces.findall(text):
            ids = get(piece)
            if ids is None:
                ids = self._ask(piece)
            extend(ids)
            length += len(piece)
        # A pattern that leaves gaps between its matches is not one for findall.
        return found if length == len(text) else self._ask_whole(text)

    def _ask_whole(self, text: str) -> array[int]:
        (ids,) = self._tokenizer.encode_batch([text])
        return array("I", ids)

    def _ask(self, piece: str) -> array[int]:
        ids = array("I", self._tokenizer.encode_piece(piece.translate(self._spelling)))
        if len(piece) <= _LONGEST:
            if len(self._known) >= _MOST_PIECES:
                self._known.clear()
            self._known[piece] = ids
        return ids


def ascii_pattern(parts: dict[str, Any]) -> str | None:
    """The regular expression by which `re` cuts ASCII text as a tokenizer.json does; None if there is none known."""
    if parts["normalizer"] is not None or not all(token["special"] for token in parts["added_tokens"]):
        return None
    pre = parts["pre_tokenizer"]
    if pre["type"] == "ByteLevel":
        return _translated(_GPT2) if pre["use_regex"] else None
    steps = pre.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"] or steps[1]["use_regex"]:
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    return _translated(split["pattern"]["Regex"])


def _translated(pattern: str) -> str | None:
    """The pattern with its classes spelled out for ASCII; None if it holds anything that may mean something else."""
    out, inside = [], False
    for token in _TOKEN.findall(pattern):
        if token == r"\S" and not inside:
            out.append(rf"[^{_ASCII[chr(92) + 's']}]")
        elif token in _ASCII:
            out.append(_ASCII[token] if inside else f"[{_ASCII[token]}]")
        elif token.startswith("\\") or (inside and token in "[&-~|"):
            return None
        else:
            inside = (inside or token == "[") and token != "]"
            out.append(token)
    return "".join(out)
