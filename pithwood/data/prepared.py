"""A corpus that lies prepared in some folder, as a source: `data.source=corpus:FOLDER`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pithwood.data.corpus import DOCUMENTS, SPLITS, Corpus, open_corpus
from pithwood.data.sources import Document, LeftOut, Source, Survey


@dataclass(frozen=True)
class PreparedCorpus(Source):
    """A folder that `pithwood prepare --out` wrote. As data.source it is opened as it is: tokenizer, split and order
    are those it was prepared with, data.vocab_size bounds its tokenizer, the other fields of data have no say."""

    path: str
    """The folder; relative to the working directory, `~` allowed."""

    def validate(self) -> None:
        """Raise ValueError if the path is empty."""
        if not self.path:
            raise ValueError("data.source.path is empty; give the folder of a prepared corpus")

    def open(self) -> Corpus:
        """The corpus; raises ValueError if the folder holds none."""
        return open_corpus(Path(self.path).expanduser())

    def documents(self) -> Iterator[Document | LeftOut]:
        """Its documents, spelled by their tokens; training documents first."""
        corpus = self.open()
        with (corpus.folder / DOCUMENTS).open(encoding="utf-8") as lines:
            for split in SPLITS:
                stream = corpus.stream(split)
                for start, stop in zip(stream.starts, np.append(stream.starts[1:], len(stream)), strict=True):
                    content = corpus.tokenizer.decode_bytes(stream.read(int(start), int(stop)).tolist())
                    yield Document(json.loads(next(lines))["name"], content)

    def survey(self) -> Survey:
        corpus = self.open()
        size = sum(corpus.num_bytes(split) for split in SPLITS)
        return Survey(f"prepared corpus {corpus.folder.name}", len(corpus.manifest["files"]), size)
