from __future__ import annotations

from pathlib import Path

import pytest

from pithwood.data.corpus import Corpus
from pithwood.data.prepare import CorpusConfig, prepare
from pithwood.data.sources import TextFolder
from tests.data.texts import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("texts") / "folder")


@pytest.fixture(scope="session")
def cfg(folder: Path) -> CorpusConfig:
    return CorpusConfig(TextFolder(str(folder)), vocab_size=300, validation_fraction=0.2, shard_tokens=1000)


@pytest.fixture(scope="session")
def corpus(cfg: CorpusConfig, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Shared and therefore never to be altered."""
    return prepare(cfg, tmp_path_factory.mktemp("cache"))
