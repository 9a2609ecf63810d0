from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pithwood.data.corpus import SPLITS, Corpus, Split, open_corpus
from pithwood.data.prepare import CorpusConfig, prepare
from pithwood.data.prepared import PreparedCorpus
from pithwood.data.sources import TextFolder
from pithwood.data.tokenizer import END_OF_TEXT_ID, TokenizerFile, TrainBPE, train_tokenizer
from tests.data.texts import prose, write_large


def records(corpus: Corpus) -> list[dict]:
    return [json.loads(line) for line in (corpus.folder / "documents.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(corpus: Corpus, split: Split) -> list[list[int]]:
    """Token ids of each document, its end-of-text token taken off."""
    stream = corpus.stream(split)
    tokens = stream.read(0, len(stream))
    assert tokens[0] == END_OF_TEXT_ID
    pieces = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT_ID)[1:])
    return [piece[1:].tolist() for piece in pieces]


def test_every_byte_of_every_document_is_in_exactly_one_split(corpus, folder):
    spelled = []
    for split in SPLITS:
        texts = [corpus.tokenizer.decode_bytes(ids) for ids in documents_of(corpus, split)]
        assert sum(len(text) for text in texts) == corpus.num_bytes(split)
        assert len(texts) == corpus.num_documents(split)
        assert [record["bytes"] for record in records(corpus) if record["split"] == split] == [len(t) for t in texts]
        spelled += texts
    files = {path.name: path.read_bytes() for path in folder.rglob("*.txt")}
    del files["empty.txt"], files["zz_copy.txt"]  # nothing in it, and a near-duplicate of a file sorted before it
    assert sorted(spelled) == sorted(files.values())


def test_manifest_counts_agree_with_the_files(corpus):
    manifest = corpus.manifest
    assert manifest["source"]["documents"] == 26
    assert manifest["source"]["empty"] == 1
    assert manifest["source"]["duplicates_dropped"] == 1
    assert manifest["dtype"] == "uint16"
    for split in SPLITS:
        stream = corpus.stream(split)
        tokens = stream.read(0, len(stream))
        assert len(stream) == corpus.num_tokens(split)
        assert np.flatnonzero(tokens == END_OF_TEXT_ID).tolist() == stream.starts.tolist()
        assert tokens.max() < corpus.vocab_size
        assert int(corpus.tokenizer.bytes_per_token()[tokens].sum()) == corpus.num_bytes(split)
    assert corpus.num_tokens("train") > 2 * 1000
    assert len(manifest["splits"]["train"]["shards"]) == -(-corpus.num_tokens("train") // 1000)
    corpus.verify()


def test_streams_read_across_shards(corpus):
    stream = corpus.stream("train")
    whole = stream.read(0, len(stream))
    for start, stop in [(0, 0), (995, 1005), (999, 1000), (1000, 1001), (500, 2500), (len(stream) - 3, len(stream))]:
        assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


def test_no_document_is_in_both_splits_and_the_fraction_is_kept(corpus, cfg):
    hashes = {split: {r["blake2b"] for r in records(corpus) if r["split"] == split} for split in SPLITS}
    assert not hashes["train"] & hashes["validation"]
    share = corpus.num_bytes("validation") / (corpus.num_bytes("train") + corpus.num_bytes("validation"))
    assert 0.5 * cfg.validation_fraction < share <= cfg.validation_fraction


def test_equal_documents_stay_on_one_side_when_duplicates_are_kept(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index}.txt").write_text(prose(index % 4, 200))
    source = TextFolder(str(texts))
    for seed in range(4):
        cfg = CorpusConfig(source, vocab_size=260, validation_fraction=0.5, seed=seed, dedup_threshold=None)
        made = prepare(cfg, tmp_path / "cache")
        hashes = {split: [r["blake2b"] for r in records(made) if r["split"] == split] for split in SPLITS}
        assert not set(hashes["train"]) & set(hashes["validation"])
        assert all(hashes[split].count(value) == 3 for split in SPLITS for value in hashes[split])


def test_tokenizer_learns_from_training_documents_only(corpus):
    texts = [corpus.tokenizer.decode(ids) for ids in documents_of(corpus, "train")]
    assert train_tokenizer(texts, corpus.vocab_size).fingerprint() == corpus.tokenizer.fingerprint()


def test_gzip_figure_is_that_of_the_command(corpus):
    text = corpus.validation_text()
    assert text == b"".join(corpus.tokenizer.decode_bytes(ids) for ids in documents_of(corpus, "validation"))
    size = len(gzip.compress(text, 9, mtime=0))
    assert corpus.manifest["gzip_bytes"] == size
    assert corpus.gzip_bits_per_byte == 8 * size / len(text)
    command = subprocess.run(["gzip", "-9", "-n", "-c"], input=text, capture_output=True, check=True).stdout
    assert abs(len(command) - size) <= 8


def test_the_same_input_gives_the_same_files_in_another_process(corpus, cfg, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from pithwood.data.prepare import CorpusConfig, prepare\n"
        "from pithwood.data.sources import TextFolder\n"
        "cfg = CorpusConfig(TextFolder(sys.argv[1]), vocab_size=300, validation_fraction=0.2, shard_tokens=1000)\n"
        "print(prepare(cfg, Path(sys.argv[2])).folder)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, cfg.source.path, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "17"},
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    assert contents(Path(made)) == contents(corpus.folder)


def test_a_prepared_corpus_is_reused(cfg, corpus):
    lines: list[str] = []
    before = {path.name: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}
    again = prepare(cfg, corpus.folder.parent, lines.append)
    assert again.folder == corpus.folder
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert "found prepared" in lines[-1]


def test_a_prepared_corpus_is_opened_where_nothing_can_be_written(cfg, altered):
    # A folder in the place of the lock file stands for a disk that is mounted read-only.
    (altered.parent / f".{altered.name[:12]}.lock").mkdir()
    assert prepare(cfg, altered.parent).folder == altered
    shutil.rmtree(altered)
    with pytest.raises(ValueError, match="choose a folder that can be written, with --runs-dir"):
        prepare(cfg, altered.parent)


def test_the_key_follows_configuration_and_content(cfg, corpus, folder, tmp_path):
    cache = tmp_path / "cache"
    folders = {prepare(cfg, cache).folder.name, prepare(replace(cfg, seed=1), cache).folder.name}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "doc01.txt").write_bytes(b"changed " + (copy / "doc01.txt").read_bytes())
    changed = prepare(replace(cfg, source=TextFolder(str(copy))), cache)
    assert len({*folders, changed.folder.name}) == 3
    assert changed.fingerprint != corpus.fingerprint


def test_seed_shuffles_documents(cfg, corpus, tmp_path):
    other = prepare(replace(cfg, seed=5), tmp_path)
    names = [[r["name"] for r in records(c) if r["split"] == "train"] for c in (corpus, other)]
    assert names[0] != names[1]
    assert names[0] != sorted(names[0])


def test_max_bytes_takes_a_sample_of_whole_documents(cfg, folder, tmp_path):
    made = prepare(replace(cfg, max_bytes=9000, vocab_size=270), tmp_path)
    total = sum(made.num_bytes(split) for split in SPLITS)
    assert 5000 < total <= 9000
    assert all((folder / r["name"]).stat().st_size == r["bytes"] for r in records(made))


class Killed(BaseException):
    pass


def count_progress(cfg: CorpusConfig, cache: Path) -> int:
    lines: list[str] = []
    prepare(cfg, cache, lines.append)
    return len(lines)


def hidden(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]


def test_interruption_at_any_point_leaves_nothing_valid_and_is_resumed(cfg, corpus, tmp_path):
    num_points = count_progress(cfg, tmp_path / "unbroken")
    assert num_points > 9
    for point in range(num_points):
        cache = tmp_path / str(point)
        seen = 0

        def progress(line: str, point: int = point) -> None:
            nonlocal seen
            if seen == point:
                raise Killed(line)
            seen += 1

        with pytest.raises(Killed):
            prepare(cfg, cache, progress)
        assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []
        lines: list[str] = []
        assert contents(prepare(cfg, cache, lines.append).folder) == contents(corpus.folder)
        assert lines[0].startswith("corpus: resuming the prepare that was interrupted, from ")
        assert hidden(cache) == []


def test_a_refused_source_leaves_nothing(cfg, folder, tmp_path):
    texts = Path(shutil.copytree(folder, tmp_path / "texts"))
    (texts / "zzz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"zzz\.txt is not UTF-8"):
        prepare(replace(cfg, source=TextFolder(str(texts))), tmp_path / "cache")
    assert hidden(tmp_path / "cache") == []


def test_death_without_clean_up_leaves_nothing_valid_and_the_cache_usable(cfg, corpus, tmp_path):
    # One forked child per point dies without running any `finally`, as under SIGKILL.
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pithwood.data.prepare import CorpusConfig, prepare\n"
        "from pithwood.data.sources import TextFolder\n"
        "os.environ['RAYON_NUM_THREADS'] = '1'\n"
        "cfg = CorpusConfig(TextFolder(sys.argv[1]), vocab_size=300, validation_fraction=0.2, shard_tokens=1000)\n"
        "for point in range(1, 100):\n"
        "    left = [point]\n"
        "    def progress(line):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0: os._exit(9)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        prepare(cfg, Path(sys.argv[2]), progress); os._exit(0)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "    if code == 0: break\n"
        "    assert code == 9, code\n"
        "    whole = [p for p in Path(sys.argv[2]).iterdir() if not p.name.startswith('.')]\n"
        "    assert whole == [], whole\n"
        "print(point)"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", code, cfg.source.path, str(cache)]
    deaths = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert deaths > 9
    made = prepare(cfg, cache)
    assert contents(made.folder) == contents(corpus.folder)
    assert hidden(cache) == []


def test_processes_that_prepare_at_once_agree(cfg, corpus, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from pithwood.data.prepare import CorpusConfig, prepare\n"
        "from pithwood.data.sources import TextFolder\n"
        "cfg = CorpusConfig(TextFolder(sys.argv[1]), vocab_size=300, validation_fraction=0.2, shard_tokens=1000)\n"
        "lines = []; prepare(cfg, Path(sys.argv[2]), lines.append).verify(); print('found' in lines[-1])"
    )
    command = [sys.executable, "-c", code, cfg.source.path, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in running) == ["False", "True"]
    assert contents(tmp_path / corpus.folder.name) == contents(corpus.folder)


@pytest.fixture
def altered(corpus, tmp_path) -> Path:
    """A copy of the corpus that a test may damage."""
    return Path(shutil.copytree(corpus.folder, tmp_path / corpus.folder.name))


def test_damage_is_found_at_opening_and_named(altered):
    with (altered / "train-00001.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(
        ValueError, match=r"train-00001\.bin has 2002 bytes, manifest\.json says 2000; delete the folder"
    ):
        open_corpus(altered)
    (altered / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing"):
        open_corpus(altered)
    (altered / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        open_corpus(altered)


def test_a_changed_byte_is_found_by_verify(altered):
    data = bytearray((altered / "validation-00000.bin").read_bytes())
    data[10] ^= 1
    (altered / "validation-00000.bin").write_bytes(data)
    opened = open_corpus(altered)
    with pytest.raises(ValueError, match=r"validation-00000\.bin is altered"):
        opened.verify()


def test_another_corpus_tokenizer_is_refused(altered):
    text = (altered / "tokenizer.json").read_text()
    # Two tokens change places: same size, same vocabulary size, other ids.
    swapped = text.replace('"!": ', "\0").replace('"#": ', '"!": ').replace("\0", '"#": ')
    assert swapped != text
    assert len(swapped) == len(text)
    (altered / "tokenizer.json").write_text(swapped)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that made these shards"):
        open_corpus(altered)


def test_bad_manifests_are_refused(altered, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        open_corpus(tmp_path / "absent")
    manifest = json.loads((altered / "manifest.json").read_text())
    (altered / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99, this code reads 1"):
        open_corpus(altered)
    (altered / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "splits"}))
    with pytest.raises(ValueError, match="lacks splits"):
        open_corpus(altered)
    (altered / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_corpus(altered)


def test_a_damaged_cache_is_reported_not_rebuilt(cfg, altered):
    (altered / "train.starts.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.starts\.bin has 0 bytes"):
        prepare(cfg, altered.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 256}, r"data\.vocab_size=256"),
        ({"vocab_size": 60000}, r"data\.vocab_size=60000 is more than"),
        ({"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"max_bytes": 0}, r"data\.max_bytes=0"),
        ({"max_bytes": 3}, r"data\.max_bytes=3 is less than the smallest document"),
        ({"max_bytes": 500}, "at least 2 are needed"),
        ({"dedup_threshold": 0.0}, r"data\.dedup_threshold=0\.0"),
        ({"dedup_threshold": 1.1}, r"data\.dedup_threshold=1\.1"),
        ({"shard_tokens": 0}, r"data\.shard_tokens=0"),
        ({"source": TextFolder("absent folder")}, "is not a folder"),
    ],
)
def test_bad_configurations_are_refused_in_their_own_words(cfg, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(replace(cfg, **change), tmp_path)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_source_of_empty_files_is_refused(cfg, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no documents"):
        prepare(replace(cfg, source=TextFolder(str(tmp_path))), tmp_path / "cache")


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    generator = np.random.Generator(np.random.PCG64(0))
    # Pairs of random CJK characters, each word twice: enough repeated pairs for more than 65536 tokens.
    for index in range(2):
        codes = generator.integers(0x4E00, 0x9F00, size=(36000, 2))
        words = ["".join(chr(code) for code in pair) for pair in codes]
        (texts / f"{index}.txt").write_text(" ".join(word for word in words for _ in range(2)))
    (texts / "small.txt").write_text("held out")
    cfg = CorpusConfig(TextFolder(str(texts)), vocab_size=70000, validation_fraction=0.01)
    made = prepare(cfg, tmp_path / "cache")
    assert made.manifest["dtype"] == "uint32"
    tokens = made.stream("train").read(0, made.num_tokens("train"))
    assert tokens.max() > 1 << 16
    assert made.tokenizer.decode_bytes(tokens.tolist()) == b"".join(
        (texts / r["name"]).read_bytes() for r in records(made) if r["split"] == "train"
    )


def test_a_loaded_tokenizer_is_used_as_it_is_wherever_it_lies(cfg, corpus, tmp_path):
    made = [
        prepare(replace(cfg, tokenizer=TokenizerFile(str(path)), vocab_size=5000), tmp_path / "cache")
        for path in (corpus.folder, shutil.copy(corpus.folder / "tokenizer.json", tmp_path / "copy.json"))
    ]
    assert made[0].folder == made[1].folder
    assert made[0].fingerprint == corpus.fingerprint
    with pytest.raises(ValueError, match=r"data\.vocab_size=299 is less than the 300 tokens of data\.tokenizer\.path"):
        prepare(replace(cfg, tokenizer=TokenizerFile(str(corpus.folder)), vocab_size=299), tmp_path)


def test_documents_begin_with_the_end_of_text_of_their_tokenizer(cfg, corpus, tmp_path):
    parts = json.loads(corpus.tokenizer.to_json())
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": 300, "content": "<stop>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = TokenizerFile(str(tmp_path / "tokenizer.json"), end_of_text="<stop>")
    made = open_corpus(prepare(replace(cfg, tokenizer=tokenizer, vocab_size=301), tmp_path / "cache").folder)
    stream = made.stream("train")
    tokens = stream.read(0, len(stream))
    assert made.tokenizer.end_of_text_id == 300
    assert np.flatnonzero(tokens == 300).tolist() == stream.starts.tolist()
    assert END_OF_TEXT_ID not in tokens


def test_a_tokenizer_is_trained_on_at_most_the_bytes_asked_for(cfg, tmp_path):
    made = prepare(replace(cfg, tokenizer=TrainBPE(sample_bytes=3000)), tmp_path)
    texts = [made.tokenizer.decode(ids) for ids in documents_of(made, "train")]
    assert len(texts[0]) + len(texts[1]) + len(texts[2]) > 3000
    taken = texts[:2] if len(texts[0]) + len(texts[1]) <= 3000 else texts[:1]
    assert train_tokenizer(taken, made.vocab_size).fingerprint() == made.tokenizer.fingerprint()


@pytest.fixture(scope="module")
def large_cfg(tmp_path_factory) -> CorpusConfig:
    """Text of several chunks, so that several processes have work."""
    root = write_large(tmp_path_factory.mktemp("large"), num_bytes=9_500_000)
    return CorpusConfig(TextFolder(str(root)), TrainBPE(100_000), vocab_size=400, shard_tokens=1_000_000)


@pytest.fixture(scope="module")
def large(large_cfg, tmp_path_factory) -> Corpus:
    return prepare(large_cfg, tmp_path_factory.mktemp("large_cache"), workers=1)


def test_the_result_does_not_depend_on_the_number_of_processes(large_cfg, large, tmp_path):
    assert contents(prepare(large_cfg, tmp_path, workers=3).folder) == contents(large.folder)
    assert large.manifest["source"]["duplicates_dropped"] == 5


def test_what_was_done_before_an_interruption_is_not_done_again(large_cfg, large, tmp_path):
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "encoding" and total is not None and done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        prepare(large_cfg, tmp_path, bar=interrupt, workers=1)
    lines: list[str] = []
    again = prepare(large_cfg, tmp_path, lines.append, workers=2)
    assert "corpus: 3 of 3 chunks were read before the interruption" in lines
    assert any(re.fullmatch(r"corpus: [1-9]\d* of \d+ pieces were encoded before the interruption", x) for x in lines)
    assert not any("training" in line for line in lines)
    assert contents(again.folder) == contents(large.folder)


def test_a_source_that_changes_between_two_attempts_gives_what_it_holds_at_the_last(large_cfg, tmp_path):
    root = Path(shutil.copytree(large_cfg.source.path, tmp_path / "texts"))
    cfg = replace(large_cfg, source=TextFolder(str(root)))

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "encoding":
            raise Killed

    with pytest.raises(Killed):
        prepare(cfg, tmp_path / "cache", bar=interrupt, workers=1)
    (root / "0002.txt").write_text("another text, quite different from what was here before\n")
    resumed = prepare(cfg, tmp_path / "cache", workers=1)
    assert contents(resumed.folder) == contents(prepare(cfg, tmp_path / "fresh", workers=1).folder)


def test_progress_is_told_in_bytes_of_text_up_to_the_whole(large_cfg, large, tmp_path):
    told: dict[str, list[tuple[int, int | None]]] = {}
    prepare(large_cfg, tmp_path, bar=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    assert list(told) == ["reading", "comparing", "training the tokenizer on", "encoding"]
    assert told["encoding"][0][0] == 0
    assert told["encoding"][-1] == 2 * (sum(large.num_bytes(split) for split in SPLITS),)
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_loss_tokens_of_each_document_add_up_to_the_targets_of_its_split(corpus):
    for split in SPLITS:
        entries = [record for record in records(corpus) if record["split"] == split]
        assert entries[0]["loss_tokens"] == entries[0]["tokens"] - 1
        assert all(record["loss_tokens"] == record["tokens"] for record in entries[1:])
        assert corpus.manifest["splits"][split]["loss_tokens"] == sum(record["loss_tokens"] for record in entries)
        assert corpus.manifest["splits"][split]["loss_tokens"] == corpus.num_tokens(split) - 1
        assert corpus.manifest["splits"][split]["longest"] == max(record["tokens"] for record in entries)


def test_a_corpus_can_be_written_to_a_folder_of_its_own(cfg, corpus, tmp_path):
    (tmp_path / "made").mkdir()
    made = prepare(cfg, tmp_path / "cache", out=tmp_path / "made")
    assert made.folder == tmp_path / "made"
    assert contents(made.folder) == contents(corpus.folder)
    assert not (tmp_path / "cache").exists()
    lines: list[str] = []
    assert prepare(cfg, tmp_path / "cache", lines.append, out=tmp_path / "made").fingerprint == corpus.fingerprint
    assert "found prepared" in lines[-1]
    opened = prepare(CorpusConfig(PreparedCorpus(str(tmp_path / "made"))), tmp_path / "cache")
    assert opened.fingerprint == corpus.fingerprint
    with pytest.raises(ValueError, match=r"data\.vocab_size=299 is less than the 300 tokens of data\.source\.path"):
        prepare(CorpusConfig(PreparedCorpus(str(tmp_path / "made")), vocab_size=299), tmp_path / "cache")


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(cfg, folder, tmp_path):
    texts = Path(shutil.copytree(folder, tmp_path / "texts"))
    cfg = replace(cfg, source=TextFolder(str(texts)))
    made = prepare(cfg, tmp_path, out=tmp_path / "made").folder
    before = contents(made)
    with pytest.raises(
        ValueError, match=r"other settings: data\.seed \(there 0, asked 5\), data\.vocab_size \(there 300"
    ):
        prepare(replace(cfg, seed=5, vocab_size=310), tmp_path, out=made)
    (texts / "doc01.txt").write_text("changed")
    with pytest.raises(ValueError, match="the text of its source has changed since"):
        prepare(cfg, tmp_path, out=made)
    assert contents(made) == before
    with pytest.raises(ValueError, match="exists and is no prepared corpus"):
        prepare(cfg, tmp_path, out=texts)
    assert contents(texts / "sub")


def test_a_place_that_cannot_be_written_is_named(cfg, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError, match=r"cannot write .*file.*: .*choose a folder that can be written, with --runs-dir"
    ):
        prepare(cfg, tmp_path / "file" / "corpora")
    with pytest.raises(ValueError, match=r"with --out"):
        prepare(cfg, tmp_path, out=tmp_path / "file" / "made")
    with pytest.raises(ValueError, match=r"workers=0 must be at least 1"):
        prepare(cfg, tmp_path, workers=0)
