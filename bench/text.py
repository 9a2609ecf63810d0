"""Real text in any amount: the installed Python source, repeated with other words when it is used up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from pithwood.data.sources import Document, PackagesSource, StdlibSource

_WORD = re.compile(r"[A-Za-z_]{4,}")


def write_json_lines(path: Path, num_bytes: int) -> dict[str, int]:
    """Write documents of nearly num_bytes in all, one JSON object a line; returns how much of what there is.

    First come the modules of the standard library and the installed packages as they are, then the same again and again
    with a third of their words renamed, other words each time, so that the rounds are no near-duplicates.
    """
    documents = written = original = 0
    with path.open("w", encoding="utf-8") as file:
        for round_, text in _endless():
            size = len(text.encode())
            if written + size > num_bytes:
                break
            file.write(json.dumps({"text": text}) + "\n")
            documents += 1
            written += size
            original += size if round_ == 0 else 0
    return {"documents": documents, "bytes": written, "unvaried_bytes": original}


def _endless() -> Iterator[tuple[int, str]]:
    sources = (StdlibSource(), PackagesSource())
    round_ = 0
    while True:
        renamed: dict[str, str] = {}
        for source in sources:
            for item in source.documents():
                if isinstance(item, Document):
                    yield round_, _varied(item.text, round_, renamed) if round_ else item.text
        round_ += 1


def _varied(text: str, round_: int, renamed: dict[str, str]) -> str:
    def rename(match: re.Match[str]) -> str:
        word = match.group()
        if word not in renamed:
            chosen = blake2b(f"{round_}/{word}".encode(), digest_size=1).digest()[0] < 85
            renamed[word] = word[: len(word) // 2] + word[::-1][: len(word) // 2] if chosen else word
        return renamed[word]

    return _WORD.sub(rename, text)
