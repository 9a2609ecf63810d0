"""The corpus of several processes: one reads the source, the others open what it made."""

from __future__ import annotations

import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from pithwood.checkpoint.signals import StopRequest
from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture, MixtureConfig, MixturePart, open_data
from pithwood.data.prepare import CorpusConfig
from pithwood.data.prepared import PreparedCorpus
from pithwood.data.sources import TextFolder
from pithwood.data.together import open_together
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import Mesh
from tests.data.texts import prose
from tests.processes import run_on

TWO = MeshConfig(dp_shard=2)
TEXT = "Some words of a text, and then some more of them.\n" * 200


def opened(
    mesh: Mesh, cfg: CorpusConfig | MixtureConfig, caches: list[str], stops: bool
) -> tuple[str | None, list[str]]:
    """The fingerprint of what a process opened, and the sources that it read; stops: a signal comes meanwhile."""
    read: list[str] = []

    cache = Path(caches[mesh.rank])

    def make() -> Corpus | Mixture:
        read.append(str(cache))
        if stops:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        return open_data(cfg, cache)

    with Watch(mesh) as watch, StopRequest() as stop:
        data = open_together(cfg, cache, mesh, watch, partial(stop.unless_stopped, make))
        assert stop.requested == (stops and mesh.is_first)
    return None if data is None else data.fingerprint, read


@pytest.fixture
def text(tmp_path: Path) -> TextFolder:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number:02}.txt").write_text(prose(number, 150))
    return TextFolder(str(tmp_path / "text"))


def test_one_process_reads_and_the_others_open_the_same(text, tmp_path):
    cache = str(tmp_path / "cache")
    one = CorpusConfig(source=text, vocab_size=300)
    parts = {"a": MixturePart(text), "b": MixturePart(TextFolder(text.path, "1*.txt"))}
    mixed = MixtureConfig(parts, tokenizer_part="a", vocab_size=300)
    for cfg in (one, mixed):
        (found, read), (same, nothing) = run_on(TWO, opened, cfg, [cache, cache], False)
        assert (found, read) == (open_data(cfg, Path(cache)).fingerprint, [cache])
        assert (same, nothing) == (found, [])


def test_a_corpus_outside_the_cache_is_opened_where_it_lies(text, tmp_path):
    made = open_data(CorpusConfig(source=text, vocab_size=300), tmp_path / "elsewhere")
    cfg = CorpusConfig(PreparedCorpus(str(made.folder)))
    found = run_on(TWO, opened, cfg, [str(tmp_path / "cache")] * 2, False)
    assert [fingerprint for fingerprint, _ in found] == [made.fingerprint] * 2


def unseen(mesh: Mesh, cfg: CorpusConfig, caches: list[str]) -> str:
    try:
        cache = Path(caches[mesh.rank])
        open_together(cfg, cache, mesh, Watch(mesh), partial(open_data, cfg, cache))
    except ValueError as error:
        return str(error)
    return ""


def test_a_process_that_does_not_see_the_corpus_says_so(text, tmp_path):
    caches = [str(tmp_path / "cache"), str(tmp_path / "other")]
    first, second = run_on(TWO, unseen, CorpusConfig(source=text, vocab_size=300), caches)
    assert first == ""
    assert re.fullmatch(
        rf"process 1 on \S+ does not see {caches[1]}/\w+, the corpus that the first process made; .* all hosts see it",
        second,
    )


def test_a_signal_ends_the_preparation_for_all(text, tmp_path):
    cfg, cache = CorpusConfig(source=text, vocab_size=300), str(tmp_path / "cache")
    assert run_on(TWO, opened, cfg, [cache, cache], True, seconds=50) == [(None, [cache]), (None, [])]
