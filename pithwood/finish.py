"""What a finished run leaves behind: the full validation, samples, pictures and the summary."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pithwood.checkpoint.lock import RunLock
from pithwood.data.batches import Batch, sequential_batches
from pithwood.data.corpus import Corpus
from pithwood.data.curriculum import Curriculum
from pithwood.data.mixture import Mixture, corpora_of, open_data
from pithwood.data.usage import epochs_read, read_so_far
from pithwood.errors import is_out_of_memory
from pithwood.evaluate.parts import losses
from pithwood.generate.sample import generate
from pithwood.memory import free_memory
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import EventLog, read_events, write_atomically
from pithwood.observe.plots import plot_blocks, plot_loss
from pithwood.observe.summary import write_summary
from pithwood.ops.packing import Selection
from pithwood.run import DTYPES, Run
from pithwood.run_folder import CORPORA, open_run
from pithwood.trainer import Trainer

SAMPLE = "sample.txt"


def finish(
    trainer: Trainer, corpus: Corpus | Mixture, folder: Path, events: EventLog, curriculum: Curriculum
) -> dict[str, Any]:
    """Validate on everything, sample, draw loss.png and blocks.png, write summary.json; returns the summary.

    curriculum  what was read of each part

    All processes of a mesh validate; the first writes. Samples and chosen blocks need a whole model in one process, and
    are left to `finish_alone` after a run on several.
    """
    run, started = trainer.run, time.monotonic()
    shown: list[str] = []
    result = trainer.evaluate(corpus, None)
    read = read_so_far(corpus, curriculum, run.steps)
    events.emit("validation", run.steps, tokens=trainer.tokens, **losses(result), **read)
    if trainer.part is None:
        with trainer.averaged_weights():
            shown = _show(run, trainer.model, corpus, folder)
    if not trainer.mesh.is_first:
        return {}
    events.flush()
    log = read_events(folder / "events.jsonl")
    gzip = corpus.gzip_bits_per_byte
    plot_loss(log, gzip, folder / "loss.png", title=None)
    trained = [event for event in log if event["kind"] == "train"]
    counts = trainer.whole.num_params()
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
        "files": ["loss.png", *shown, "events.jsonl", "config.json"],
    }
    write_summary(folder, summary)
    events.emit(
        "done", run.steps, tokens=trainer.tokens, seconds=summary["seconds"], bits_per_byte=result["bits_per_byte"]
    )
    return summary


def finish_alone(
    run: Run, summary: dict[str, Any], runs_dir: Path, device: torch.device, tell: Callable[[str], object]
) -> dict[str, Any]:
    """Sample and draw blocks.png after a run on a mesh, in its first process once it has left the others: from the last
    checkpoint, which holds the whole model. Returns the summary, with what was written.

    Nothing is done for a run that was interrupted or has both. Where the model does not fit, a line says so.
    """
    if SAMPLE in summary.get("files", (SAMPLE,)):
        return summary
    folder = Path(summary["run_dir"])
    # what trained is of no use any more; parts of it refer to each other
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # a checkpoint's tensors, and the model that they are copied to, which is made in host memory
    one = 4.0 * summary["parameters"]
    loaded = one * (3 if run.optim.ema_decay > 0 else 2)
    places = {device: loaded, torch.device("cpu"): one if device.type != "cpu" else loaded}
    for place, needed in places.items():
        free = free_memory(place)
        if free is not None and free < needed:
            kind = "the GPU" if place.type == "cuda" else "the host"
            tell(_left_out(folder, f"takes {needed / 1e9:,.1f} GB of {kind}, where {free / 1e9:,.1f} GB are free"))
            return summary
    with RunLock(folder):
        opened = open_run(str(folder), runs_dir, device="cuda" if device.type == "cuda" else "cpu")
        corpus = open_data(run.data, runs_dir / CORPORA, lambda line: None)
        try:
            shown = _show(run, opened.model, corpus, folder)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell(_left_out(folder, "leaves no room for what it computes"))
            return summary
        first, *rest = summary["files"]
        summary = {**summary, "files": [first, *shown, *rest]}
        write_summary(folder, summary)
    return summary


def _left_out(folder: Path, why: str) -> str:
    return (
        f"no {SAMPLE} and no blocks.png: the whole model in one process {why}; where it fits, "
        f"`pithwood generate {folder}` and `pithwood inspect {folder}` do without"
    )


def _show(run: Run, model: Qwen3MoE, corpus: Corpus | Mixture, folder: Path) -> list[str]:
    """Write what only a whole model can show; the names of the files."""
    write_atomically(folder / SAMPLE, _samples(run, model, corpus).encode())
    sizes = {"seq_len": run.seq_len, "samples_per_batch": run.samples_per_micro_batch}
    first = next(iter(corpora_of(corpus).values()))
    sample = next(iter(sequential_batches(first, "validation", max_samples=1, **sizes)))
    selections = chosen_blocks(model, sample, DTYPES[run.precision])
    if not selections:
        return [SAMPLE]
    plot_blocks(selections, folder / "blocks.png")
    return ["blocks.png", SAMPLE]


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
