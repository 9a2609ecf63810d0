"""What a finished run leaves behind: the full validation, samples, pictures and the summary."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pithwood.data.batches import Batch, sequential_batches
from pithwood.data.corpus import Corpus
from pithwood.data.curriculum import Curriculum
from pithwood.data.mixture import Mixture, corpora_of
from pithwood.data.usage import epochs_read, read_so_far
from pithwood.evaluate.parts import losses
from pithwood.generate.sample import generate
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import EventLog, read_events, write_atomically
from pithwood.observe.plots import plot_blocks, plot_loss
from pithwood.observe.summary import write_summary
from pithwood.ops.packing import Selection
from pithwood.run import Run
from pithwood.trainer import Trainer


def finish(
    trainer: Trainer, corpus: Corpus | Mixture, folder: Path, events: EventLog, curriculum: Curriculum
) -> dict[str, Any]:
    """Validate on everything, sample, draw loss.png and blocks.png, write summary.json; returns the summary.

    curriculum  what was read of each part

    All processes of a mesh validate; the first writes. Samples and chosen blocks need a whole model in one process, and
    are left to `pithwood generate` and `inspect` after a run on several.
    """
    run, started = trainer.run, time.monotonic()
    selections: dict[str, tuple[torch.Tensor, int]] = {}
    result = trainer.evaluate(corpus, None)
    read = read_so_far(corpus, curriculum, run.steps)
    events.emit("validation", run.steps, tokens=trainer.tokens, **losses(result), **read)
    if trainer.part is None:
        with trainer.averaged_weights():
            write_atomically(folder / "sample.txt", _samples(run, trainer.model, corpus).encode())
            sizes = {"seq_len": run.seq_len, "samples_per_batch": run.samples_per_micro_batch}
            first = next(iter(corpora_of(corpus).values()))
            sample = next(iter(sequential_batches(first, "validation", max_samples=1, **sizes)))
            selections = chosen_blocks(trainer.model, sample, trainer.dtype)
    if not trainer.mesh.is_first:
        return {}
    events.flush()
    log = read_events(folder / "events.jsonl")
    gzip = corpus.gzip_bits_per_byte
    plot_loss(log, gzip, folder / "loss.png", title=None)
    if selections:
        plot_blocks(selections, folder / "blocks.png")
    trained = [event for event in log if event["kind"] == "train"]
    counts, alone = trainer.whole.num_params(), trainer.part is None
    summary: dict[str, Any] = {
        "recipe": run.name,
        "run_dir": str(folder),
        "steps": run.steps,
        "tokens": trainer.tokens,
        "seconds": sum(event["step_s"] for event in trained) + _pauses(log) + time.monotonic() - started,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "validation_loss": result["loss"],
        "validation_bits_per_byte": result["bits_per_byte"],
        "validation_tokens": result["tokens"],
        "validation_bytes": result["bytes"],
        **{f"validation_{name}": value for name, value in result.items() if "/" in name},
        "epochs": epochs_read(corpus, curriculum, run.steps),
        "gzip_bits_per_byte": gzip,
        "below_gzip": result["bits_per_byte"] < gzip,
        "train_loss": trained[-1]["loss"],
        "tokens_per_s": median(event["tokens_per_s"] for event in trained),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "files": [
            "loss.png",
            *(["blocks.png"] if selections else []),
            *(["sample.txt"] if alone else []),
            "events.jsonl",
            "config.json",
        ],
    }
    write_summary(folder, summary)
    events.emit(
        "done", run.steps, tokens=trainer.tokens, seconds=summary["seconds"], bits_per_byte=result["bits_per_byte"]
    )
    return summary


def _pauses(log: list[dict[str, Any]]) -> float:
    return sum(event.get("seconds", 0.0) for event in log if event["kind"] in ("validation", "checkpoint"))


@torch.no_grad()
def chosen_blocks(model: Qwen3MoE, batch: Batch, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, int]]:
    """Each MoBA layer's block ids [T, S, k] for the longest document of a batch, and its block size."""
    device = model.device
    probe: dict[str, Any] = {}
    model.hidden(batch.columns["tokens"].to(device), batch.packing.to(device), dtype=dtype, probe=probe)
    cu = batch.packing.cu_q.long()
    longest = int((cu[1:] - cu[:-1]).argmax())
    span = slice(int(cu[longest]), int(cu[longest + 1]))
    found = {}
    for key, value in probe.items():
        if isinstance(value, Selection) and value.row_size == 1 and value.unit > 1:
            found[f"layer {key.split('.')[1]}"] = (value.ids[span].cpu(), value.unit)
    return found


def _samples(run: Run, model: Qwen3MoE, corpus: Corpus | Mixture) -> str:
    if not run.sample_prompts:
        return ""
    tokenizer = corpus.tokenizer
    # every document of the corpus begins with the end-of-text token, so a prompt does too
    prompts = [[tokenizer.end_of_text_id, *tokenizer.encode(prompt)] for prompt in run.sample_prompts]
    continued = generate(
        model,
        prompts,
        max_new_tokens=run.sample_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=run.seed,
        eos_id=tokenizer.end_of_text_id,
        num_tokens=tokenizer.vocab_size,
    )
    parts = [
        f"--- prompt: {prompt!r}\n{prompt}{tokenizer.decode(tokens)}\n"
        for prompt, tokens in zip(run.sample_prompts, continued, strict=True)
    ]
    return "\n".join(parts)
