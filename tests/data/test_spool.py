from __future__ import annotations

import pytest

from pithwood.data.sources import Document, Source, Survey, TextFolder
from pithwood.data.spool import Spool, SpoolReader

pytestmark = pytest.mark.quick


class Listed(Source):
    """Documents that are given; with an identity, reading them twice is an error."""

    def __init__(self, contents: list[bytes], identity: str | None = None) -> None:
        object.__setattr__(self, "contents", contents)
        object.__setattr__(self, "name", identity)
        object.__setattr__(self, "reads", [])

    def documents(self):
        self.reads.append(1)
        return (Document(f"{row}.txt", content) for row, content in enumerate(self.contents))

    def survey(self) -> Survey:
        return Survey("listed", None, None)

    def identity(self) -> str | None:
        return self.name


LARGE = [bytes([97 + number]) * 3_000_000 for number in range(5)]


def test_documents_come_back_by_their_index_entries(folder, tmp_path):
    spool = Spool(tmp_path / "spool", seed=0)
    list(spool.fill(TextFolder(str(folder))))
    index = spool.index()
    assert len(index) == spool.tally.documents == 26
    assert (spool.tally.empty, spool.tally.undecodable) == (1, 0)
    with SpoolReader(spool.folder) as reader:
        for record in index:
            assert reader.content(record) == (folder / reader.name(record)).read_bytes()


def test_chunks_of_an_earlier_reading_are_used_again_up_to_what_changed(tmp_path):
    first = Spool(tmp_path / "spool", seed=0)
    names = list(first.fill(Listed(LARGE)))
    assert len(names) == 3
    stopped = Spool(tmp_path / "spool", seed=0)
    next(stopped.fill(Listed(LARGE)))
    assert stopped.reused == 1
    changed = Spool(tmp_path / "spool", seed=0)
    again = list(changed.fill(Listed([*LARGE[:4], b"another end"])))
    assert changed.reused == 2
    assert again[:2] == names[:2]
    assert again[2] != names[2]
    assert len(list((tmp_path / "spool").glob("*.text"))) == 3
    with SpoolReader(tmp_path / "spool") as reader:
        assert reader.content(changed.index()[4]) == b"another end"


def test_a_source_with_an_identity_is_not_read_twice(tmp_path):
    source = Listed(LARGE, identity="name@commit")
    first, second = Spool(tmp_path / "spool", seed=0), Spool(tmp_path / "spool", seed=0)
    assert list(first.fill(source)) == list(second.fill(source))
    assert len(source.reads) == 1
    assert second.tally == first.tally


def test_altered_text_is_noticed_and_named(tmp_path):
    spool = Spool(tmp_path / "spool", seed=0)
    (name,) = spool.fill(Listed([b"one", b"two"]))
    path = tmp_path / "spool" / f"{name}.text"
    path.write_bytes(path.read_bytes().replace(b"two", b"owt"))
    with SpoolReader(spool.folder) as reader:
        assert reader.content(spool.index()[0]) == b"one"
        with pytest.raises(ValueError, match=r"\.text is altered; delete .* and prepare again"):
            reader.content(spool.index()[1])
