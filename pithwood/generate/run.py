"""Text from a run folder: load its newest checkpoint, continue a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pithwood.checkpoint.load import load_checkpoint
from pithwood.errors import is_out_of_memory
from pithwood.generate.sample import generate
from pithwood.run_folder import check_tokenizer, find_checkpoint, load_run, load_tokenizer, model_of


def generate_from_run(
    reference: str,
    *,
    runs_dir: Path,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    attention: Literal["moba", "full"] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Continue `prompt` with the model of a run; returns prompt, text, tokens, run_dir, step and tokens_per_s.

    reference  run folder, run name or a prefix of it
    top_k      draw among so many likeliest tokens; None or 0 among all
    attention  how MoBA layers decode: over selected blocks, over all keys, or as their configuration says (None)
    raises     ValueError if there is no such run, checkpoint or step, or an option is out of range
    """
    path = find_checkpoint(reference if step is None else f"{reference}@{step}", runs_dir)
    folder = path.parent.parent
    run = load_run(folder)
    tokenizer = load_tokenizer(folder)
    tensors, state = load_checkpoint(path)
    check_tokenizer(folder, run, tokenizer, state)
    model = model_of(run, int(state["step"]), tensors, averaged=True)
    # every document of the corpus begins with the end-of-text token, so a prompt does too
    tokens = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
    started = time.perf_counter()
    try:
        new = generate(
            model,
            [tokens],
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p,
            seed=seed,
            eos_id=tokenizer.end_of_text_id,
            attention=attention,
            num_tokens=tokenizer.vocab_size,
        )[0]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory; lower --max-tokens={max_tokens} or shorten the prompt of {len(tokens)} tokens"
        ) from error
    seconds = time.perf_counter() - started
    return {
        "prompt": prompt,
        "text": prompt + tokenizer.decode(new),
        "tokens": len(new),
        "run_dir": str(folder),
        "step": int(state["step"]),
        "tokens_per_s": len(new) / max(seconds, 1e-9),
    }
