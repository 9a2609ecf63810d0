"""Bad input to commands that train and use runs: settings, limits of the system, run folders, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import TRAIN, Case, newest_checkpoint, run_folder
from tests.command_lines import Limits

WIDE = "model.model_dim=65536 model.num_layers=64 model.moe.num_experts=256"
LATER = ("runs/debug-*/checkpoints/step-00000006/*",)
REPORTS = ("runs/debug-*/*",)
"""What a resumed run adds and writes anew; the checkpoints that it has are none of it."""


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path, place: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _all_damaged(world: Path) -> None:
    for path in (run_folder(world) / "checkpoints").glob("*/tensors-00000.safetensors"):
        _cut(path)


def _foreign(world: Path) -> None:
    """A folder of the right name with the files of another program."""
    folder = newest_checkpoint(world)
    shutil.rmtree(folder.parent)
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(64))


def _other_tokenizer(world: Path) -> None:
    path = run_folder(world) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def _long_log(world: Path) -> None:
    """An event log that has grown large."""
    path = run_folder(world) / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    padded = json.dumps({"kind": "sink", "step": 1, "name": "x" * 200_000}) + "\n"
    path.write_text("".join([lines[0], padded, *lines[1:]]), encoding="utf-8")


def _future(world: Path) -> None:
    """What a clock leaves behind that was years ahead and has been set right."""
    for path in run_folder(world).rglob("*"):
        os.utime(path, (4_102_444_800, 4_102_444_800))


def _recipe(text: str) -> Callable[[Path], None]:
    def write(world: Path) -> None:
        (world / "mine.py").write_text(text, encoding="utf-8")

    return write


SETTINGS = (
    Case("unknown-key", "A setting that does not exist", "train debug model.modle_dim=64", ("model_dim",)),
    Case("foreign-key", "A setting by the name that transformers gives it", "train debug model.hidden_size=64",
         ("did you mean model.model_dim",)),
    Case("foreign-name", "A setting of another program in another place", "train debug learning_rate=0.001",
         ("did you mean optim.lr",)),
    Case("unknown-recipe", "A recipe that does not exist", "train debgu", ("debgu", "debug")),
    Case("unknown-command", "A command that does not exist", "trian debug", ("trian", "did you mean train")),
    Case("unknown-flag", "An option that does not exist", "train debug --jsn", ("--jsn",)),
    Case("no-equals-sign", "An override without `=`", "train debug steps", ("steps", "path=value")),
    Case("wrong-type", "Text where a number is needed", "train debug steps=many", ("steps", "many")),
    Case("fraction-of-step", "A fraction where a whole number is needed", "train debug steps=1.5", ("steps", "1.5")),
    Case("not-a-number", "A rate that is not a number", "train debug optim.lr=nan", ("optim: lr=nan", "finite")),
    Case("negative", "A negative size", "train debug steps=-3", ("steps=-3", "at least 1")),
    Case("unknown-choice", "A choice that is not offered", "train debug precision=fp8", ("precision", "bf16")),
    Case("unknown-class", "A mixer that does not exist", "train debug model.attention=MobaConfig", ("MoBAConfig",)),
    Case("indivisible", "Micro-batches that do not divide the step", "train debug samples_per_step=8 "
         "samples_per_micro_batch=3", ("samples_per_micro_batch=3", "try one of")),
    Case("heads", "Heads that cannot share keys", "train debug model.num_heads=6 model.num_kv_heads=4",
         ("num_kv_heads=4",)),
    Case("recompute-count", "Not one `recompute` for each block", """train debug recompute='[\"block\"]'""",
         ("recompute has 1 entries", "model.num_layers=2")),
    Case("offload-nothing", "Inputs of recomputed blocks moved where none is recomputed",
         "train debug offload_activations=true", ("offload_activations=true", "set recompute=block")),
    Case("offload-on-cpu", "Activations moved to the host's memory from there",
         "train debug device=cpu recompute=block offload_activations=true", ("offload_activations=true", "on the CPU")),
    Case("copies-of-nothing", "Copies of the weights in the dtype that they have",
         "train debug keep_weight_copies=always", ("keep_weight_copies=always", "precision=fp32")),
    Case("huge-size", "A size beyond any model", "train debug model.model_dim=1e12", ("model_dim", "at most")),
    Case("huge-batch", "More tokens in a micro-batch than an index can count", "train debug seq_len=2e9 "
         "samples_per_step=8 samples_per_micro_batch=8", ("seq_len", "2**31")),
    Case("short-context", "A context of one token", "train debug seq_len=1", ("seq_len=1", "at least 2")),
    Case("too-many-choices", "More experts per token than there are", "train debug model.moe.top_k=100",
         ("top_k=100",)),
    Case("name-with-slash", "A name that cannot be a folder's", "train debug name=a/b", ("name='a/b'",)),
    Case("long-schedule", "A warm-up that is longer than the run", f"{TRAIN} steps=4 "
         "optim.schedule.warmup_fraction=none optim.schedule.warmup_steps=9",
         ("optim.schedule", "do not fit into a run of 4")),
    Case("broken-recipe", "A recipe file that is not Python", "train mine.py:small", ("mine.py", "not valid Python"),
         arrange=_recipe("def small(:\n")),
    Case("failing-recipe", "A recipe that fails", "train mine.py:small", ("ZeroDivisionError", "mine.py, line 2"),
         arrange=_recipe("def small():\n    return 1 / 0\n")),
    Case("other-result", "A recipe that returns something else", "train mine.py:small", ("returned a dict", "Run"),
         arrange=_recipe("def small():\n    return {}\n")),
    Case("mesh-world", "A mesh of more processes than were started", f"{TRAIN} steps=6 mesh.dp_shard=2",
         ("the mesh has 2 processes", "but 1 were started; start 2", "torchrun --nproc-per-node 2")),
    Case("mesh-experts", "Experts divided between more processes than there are",
         f"{TRAIN} steps=6 mesh.dp_shard=2 mesh.ep=4", ("mesh.ep=4 must divide", "try mesh.dp_shard=4")),
    Case("mesh-samples", "Samples that cannot be divided between processes", f"{TRAIN} steps=6 mesh.dp_shard=8",
         ("samples_per_micro_batch=4", "8 processes", "a multiple of 8")),
    Case("mesh-stages", "A pipeline of more stages than layers", f"{TRAIN} steps=6 mesh.pp=4",
         ("mesh.pp=4", "4 stages", "2 layers", "lower mesh.pp")),
)  # fmt: skip

SYSTEM = (
    Case("cannot-fit", "A model larger than the memory (known before it starts)", f"train debug {WIDE}",
         ("but this machine's memory is", "lower samples_per_micro_batch")),
    Case("out-of-memory", "Memory that runs out all the same", f"{TRAIN} steps=4 model.vocab_size=3e5 "
         "name=large", ("out of memory", "lower samples_per_micro_batch", "no checkpoint yet"), code=3,
         limits=Limits(more_memory=600_000_000), adds=("runs/large-*/*", "runs/corpora/*", "runs/corpora/*/*")),
    Case("full-disk", "A disk without room for the next checkpoint", f"{TRAIN} steps=6", ("step-00000006", "File too "
         "large"), code=3, limits=Limits(file_bytes=1_000_000), adds=LATER, rewrites=REPORTS),
    Case("full-disk-log", "A disk without room for the event log", f"{TRAIN} steps=6",
         ("runs/debug-1a2b3c4d/events.jsonl", "checkpoints are intact"), code=3, limits=Limits(file_bytes=100_000),
         arrange=_long_log, rewrites=("runs/debug-*/config.json", "runs/debug-*/tokenizer.json")),
    Case("read-only-run", "A run folder without permission to write", f"{TRAIN} steps=6",
         ("Permission denied", "chmod"), limits=Limits(obey_modes=True),
         arrange=lambda world: (run_folder(world) / "checkpoints").chmod(0o555)),
    Case("read-only-runs", "A runs folder without permission to write", f"{TRAIN} steps=4 name=other",
         ("Permission denied", "chmod"), limits=Limits(obey_modes=True),
         arrange=lambda world: (world / "runs").chmod(0o555)),
    Case("file-for-folder", "A file where the runs folder belongs", f"{TRAIN} steps=4 --runs-dir notes/1.txt",
         ("notes/1.txt", "a file stands where a folder is needed")),
    Case("locked", "A run that another process trains", f"{TRAIN} steps=6", ("in use by process", "wait for it"),
         locked=True),
    Case("clock", "A clock that was years ahead", f"{TRAIN} steps=6", ("step 6/6",), code=0, arrange=_future,
         adds=LATER, rewrites=REPORTS),
    Case("jumping-clock", "A clock that jumps a day ahead and then an hour back, while it trains", f"{TRAIN} steps=6",
         ("step 6/6",), code=0, limits=Limits(jumping_clock=True), adds=LATER, rewrites=REPORTS),
)  # fmt: skip

RUNS = (
    Case("unknown-run", "A run that does not exist", "generate demo", ("demo", "debug-1a2b3c4d")),
    Case("unknown-step", "A step without a checkpoint", "generate debug --step 3", ("3", "4")),
    Case("past-the-end", "Fewer steps than were done", f"{TRAIN} steps=3", ("raise steps to at least 4",)),
    Case("other-shape", "A branch with a model of another size", f"{TRAIN} steps=8 model.model_dim=128 --from "
         "debug@4 --dry-run", ("does not fit this model", "settings that it was saved with")),
    Case("truncated-checkpoint", "A truncated checkpoint, an older one being whole", f"{TRAIN} steps=6",
         ("step-00000004", "damaged"), code=0,
         arrange=lambda world: _cut(newest_checkpoint(world) / "tensors-00000.safetensors"), adds=LATER,
         rewrites=(*REPORTS, "checkpoints/step-00000004/*")),
    Case("altered-checkpoint", "One flipped bit in a checkpoint that is asked for", "generate debug --step 4",
         ("tensors-00000.safetensors", "damaged"),
         arrange=lambda world: _flip(newest_checkpoint(world) / "tensors-00000.safetensors")),
    Case("no-whole-checkpoint", "No checkpoint that is whole", f"{TRAIN} steps=6", ("all 2 checkpoints", "--new"),
         arrange=_all_damaged),
    Case("foreign-checkpoint", "A checkpoint of another program", f"{TRAIN} steps=6",
         ("step-00000004", "not a Pithwood checkpoint"), arrange=_foreign),
    Case("lost-checkpoints", "Checkpoints that were deleted", f"{TRAIN} steps=6", ("holds none", "--new"),
         arrange=lambda world: shutil.rmtree(run_folder(world) / "checkpoints")),
    Case("damaged-config", "A damaged config.json", "generate debug", ("config.json", "not the configuration"),
         arrange=lambda world: _cut(run_folder(world) / "config.json")),
    Case("damaged-summary", "A damaged summary.json", f"{TRAIN} steps=4", ("summary.json", "damaged"),
         arrange=lambda world: _cut(run_folder(world) / "summary.json")),
    Case("other-tokenizer", "A tokenizer that is not the run's", "generate debug", ("tokenizer",),
         arrange=_other_tokenizer),
    Case("prompt-encoding", "A prompt that is not UTF-8", "generate debug --prompt-file prompt.txt",
         ("prompt.txt", "UTF-8"), arrange=lambda world: (world / "prompt.txt").write_bytes(b"caf\xe9")),
    Case("empty-name", "A run without a name", "generate ''", ("which run",)),
    Case("no-tokens", "No tokens to generate", "generate debug --max-tokens 0", ("--max-tokens",)),
    Case("evaluate-text", "Text to evaluate on that does not exist", "evaluate debug --text nothing.txt",
         ("nothing.txt",)),
    Case("evaluate-corpus", "A corpus of another tokenizer", "evaluate debug --corpus copy",
         ("tokenizer",), first="prepare notes vocab_size=300 --out copy"),
    Case("compare-one", "A comparison with a run that does not exist", "runs compare debug demo", ("demo",)),
    Case("temperature", "A temperature below 0", "generate debug --temperature -1", ("temperature",)),
)  # fmt: skip
