"""What a run reads of its data: batches for training, epochs of each part, documents that do not fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pithwood.data.batches import TrainingBatches
from pithwood.data.corpus import Corpus
from pithwood.data.curriculum import Curriculum, Stage
from pithwood.data.documents import context_loss
from pithwood.data.mixture import Mixture, MixtureConfig, corpora_of, training_streams


def training_batches(data: Corpus | Mixture, stages: Sequence[Stage], *, seed: int, steps: int) -> TrainingBatches:
    """The batches of a run of `steps` steps over a corpus or mixture.

    raises ValueError if a part is shorter than one sample, or `steps` steps read one more often than its max_epochs
    """
    span_len = max(stage.seq_len for stage in stages)
    bytes_V = data.tokenizer.bytes_per_token()
    batches = TrainingBatches(training_streams(data, span_len), stages, bytes_V=bytes_V, seed=seed)
    if isinstance(data, Mixture):
        check_epochs(data.cfg, batches.curriculum, steps)
    return batches


def check_epochs(cfg: MixtureConfig, curriculum: Curriculum, steps: int) -> None:
    """Raise ValueError if a part would be read more often than its max_epochs allows."""
    for part, (name, usage) in enumerate(zip(cfg.names, curriculum.usage(steps), strict=True)):
        limit = cfg.parts[name].max_epochs
        if limit is None or usage.epochs <= limit:
            continue
        enough, too_many = 0, steps
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            fits = curriculum.usage(middle)[part].epochs <= limit
            enough, too_many = (middle, too_many) if fits else (enough, middle)
        per_epoch = curriculum.num_spans[part] * curriculum.span_len
        raise ValueError(
            f"data.parts.{name}.max_epochs={limit:g}, but {steps} steps read {usage.epochs:.3g} epochs of it "
            f"({usage.tokens:,} tokens, {per_epoch:,} in an epoch); raise max_epochs, lower data.parts.{name}.weight, "
            f"give it more text, or set steps={enough} or less"
        )


def epochs_read(data: Corpus | Mixture, curriculum: Curriculum, steps: int) -> dict[str, float]:
    """Passes over the training text of each part in `steps` steps."""
    return {name: round(usage.epochs, 6) for name, usage in zip(corpora_of(data), curriculum.usage(steps), strict=True)}


def read_so_far(data: Corpus | Mixture, curriculum: Curriculum, steps: int) -> dict[str, float]:
    """Fields of a validation event: `tokens/<part>` and `epochs/<part>` that `steps` steps read of each part of a
    mixture; {} for a corpus.
    """
    if isinstance(data, Corpus):
        return {}
    read = dict(zip(corpora_of(data), curriculum.usage(steps), strict=True))
    epochs = {f"epochs/{name}": passes for name, passes in epochs_read(data, curriculum, steps).items()}
    return {**{f"tokens/{name}": usage.tokens for name, usage in read.items()}, **epochs}


def data_plan(data: Corpus | Mixture, curriculum: Curriculum, steps: int) -> dict[str, Any]:
    """What `steps` steps read, as plain JSON: `parts` by name and `stages` in order.

    Of each part: documents, tokens, tokens_per_epoch (whole samples of the longest length), samples, tokens_read,
    epochs, max_epochs, and for each length of the run how many documents are longer and how many tokens are cut off
    from the beginning of their document. Of each stage: its first and last step, sizes, and the parts' shares.
    """
    stages, corpora = curriculum.stages, corpora_of(data)
    names = list(corpora)
    streams = training_streams(data, curriculum.span_len)
    parts: dict[str, Any] = {}
    for part, (name, stream, usage) in enumerate(zip(names, streams.values(), curriculum.usage(steps), strict=True)):
        settings = data.cfg.parts[name] if isinstance(data, Mixture) else None
        parts[name] = {
            "documents": len(stream.starts),
            "documents_dropped": corpora[name].num_documents("train") - len(stream.starts),
            "tokens": len(stream),
            "tokens_per_epoch": curriculum.num_spans[part] * curriculum.span_len,
            "samples": sum(usage.samples),
            "tokens_read": usage.tokens,
            "epochs": round(usage.epochs, 6),
            "max_epochs": settings.max_epochs if settings else None,
            "context": [
                {"seq_len": seq_len, **asdict(context_loss(stream, seq_len))}
                for seq_len in sorted({stage.seq_len for stage in stages})
            ],
        }
    rows: list[dict[str, Any]] = []
    first = 0
    for number, stage in enumerate(stages):
        until = max(steps, stage.until_step) if number == len(stages) - 1 else stage.until_step
        rows.append(
            {
                "first_step": first,
                "until_step": min(until, steps),
                "seq_len": stage.seq_len,
                "samples_per_step": stage.samples_per_step,
                "samples_per_micro_batch": stage.samples_per_batch,
                "shares": {name: float(share) for name, share in zip(names, stage.shares, strict=True)},
            }
        )
        first = stage.until_step
    return {"parts": parts, "stages": [row for row in rows if row["first_step"] < steps]}
