"""Recipes that mix corpora: `demo_mixture`, code and prose under one tokenizer, short samples before long ones."""

from __future__ import annotations

import sysconfig
from dataclasses import replace

from pithwood.data.mixture import MixtureConfig, MixturePart
from pithwood.data.sources import StdlibSource, TextFolder
from pithwood.recipes.demo import debug
from pithwood.run import Phase, Run


def demo_mixture() -> Run:
    """Code and prose, 3 to 1, in samples of 64 and then of 256 tokens; a minute or two on two cores.

    The code is the standard library's, the prose what the installed Python packages say of themselves: both are on
    every machine that runs this.
    """
    run = debug()
    packages = TextFolder(sysconfig.get_paths()["purelib"], "*.dist-info/METADATA")
    return replace(
        run,
        name="demo_mixture",
        model=replace(run.model, vocab_size=1024),
        data=MixtureConfig(
            {
                "code": MixturePart(StdlibSource(), weight=3, max_bytes=800_000),
                "prose": MixturePart(packages, weight=1, max_epochs=4, max_bytes=300_000),
            },
            tokenizer_part="code",
            vocab_size=1024,
        ),
        steps=120,
        phases=(Phase(80, seq_len=64), Phase(1_000_000, weights={"code": 1, "prose": 1})),
        validate_every=40,
        checkpoint_every=40,
    )
