"""Bad input to `prepare` and to what reads its shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import TRAIN, Case, corpus_folder
from tests.command_lines import Limits

PARTIAL = (".out.partial/*", ".out.partial/*/*")
MADE = ("runs/corpora/*", "runs/corpora/*/*", "out/*", *PARTIAL)
"""What a prepare writes."""
RUN = ("runs/debug-*/*", "runs/debug-*/checkpoints/*/*")


def _text(name: str, content: bytes) -> Callable[[Path], None]:
    def write(world: Path) -> None:
        path = world / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    return write


def _empty(world: Path) -> None:
    (world / "empty").mkdir()


def _cut_shard(world: Path) -> None:
    os.truncate(corpus_folder(world) / "train-00000.bin", 1001)


def _alter(name: str) -> Callable[[Path], None]:
    def flip(world: Path) -> None:
        path = corpus_folder(world) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def _other_tokenizer(world: Path) -> None:
    path = corpus_folder(world) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def _mixed(world: Path) -> None:
    """Three texts that are UTF-8 and one that is not."""
    (world / "mixed").mkdir()
    for name in ("1", "20", "40"):
        shutil.copy(world / "notes" / f"{name}.txt", world / "mixed")
    _text("mixed/latin.txt", b"caf\xe9 " * 200)(world)


SMALL = "vocab_size=300"

CORPUS = (
    Case("no-folder", "A folder that does not exist", "prepare nots", ("nots", "not a folder or file")),
    Case("empty-folder", "An empty folder", "prepare empty", ("empty",), arrange=_empty, adds=MADE),
    Case("empty-file", "A file without text", "prepare void", ("error",), arrange=_text("void/a.txt", b""), adds=MADE),
    Case("one-document", "One document, which cannot be split", "prepare one vocab_size=300",
         ("error", "document"), arrange=_text("one/a.txt", b"only this one " * 50), adds=MADE),
    Case("not-utf8", "Text that is not UTF-8", f"prepare latin {SMALL}", ("UTF-8",),
         arrange=_text("latin/a.txt", b"caf\xe9 " * 200), adds=MADE),
    Case("broken-json", "A line that is not JSON", f"prepare a.jsonl {SMALL}", ("a.jsonl", "line 2"),
         arrange=_text("a.jsonl", b'{"text": "one"}\n{"text": \n'), adds=MADE),
    Case("missing-field", "Records without the field", f"prepare a.jsonl {SMALL}", ("a.jsonl", "text"),
         arrange=_text("a.jsonl", b'{"body": "one"}\n'), adds=MADE),
    Case("not-gzip", "A .gz file that is not gzip", f"prepare a.jsonl.gz {SMALL}", ("a.jsonl.gz",),
         arrange=_text("a.jsonl.gz", b'{"text": "one"}\n'), adds=MADE),
    Case("unknown-data-key", "A setting of the data that does not exist", "prepare notes vocabsize=300",
         ("vocab_size",)),
    Case("small-vocabulary", "A vocabulary smaller than the bytes", "prepare notes vocab_size=10", ("vocab_size=10",)),
    Case("all-held-out", "Everything held out for validation", "prepare notes validation_fraction=1.5",
         ("validation_fraction",)),
    Case("model-vocabulary", "A tokenizer larger than the model's vocabulary", f"{TRAIN} steps=4 data.vocab_size=5000",
         ("vocab_size",)),
    Case("foreign-tokenizer", "A tokenizer file that is none", f"prepare notes tokenizer=tok.json {SMALL}",
         ("tok.json",), arrange=_text("tok.json", b'{"hello": 1}'), adds=MADE),
    Case("truncated-shard", "A truncated shard", f"{TRAIN} steps=6", ("train-00000.bin",), arrange=_cut_shard),
    Case("altered-shard", "One flipped bit in a shard", f"{TRAIN} steps=6", ("train-00000.bin",),
         arrange=_alter("train-00000.bin")),
    Case("altered-manifest", "A manifest that was edited", f"{TRAIN} steps=6", ("manifest.json",),
         arrange=_alter("manifest.json")),
    Case("altered-tokenizer", "Shards beside another tokenizer", f"{TRAIN} steps=6", ("tokenizer.json",),
         arrange=_other_tokenizer),
    Case("long-context", "A context longer than the corpus", f"{TRAIN} steps=4 seq_len=100000", ("seq_len=100000",),
         adds=RUN),
    Case("prepare-full-disk", "A disk without room for the shards", f"prepare notes {SMALL} --out out",
         ("File too large: .out.partial/", "everything else is intact", "goes on where it stopped"), code=3,
         limits=Limits(file_bytes=20_000), adds=MADE),
    Case("prepare-read-only", "A read-only folder for the corpus", f"prepare notes {SMALL} --out closed/out",
         ("Permission denied", "--out"), limits=Limits(obey_modes=True),
         arrange=lambda world: (world / "closed").mkdir(mode=0o555)),
    Case("interrupted-prepare", "A prepare that was interrupted, given again", f"prepare notes {SMALL} --out out",
         ("corpus: complete",), code=0, first=f"prepare notes {SMALL} --out out",
         first_limits=Limits(file_bytes=20_000), adds=MADE, rewrites=PARTIAL),
    Case("skipped-text", "Text that is not UTF-8, to be left out", f"prepare mixed {SMALL} "
         "source.undecodable=skip", ("left out",), code=0, arrange=_mixed, adds=MADE),
    Case("long-document", "Documents longer than the context", "train debug "
         "data.source=notes seq_len=16 steps=2", ("step 2/2",), code=0, adds=(*RUN, *MADE)),
    Case("occupied", "A folder for the corpus that holds something else", f"prepare notes {SMALL} --out notes",
         ("notes",)),
)  # fmt: skip
