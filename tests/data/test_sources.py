from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from pithwood.data.prepared import PreparedCorpus
from pithwood.data.records import HuggingFaceSource, JsonLinesSource, ParquetSource
from pithwood.data.sources import (
    Document,
    LeftOut,
    PackagesSource,
    SeveralSources,
    Source,
    StdlibSource,
    TextFolder,
)


def read(source: Source) -> list[Document]:
    return [item for item in source.documents() if isinstance(item, Document)]


def left_out(source: Source) -> list[str]:
    return [item.why for item in source.documents() if isinstance(item, LeftOut)]


def test_stdlib_is_this_interpreters_source_without_tests_in_sorted_order():
    documents = read(StdlibSource())
    names = [document.name for document in documents]
    assert {"ast.py", "json/decoder.py", "unittest/case.py", "doctest.py"} <= set(names)
    assert names == sorted(names)
    for name in names:
        parts = name.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled"} & set(parts), name
        assert not parts[-1].startswith(("test_", "_sysconfigdata")), name
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(document.content == (root / document.name).read_bytes() for document in documents)
    assert sum(len(document.content) for document in documents) == StdlibSource().survey().bytes > 5_000_000


def test_stdlib_counts_files_that_are_not_utf8_or_empty(tmp_path, monkeypatch):
    (tmp_path / "lib2to3" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "config-3.11-x").mkdir()
    for name in (
        "b.py",
        "a.py",
        "lib2to3/tests/x.py",
        "site-packages/y.py",
        "config-3.11-x/z.py",
        "_sysconfigdata_.py",
    ):
        (tmp_path / name).write_bytes(b"x = 1\r\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    (tmp_path / "__init__.py").write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [(document.name, document.content) for document in read(StdlibSource())] == [
        ("a.py", b"x = 1\r\n"),
        ("b.py", b"x = 1\r\n"),
    ]
    assert sorted(left_out(StdlibSource())) == ["empty", "not UTF-8"]


def test_stdlib_without_source_files_names_the_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="TextFolder"):
        read(StdlibSource())


def test_folder_keeps_bytes_and_sorts_across_folders(folder):
    documents = read(TextFolder(str(folder)))
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert "sub/doc00.txt" in names
    assert "doc01.txt" in names
    assert "ignored.md" not in names
    assert left_out(TextFolder(str(folder))) == ["empty"]
    assert all(document.content == (folder / document.name).read_bytes() for document in documents)


def test_folder_refuses_text_that_is_not_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 \(byte 3"):
        read(TextFolder(str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "pattern", "message"),
    [
        ("absent", "**/*.txt", "is not a folder"),
        (".", "*.nothing", "matches no file"),
        (".", "/etc/*", "must be a glob"),
        (".", "../*", "must be a glob"),
        (".", "", "must be a glob"),
    ],
)
def test_folder_refuses_what_it_cannot_read(tmp_path, path, pattern, message):
    with pytest.raises(ValueError, match=message):
        read(TextFolder(str(tmp_path / path), pattern))


def test_folder_leaves_out_text_that_is_not_utf8_if_asked(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_bytes(b"cafe")
    source = TextFolder(str(tmp_path), undecodable="skip")
    assert [document.name for document in read(source)] == ["good.txt"]
    assert left_out(source) == ["not UTF-8"]


def test_hidden_files_are_left_out_unless_the_pattern_names_them(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".git/config", ".env", "a.md"):
        (tmp_path / name).write_text("text")
    assert [document.name for document in read(TextFolder(str(tmp_path), "**/*"))] == ["a.md"]
    assert [document.name for document in read(TextFolder(str(tmp_path), ".git/*"))] == [".git/config"]


@pytest.mark.parametrize("unit", ["a line of text\n", "東京é🙂", "\U0001f642"])
def test_large_files_become_documents_cut_at_lines_or_characters(tmp_path, unit):
    content = (unit * (10_000 // len(unit.encode()))).encode()
    (tmp_path / "large.txt").write_bytes(content)
    documents = read(TextFolder(str(tmp_path), max_document_bytes=1024))
    assert b"".join(document.content for document in documents) == content
    assert len(documents) >= 10
    assert [document.name for document in documents[:2]] == ["large.txt#1", "large.txt#2"]
    assert all(len(document.content) <= 1024 and document.text for document in documents)
    assert "\n" not in unit or all(document.content.endswith(b"\n") for document in documents)


def test_packages_are_the_installed_ones_without_tests():
    documents = read(PackagesSource(only=("packaging",)))
    names = [document.name for document in documents]
    assert "packaging/version.py" in names
    assert names == sorted(names)
    assert all(name.startswith("packaging/") for name in names)
    with pytest.raises(ValueError, match=r"data\.source\.only names no_such_package"):
        read(PackagesSource(only=("no_such_package",)))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("notes", TextFolder("notes", "**/*")),
        ("src/**/*.py", TextFolder("src", "**/*.py")),
        ("/a/b*/c.txt", TextFolder("/a", "b*/c.txt")),
        ("x.jsonl", JsonLinesSource("x.jsonl")),
        ("d/*.jsonl.gz", JsonLinesSource("d/*.jsonl.gz")),
        ("x.jsonl.zst", JsonLinesSource("x.jsonl.zst")),
        ("d/*.parquet", ParquetSource("d/*.parquet")),
        ("stdlib", StdlibSource()),
        ("packages", PackagesSource()),
        ("hf:gpt2-output", HuggingFaceSource("gpt2-output")),
        ("hf:owner/name/config", HuggingFaceSource("owner/name", config="config")),
        ("corpus:made", PreparedCorpus("made")),
        ("stdlib, notes", SeveralSources((StdlibSource(), TextFolder("notes", "**/*")))),
    ],
)
def test_short_texts_name_sources(text, source):
    assert Source.from_text(text) == source


def test_several_sources_follow_one_another_under_numbered_names(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    source = Source.from_text(f"{tmp_path}/b,{tmp_path}/a")
    assert [(d.name, d.content) for d in read(source)] == [("0/x.txt", b"b"), ("1/x.txt", b"a")]
    assert source.survey().bytes == 2


def test_a_prepared_corpus_gives_back_its_documents(corpus, folder):
    documents = read(PreparedCorpus(str(corpus.folder)))
    assert len(documents) == corpus.num_documents("train") + corpus.num_documents("validation")
    assert all(document.content == (folder / document.name).read_bytes() for document in documents)
