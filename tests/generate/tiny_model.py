"""A language model of an embedding, residual mixers and a head, with what generation asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pithwood.attention.base import CacheField, LayerContext, MixerConfig, Mode
from pithwood.generate.cache import Cache
from pithwood.ops.packing import Packing
from pithwood.ops.rope import Rope
from tests.attention.builders import make_mixer

VOCAB = 40


class TinyModel(nn.Module):
    def __init__(self, configs: Sequence[MixerConfig], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mixers = nn.ModuleList([make_mixer(config, seed + i) for i, config in enumerate(configs)])
        self.embedding = nn.Parameter(torch.randn(VOCAB, 24, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCAB, 24, generator=generator) * 0.3)

    def hidden(
        self, tokens_T: Tensor, packing: Packing, cache: Cache | None = None, mode: Mode = "train", **fields: Any
    ) -> Tensor:
        x_TD = self.embedding[tokens_T]
        if cache is not None:
            x_TD = x_TD.to(cache.dtype)
        rope = Rope.from_positions(packing.position_T, 8, 100.0)
        for i, mixer in enumerate(self.mixers):
            view = None if cache is None else cache.layer(i, packing)
            x_TD = x_TD + mixer(x_TD, LayerContext(packing, rope, mode, i, view, **fields)).y_TD
        return x_TD

    def forward_cached(self, tokens_T: Tensor, packing: Packing, cache: Cache, mode: Mode) -> Tensor:
        return self.hidden(tokens_T, packing, cache, mode)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD.float() @ self.head.T

    def cache_fields(self) -> list[tuple[CacheField, ...]]:
        return [mixer.cache_fields() for mixer in self.mixers]  # type: ignore[operator]


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, one list per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
