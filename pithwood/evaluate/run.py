"""Evaluate a run folder's model on a split of its corpus or on text of one's own, and keep the result with the run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pithwood.attention.base import MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import sequential_batches
from pithwood.data.corpus import Corpus, Split, open_corpus
from pithwood.data.tokenizer import Tokenizer
from pithwood.evaluate.loss import check_strictly_causal
from pithwood.evaluate.position import loss_by_position, position_edges
from pithwood.evaluate.text import corpus_of_texts, read_texts
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import restore_floats, to_json, write_atomically
from pithwood.run import Run
from pithwood.run_folder import Device, OpenRun, load_tokenizer, open_run, open_run_corpus

Attention = Literal["trained", "full", "moba"]
EVALUATIONS = "evaluations"
"""Folder of a run that holds its evaluations."""
_VARYING = ("seconds", "date", "threads", "device", "torch")
"""What may differ between two evaluations of the same thing."""


@dataclass(frozen=True)
class Asked:
    """What to evaluate a run on, and how."""

    split: Split = "validation"
    """Which part of the corpus."""
    texts: tuple[Path, ...] = ()
    """Files to evaluate on instead of the run's corpus, each a document."""
    corpus: Path | None = None
    """Another prepared corpus to evaluate on, of the same tokenizer."""
    part: str | None = None
    """Which part, of a run that was trained on a mixture."""
    samples: int | None = None
    """Evaluate on the first so many samples; None takes all."""
    seq_len: int | None = None
    """Tokens per sample; None takes the run's."""
    attention: Attention = "trained"
    """trained: the mixers of the checkpoint's step. full: full attention where those are MoBA, with the same weights.
    moba: the run's MoBA where they are full attention."""
    buckets: int | None = None
    """Buckets of positions of equal width; None takes powers of two."""


def evaluate_run(
    reference: str,
    asked: Asked,
    *,
    runs_dir: Path,
    step: int | None = None,
    device: Device = "auto",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Loss, bits per byte and loss by position of a run's model, as `loss_by_position` returns them, and what was
    evaluated.

    reference  run folder, run name or a prefix of it
    raises     ValueError, before the model computes anything, if there is no such run, checkpoint or text, if the
               attention cannot be had with the run's weights, if it sees the future, or if more is asked than there is
    """
    for name in ("samples", "seq_len"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    texts = read_texts(asked.texts)
    opened = open_run(reference, runs_dir, step=step, device=device)
    run, model = opened.run, opened.model
    switch_attention(model, run, asked.attention)
    check_strictly_causal(model)
    if texts:
        split: Split = "validation"
        corpus: Corpus = corpus_of_texts(texts, load_tokenizer(opened.folder))
        source = ", ".join(str(path) for path in asked.texts)
    elif asked.corpus is not None:
        split = asked.split
        corpus = _open_other_corpus(asked.corpus, load_tokenizer(opened.folder))
        source = f"the {split} split of {asked.corpus}"
    else:
        split = asked.split
        corpus = open_run_corpus(opened, runs_dir, progress, asked.part)
        source = f"the {split} split" + (f" of {asked.part}" if asked.part else "")
    seq_len, samples = _sizes(asked, run, corpus.num_tokens(split), source)
    if run.threads and opened.device.type == "cpu":
        torch.set_num_threads(run.threads)  # as in training, so that the run's own losses come out to the last digit
    batches = sequential_batches(
        corpus,
        split,
        seq_len=seq_len,
        samples_per_batch=max(1, run.samples_per_micro_batch * run.seq_len // seq_len),
        max_samples=samples,
    )
    progress(f"{opened.folder.name} at step {opened.step}: {samples} samples of {seq_len} tokens of {source}")
    started = time.monotonic()
    tell = _Ticker(progress, min(samples * seq_len, corpus.num_tokens(split) - 1))
    result = loss_by_position(model, batches, position_edges(seq_len, asked.buckets), opened.dtype, tell)
    return {
        "name": _name(asked, opened, seq_len, samples, corpus, texts),
        "run": opened.folder.name,
        "run_dir": str(opened.folder),
        "recipe": run.name,
        "step": opened.step,
        "trained_tokens": opened.tokens,
        "split": None if texts else split,
        "corpus": None if asked.corpus is None else str(asked.corpus),
        "part": asked.part,
        "texts": [str(path) for path in asked.texts],
        "samples": samples,
        "seq_len": seq_len,
        "attention": asked.attention,
        "mixers": [type(mixer).__name__.removesuffix("Config") for mixer in model.cfg.mixers()],
        "precision": run.precision,
        **result,
        "seconds": time.monotonic() - started,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(opened.device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def switch_attention(model: Qwen3MoE, run: Run, attention: Attention) -> None:
    """Exchange a model's mixers for others that use the same weights; ValueError if the run has none of that kind."""
    present = model.cfg.mixers()
    if attention == "trained":
        return
    wanted = FullAttentionConfig if attention == "full" else MoBAConfig
    mixers = tuple(
        _as_full(mixer) if attention == "full" else _as_moba(mixer, layer, run) for layer, mixer in enumerate(present)
    )
    if not any(type(mixer) is wanted for mixer in mixers):
        kinds = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in present))
        where = "no layer is MoBA or full attention" if attention == "full" else "the run has no MoBA in its settings"
        raise ValueError(
            f"--attention {attention} cannot be had: {where} (its mixers are {kinds}); leave --attention out"
        )
    new, unused = model.set_attention(mixers)
    model.eval()
    if new or unused:
        raise ValueError(
            f"--attention {attention} needs other weights than the run has: {', '.join(sorted({*new, *unused})[:3])}; "
            "leave --attention out"
        )


def save_evaluation(folder: Path, result: dict[str, Any], name: str | None = None) -> Path:
    """Write a result into the run folder's evaluations; returns its file. No other result is ever replaced.

    A result that is already there, equal in all but time and place, keeps its file; another of the same name gets a
    number. raises ValueError if `name` is given and taken.
    """
    if name is not None and evaluation_file(folder, name).exists():
        raise ValueError(f"{evaluation_file(folder, name)} exists; choose another --name")
    stem, number = name or str(result["name"]), 1
    while (path := evaluation_file(folder, stem if number == 1 else f"{stem}-{number}")).exists():
        if _same(path, result):
            return path
        number += 1
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (to_json({**result, "name": path.stem}, indent=2) + "\n").encode())
    return path


def evaluation_file(folder: Path, name: str) -> Path:
    """Where an evaluation of this name lies; ValueError if the name cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"--name {name!r} becomes a file's name; use letters, digits, '_', '-' and '.'")
    return folder / EVALUATIONS / f"{name}.json"


def check_can_save(folder: Path, name: str | None) -> None:
    """Raise ValueError if an evaluation could not be saved, before it is computed."""
    if name is not None and evaluation_file(folder, name).exists():
        raise ValueError(f"{evaluation_file(folder, name)} exists; choose another --name")
    place = folder / EVALUATIONS
    if not os.access(place if place.exists() else folder, os.W_OK | os.X_OK):
        raise ValueError(f"{place} cannot be written to; make it writable, or add --no-save")


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """All saved evaluations of a run, oldest first; ValueError names one that is damaged."""
    results = []
    for path in sorted((folder / EVALUATIONS).glob("[!.]*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        try:
            results.append(restore_floats(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and evaluate again") from None
    return results


def _same(path: Path, result: dict[str, Any]) -> bool:
    """Whether a file holds this result."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    plain = json.loads(to_json(result))
    left_out = {"name", *_VARYING}
    return {k: v for k, v in other.items() if k not in left_out} == {
        k: v for k, v in plain.items() if k not in left_out
    }


def _sizes(asked: Asked, run: Run, tokens: int, source: str) -> tuple[int, int]:
    """(seq_len, samples) of an evaluation over so many tokens, each but the first of which is predicted."""
    if tokens < 2:
        raise ValueError(f"{source} holds {tokens} token; at least 2 are needed, one of them to predict")
    if asked.seq_len is not None and asked.seq_len > tokens - 1:
        raise ValueError(
            f"--seq-len={asked.seq_len} is more than {source} has: {tokens - 1} tokens to predict; lower it, or give "
            "longer text with --text FILE"
        )
    seq_len = asked.seq_len or min(run.seq_len, tokens - 1)
    available = math.ceil((tokens - 1) / seq_len)
    if asked.samples is not None and asked.samples > available:
        raise ValueError(
            f"--samples={asked.samples} is more than {source} has: {available} samples of {seq_len} tokens; "
            "lower it, or leave it out to take all"
        )
    return seq_len, asked.samples or available


def _as_full(mixer: MixerConfig) -> MixerConfig:
    # exact type: what a mixer derived from MoBA does with its weights is not known here
    if type(mixer) is not MoBAConfig:
        return mixer
    return FullAttentionConfig(rope=mixer.rope, softmax_scale=mixer.softmax_scale, key_conv=mixer.key_conv)


def _as_moba(mixer: MixerConfig, layer: int, run: Run) -> MixerConfig:
    """The MoBA that the run's settings have for a layer of full attention, the newest phase first."""
    if type(mixer) is not FullAttentionConfig:
        return mixer
    for attention in (*(phase.attention for phase in reversed(run.phases)), run.model.attention):
        if attention is not None:
            found = replace(run.model, attention=attention).mixers()[layer]
            if type(found) is MoBAConfig:
                return found
    return mixer


def _open_other_corpus(folder: Path, tokenizer: Tokenizer) -> Corpus:
    """A prepared corpus, every byte checked; ValueError if its ids are not those of the run's tokenizer."""
    corpus = open_corpus(folder)
    if corpus.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(
            f"--corpus {folder} was made with another tokenizer than the run's, so its ids mean other tokens; prepare "
            "its text with the run's tokenizer.json, or give the text itself with --text FILE"
        )
    corpus.verify()
    return corpus


def _name(asked: Asked, opened: OpenRun, seq_len: int, samples: int, corpus: Corpus, texts: Sequence[str]) -> str:
    """A name that tells evaluations of different things apart."""
    parts = [f"step-{opened.step:08d}"]
    if texts:
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
        parts.append(re.sub(r"[^A-Za-z0-9_.]+", "-", asked.texts[0].stem)[:40].strip("-.") or "text")
        parts.append(digest)
    elif asked.corpus is not None:
        parts += [asked.split, corpus.fingerprint[:8]]
    else:
        parts += [asked.split, *([asked.part] if asked.part else [])]
    if seq_len != opened.run.seq_len:
        parts.append(f"{seq_len}-tokens")
    split: Split = "validation" if texts else asked.split
    if samples < math.ceil((corpus.num_tokens(split) - 1) / seq_len):
        parts.append(f"{samples}-samples")
    if asked.attention != "trained":
        parts.append(asked.attention)
    if asked.buckets is not None:
        parts.append(f"{asked.buckets}-buckets")
    return "-".join(parts)


class _Ticker:
    """Tells at most every few seconds how far an evaluation is."""

    def __init__(self, progress: Callable[[str], None], total: int, every_s: float = 10.0) -> None:
        self.progress, self.total, self.every_s = progress, total, every_s
        self.last = time.monotonic()

    def __call__(self, tokens: int) -> None:
        if time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            self.progress(f"{tokens:,} of {self.total:,} tokens")
