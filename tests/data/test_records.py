from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pithwood.data.records import HuggingFaceSource, JsonLinesSource, ParquetSource
from pithwood.data.sources import Document, LeftOut, Source

pytestmark = pytest.mark.quick

TEXTS = ["one\r\n", "naïve 東京 🙂", "<|endoftext|>", "last"]


def read(source: Source) -> list[bytes]:
    return [item.content for item in source.documents() if isinstance(item, Document)]


def write_lines(path: Path, records: list) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
        return path
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, name):
    path = write_lines(tmp_path / name, [{"text": text, "id": 1} for text in TEXTS])
    source = Source.from_text(str(path))
    assert read(source) == [text.encode() for text in TEXTS]
    assert [item.name for item in source.documents()] == [f"{name}:{row}" for row in range(1, 5)]


def test_json_lines_look_into_objects_and_leave_out_what_is_no_text(tmp_path):
    records = [{"a": {"b": "x"}}, {"a": {"b": None}}, {"a": {"b": ""}}, {"a": {"b": "\ud800"}}]
    path = write_lines(tmp_path / "x.jsonl", records)
    source = JsonLinesSource(str(path), field="a.b")
    assert read(source) == [b"x"]
    assert [i.why for i in source.documents() if isinstance(i, LeftOut)] == ["empty", "empty", "not UTF-8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"body": "x", "id": 3}\n', r"line 1 has no field 'text'; set data\.source\.field to one of: body, id"),
        (b'{"text": "x"}\n{"text": 3}\n', r"line 2: the field 'text' holds int, not text"),
        (b'{"text": "x"}\n\n{"text": \n', r"line 3 is not JSON"),
        (b"[1]\n", r"line 1 is list, not an object"),
        (b'{"text": "caf\xe9"}\n', r"line 1 is not UTF-8"),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(JsonLinesSource(str(tmp_path / "x.jsonl")))


def test_a_truncated_archive_is_refused_where_it_breaks(tmp_path):
    path = write_lines(tmp_path / "x.jsonl.gz", [{"text": str(number)} for number in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz is broken after line \d+"):
        read(JsonLinesSource(str(path)))


def test_parquet_columns_are_read_in_the_order_of_files_and_rows(tmp_path):
    for name, texts in (("b", TEXTS[2:]), ("a", TEXTS[:2])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2]}), tmp_path / f"{name}.parquet")
    source = Source.from_text(f"{tmp_path}/*.parquet")
    assert read(source) == [text.encode() for text in TEXTS]
    assert [item.name for item in source.documents()] == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1"]


def test_parquet_refuses_other_columns_and_other_files(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"no column 'text'; set data\.source\.column to one of: body, n"):
        read(ParquetSource(str(path)))
    with pytest.raises(ValueError, match=r"column 'n' holds int64, not text"):
        read(ParquetSource(str(path), column="n"))
    path.write_bytes(b"PAR1 no longer")
    with pytest.raises(ValueError, match=r"x\.parquet is not a Parquet file"):
        read(ParquetSource(str(path)))


def test_hugging_face_datasets_are_streamed_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    name = str(tmp_path / "set")
    assert read(HuggingFaceSource(name)) == [text.encode() for text in TEXTS]
    assert read(HuggingFaceSource(name, max_documents=2)) == [text.encode() for text in TEXTS[:2]]
    with pytest.raises(ValueError, match=r"data\.source\.field='body' is no column of .*; it has: text"):
        read(HuggingFaceSource(name, field="body"))
    with pytest.raises(ValueError, match=r"data\.source=hf:.* cannot be loaded"):
        read(HuggingFaceSource(name, split="nowhere"))


def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch):
    real = importlib.import_module

    def without_pyarrow(name: str, package: str | None = None):
        if name.startswith(("pyarrow", "datasets")):
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_pyarrow)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    for source in (ParquetSource(str(path)), HuggingFaceSource("owner/name")):
        with pytest.raises(ValueError, match=r"needs the package (pyarrow|datasets): pip install 'pithwood\[data\]'"):
            read(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (HuggingFaceSource(""), r"data\.source\.name is empty"),
        (HuggingFaceSource("x", revision="main"), r"data\.source\.revision='main' must be a commit"),
        (HuggingFaceSource("x", max_documents=0), r"data\.source\.max_documents=0"),
        (JsonLinesSource("x", field=""), r"data\.source\.field is empty"),
        (ParquetSource("x", column=""), r"data\.source\.column is empty"),
    ],
)
def test_bad_settings_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        source.validate()
