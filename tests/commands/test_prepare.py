"""`pithwood prepare`: what it prints, what it refuses, and that kills change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pithwood.cli import main
from pithwood.data.corpus import open_corpus
from tests.data.texts import write_folder, write_large

ROOT = Path(__file__).parents[2]


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, the leader of a new group."""
    command = [sys.executable, "-m", "pithwood", "prepare", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PITHWOOD_TRACEBACK": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment, start_new_session=True
    )


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_folder(tmp_path / "texts")


def test_a_folder_is_prepared_and_the_train_command_finds_it(texts, capsys):
    words = ["texts/*.txt", "vocab_size=300", "--json"]
    assert main(["prepare", *words]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["train"].endswith("train demo 'data.source=texts/*.txt' data.vocab_size=300 model.vocab_size=300")
    assert open_corpus(Path(first["folder"])).fingerprint == first["fingerprint"]
    assert first["splits"]["train"]["loss_tokens"] == first["splits"]["train"]["tokens"] - 1
    small = ["steps=1", "seq_len=32", "samples_per_step=1", "samples_per_micro_batch=1", "sample_tokens=0"]
    command = [*first["train"].split("pithwood ")[-1].replace("'", "").split(), *small, "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert f"corpus: found prepared in {first['folder']}" in captured.err
    assert json.loads(captured.out)["steps"] == 1


def test_a_corpus_in_a_folder_of_its_own_is_named_in_the_train_command(texts, capsys):
    assert main(["prepare", "texts/*.txt", "vocab_size=300", "--out", "made"]) == 0
    last = capsys.readouterr().out.splitlines()
    assert last[0].startswith("corpus ")
    assert last[-1].endswith("train demo data.source=corpus:made data.vocab_size=300 model.vocab_size=300")
    assert main([*last[-1].split("pithwood ")[-1].split(), "--dry-run"]) == 0


def test_other_vocabularies_than_the_recipes_are_carried_over_to_the_model(texts, capsys):
    parts = ["texts/*.txt", "vocab_size=5000", "tokenizer=made/tokenizer.json"]
    assert main(["prepare", "texts/*.txt", "vocab_size=300", "--out", "made"]) == 0
    capsys.readouterr()
    assert main(["prepare", *parts, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"].endswith("model.vocab_size=5000")


def test_dry_run_tells_what_would_be_read_and_writes_nothing(texts, capsys, tmp_path):
    assert main(["prepare", "texts/*.txt", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"]["files"] == len(list(texts.glob("*.txt")))
    assert told["config"]["source"]["type"] == "TextFolder"
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "data.source.path='nowhere' is not a folder or file"),
        (["texts/*.rst"], "data.source.pattern='*.rst' matches no file under data.source.path='texts'"),
        (["texts/empty.txt"], "data.source holds no documents: every file is empty or not UTF-8"),
        (["texts/doc01.txt"], "at least 2 are needed, one of them to validate on"),
        (["bad"], "latin.txt is not UTF-8 (byte 3"),
        (["texts/*.txt", "vocabsize=300"], "did you mean vocab_size?"),
        (["texts/*.txt", "vocab_size=9000"], "data.vocab_size=9000 is more than the training text supports"),
        (["texts/*.txt", "tokenizer=nowhere.json"], "data.tokenizer.path='nowhere.json' is not a tokenizer.json"),
        (["corpus:texts"], "texts is not a prepared corpus: manifest.json is missing"),
        (["texts/*.txt", "--workers", "0"], "workers=0 must be at least 1"),
        (["texts/*.txt", "--out", "texts"], "texts exists and is no prepared corpus"),
        (["texts/*.txt", "--runs-dir", "texts/doc01.txt"], "choose a folder that can be written, with --runs-dir"),
        ([","], "data.source is empty"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_the_texts_alone(texts, tmp_path, capsys, words, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "latin.txt").write_bytes(b"caf\xe9")
    before = {path: path.read_bytes() for path in texts.rglob("*.txt")}
    assert main(["prepare", *words]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("pithwood: error: ")
    assert message in error
    assert captured.out == ""
    assert {path: path.read_bytes() for path in texts.rglob("*") if path.is_file() and path in before} == before


def test_progress_is_lines_of_text_away_from_a_terminal(texts, tmp_path):
    process = start("texts/*.txt", "vocab_size=300", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert all(line.startswith(("corpus: ", "tokenizer: ")) for line in err.splitlines()), err
    assert "\x1b" not in err


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until `count` paths are in the folder that were not there at the call."""
    old = set(folder.rglob("*"))
    deadline = time.monotonic() + 120
    while len(set(folder.rglob("*")) - old) < count:
        assert process.poll() is None, "the process ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    root = tmp_path / "large"
    root.mkdir()
    write_large(root, num_bytes=24_000_000)
    words = ("large/*.txt", "vocab_size=400", "tokenizer=TrainBPE", "tokenizer.sample_bytes=200_000", "--json")
    out, _ = start(*words, "--out", "unbroken", cwd=tmp_path).communicate(timeout=300)
    expected = json.loads(out)
    generator = random.Random(5)
    # Moments count files that appear (about 55 in all, the tokenizer the 27th), so that they fall into the work on a
    # machine of any speed: when there is something to resume, within the imports, and soon after work goes on.
    for moment in (generator.randint(8, 28), None, generator.randint(1, 6)):
        process = start(*words, "--out", "killed", cwd=tmp_path)
        if moment is None:
            time.sleep(generator.uniform(0, 0.3))
        else:
            wait_for_files(tmp_path / ".killed.partial", moment, process)
        # Only the parent: the workers have to notice by themselves.
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    out, err = start(*words, "--out", "killed", cwd=tmp_path).communicate(timeout=300)
    assert "resuming the prepare that was interrupted" in err
    for name in open_corpus(tmp_path / "unbroken").manifest["files"]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert json.loads(out)["fingerprint"] == expected["fingerprint"]
    open_corpus(tmp_path / "killed").verify()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
