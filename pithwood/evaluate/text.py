"""Text of one's own in the form of a corpus that lies in memory, so that everything that reads corpora can read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pithwood.data.corpus import Corpus, Split, TokenStream
from pithwood.data.tokenizer import END_OF_TEXT_ID, Tokenizer


@dataclass(frozen=True)
class TextCorpus(Corpus):
    """Texts as the documents of a validation split; there is nothing to train on, and `folder` holds no files."""

    tokens: TokenStream

    def stream(self, split: Split) -> TokenStream:
        assert split == "validation"
        return self.tokens


def read_texts(files: Sequence[Path]) -> list[str]:
    """The content of UTF-8 files; raises ValueError if one cannot be read as such, or is empty."""
    texts = []
    for file in files:
        try:
            # newlines are kept as they are: every byte of the file is paid for
            texts.append(file.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {file} cannot be read as UTF-8 text: {error}") from error
        if not texts[-1]:
            raise ValueError(f"--text {file} is empty; give a file with text")
    return texts


def corpus_of_texts(texts: Sequence[str], tokenizer: Tokenizer) -> TextCorpus:
    """A corpus whose validation split holds each text as a document, in the order given."""
    ids = [np.array([END_OF_TEXT_ID, *document], dtype=np.int64) for document in tokenizer.encode_batch(texts)]
    starts = np.cumsum([0, *(len(document) for document in ids[:-1])])
    entry = {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(len(document) for document in ids),
    }
    return TextCorpus(Path(), {"splits": {"validation": entry}}, tokenizer, TokenStream(ids, starts))
