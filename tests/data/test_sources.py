from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from pithwood.data.sources import StdlibSource, TextFolder


def test_stdlib_is_this_interpreters_source_without_tests_in_sorted_order():
    source = StdlibSource().read()
    names = [document.name for document in source.documents]
    assert {"ast.py", "json/decoder.py", "unittest/case.py", "doctest.py"} <= set(names)
    assert names == sorted(names)
    for name in names:
        parts = name.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled"} & set(parts), name
        assert not parts[-1].startswith(("test_", "_sysconfigdata")), name
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(document.content == (root / document.name).read_bytes() for document in source.documents)
    assert sum(len(document.content) for document in source.documents) > 5_000_000


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
    source = StdlibSource().read()
    assert [(document.name, document.content) for document in source.documents] == [
        ("a.py", b"x = 1\r\n"),
        ("b.py", b"x = 1\r\n"),
    ]
    assert (source.undecodable, source.empty) == (1, 1)


def test_stdlib_without_source_files_names_the_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="TextFolder"):
        StdlibSource().read()


def test_folder_keeps_bytes_and_sorts_across_folders(folder):
    source = TextFolder(str(folder)).read()
    names = [document.name for document in source.documents]
    assert names == sorted(names)
    assert "sub/doc00.txt" in names
    assert "doc01.txt" in names
    assert "ignored.md" not in names
    assert source.empty == 1
    assert all(document.content == (folder / document.name).read_bytes() for document in source.documents)


def test_folder_refuses_text_that_is_not_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 \(byte 3"):
        TextFolder(str(tmp_path)).read()


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
        TextFolder(str(tmp_path / path), pattern).read()
