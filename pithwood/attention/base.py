"""What a token mixer is: its configuration, its forward, the state it keeps in a cache, and what it costs.

A mixer is any module with `forward(x_TD, ctx) -> MixerOut`. It is made by its configuration's `build`, so a mixer that
lives outside this package needs no registration: pass its configuration in the model's `attention` tuple.

Legend: T packed tokens, D model width, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pithwood.losses import LossLedger
from pithwood.ops.packing import Packing
from pithwood.ops.rope import Rope
from pithwood.parallel.context import ContextGroup

Causality = Literal["strict", "leaky_selection", "bidirectional"]
Mode = Literal["train", "prefill", "decode"]


@dataclass(frozen=True)
class Cost:
    """What a forward pass costs. FLOPs count a multiply-add as two; the backward pass is not included."""

    model_flops: float = 0.0
    """What the mathematics needs: causal half, selected blocks and active experts only. MFU counts these, times
    three."""
    executed_flops: float = 0.0
    """What runs, with masked halves, gates and padding."""
    saved_bytes: float = 0.0
    """Activations kept for the backward pass."""
    workspace_bytes: float = 0.0
    """Peak of temporary memory."""
    cache_bytes: float = 0.0
    """Cache kept while decoding the given keys."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.model_flops + other.model_flops,
            self.executed_flops + other.executed_flops,
            self.saved_bytes + other.saved_bytes,
            max(self.workspace_bytes, other.workspace_bytes),
            self.cache_bytes + other.cache_bytes,
        )


@dataclass(frozen=True)
class CacheField:
    """One named piece of state that a mixer keeps while decoding. The allocator in `generate/cache.py` owns the
    storage.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of one row: of one token, block, sequence, or of the whole tail."""
    dtype: torch.dtype
    per: Literal["token", "block", "sequence", "tail"]
    """token: one row for every token. block: one row for every complete block of `block_size` tokens. sequence: one row
    for a sequence, overwritten each step (recurrent state). tail: the last rows of a sequence, overwritten each step
    (convolutions)."""
    block_size: int = 0
    """Tokens per row of a `block` field."""


class LayerCache(Protocol):
    """One layer's cache for N sequences, as a mixer sees it. Rows come and go packed, in the order of the documents.

    `lengths_N` counts the tokens held before this call; the call's own tokens are those of packing.cu_q, and after
    `append` the packed keys are those of packing.cu_k.
    """

    lengths_N: list[int]
    added_N: list[int]
    """This call's tokens per sequence: the lengths behind packing.cu_q, known on the host."""
    decode_attention: Literal["moba", "full"] | None
    """Attention asked for in decode steps by this run of generation; None leaves it to the mixer's configuration."""

    def append(self, name: str, rows_T: Tensor) -> Tensor:
        """Append this call's rows [T_q, *shape] of a token field; returns all rows of all sequences packed, [T_k,
        *shape].
        """
        ...

    def append_in_place(self, name: str, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, but nothing is packed: (rows that hold all sequences with room between, [N] int64 first row of
        each).
        """
        ...

    def append_blocks(self, name: str, rows_U: Tensor, counts_N: list[int]) -> None:
        """Append counts_N[n] finished block rows to each sequence of a block field; rows_U [sum(counts_N), *shape]."""
        ...

    def blocks(self, name: str) -> tuple[Tensor, list[int]]:
        """All rows of a block field, packed by sequence, and how many each sequence holds."""
        ...

    def blocks_in_place(self, name: str) -> tuple[Tensor, Tensor]:
        """As `blocks`, but nothing is packed: (rows that hold all sequences with room between, [N] int64 first row of
        each).
        """
        ...

    def read(self, name: str) -> Tensor:
        """[N, *shape] of a sequence or tail field; zeros before the first write."""
        ...

    def write(self, name: str, value_N: Tensor) -> None:
        """Overwrite a sequence or tail field with [N, *shape]."""
        ...


@dataclass
class LayerContext:
    """Everything a layer may read besides its input. Built once per micro-batch; `layer` and `carry` change from layer
    to layer.
    """

    packing: Packing
    rope: Rope | None
    mode: Mode = "train"
    layer: int = 0
    cache: LayerCache | None = None
    cp: ContextGroup | None = None
    """The processes that share the tokens of this micro-batch, of which `packing` holds this one's; None where it has
    all of them."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """Named state handed from layer to layer (shared indexes, gate residuals); mixers declare names in
    `carry_fields`."""
    replay: dict[str, Any] | None = None
    """Recorded decisions to use instead of computing them: key -> value as `probe` collected it."""
    probe: dict[str, Any] | None = None
    """If given, every decision is stored here under its key."""
    ledger: LossLedger | None = None
    """Where loss terms are recorded and what normalises them; None outside training."""
    recomputing: bool = False
    """True while a backward pass repeats this layer's forward pass: what is counted per token was counted before, and
    nobody reads the values of the layer's output."""

    def decide(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a discrete decision (block selection, expert ids): replayed if recorded, else computed.

        The key is `layers.<layer>.<name>`, one mechanism for routers and attention alike.
        """
        key = f"layers.{self.layer}.{name}"
        value = self.replay[key] if self.replay is not None and key in self.replay else compute()
        if self.probe is not None:
            self.probe[key] = value
        return value


@dataclass
class MixerOut:
    y_TD: Tensor
    carry: dict[str, Tensor] = field(default_factory=dict)
    """Updates to the carry, by name; the block merges them into what the next layer sees."""


@dataclass(frozen=True)
class MixerShape:
    """What a mixer must know of the model that it is built into."""

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer: int
    num_layers: int
    norm_eps: float
    qk_norm: bool
    bias: bool = False


class Mixer(nn.Module):
    """Base of all token mixers."""

    causality: Causality = "strict"
    carry_fields: tuple[str, ...] = ()
    """Names of carry entries that this mixer reads or writes."""
    context_parallel: bool = False
    """Whether `forward` reads `ctx.cp`, and so is right where tokens of a sample lie on several processes."""
    activation_bytes: int = 4
    """Bytes per activation that `cost` counts with, 4 for fp32. The model asks a shallow copy of the mixer in which it
    is set to the size at hand; a mixer whose `cost` does not read it is taken at its word."""

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        raise NotImplementedError

    def cache_fields(self) -> tuple[CacheField, ...]:
        raise NotImplementedError

    def cost(self, packing: Packing) -> Cost:
        """Cost of one forward over a packing whose offsets lie on the CPU, projections included; its bytes are those
        of activations (and of a cache) of `activation_bytes` each. Layers of equal configuration cost the same.
        """
        raise NotImplementedError

    def decision_bytes(self, packing: Packing) -> float:
        """Bytes of what this mixer decides in one forward (`LayerContext.decide`): kept where the rest is computed
        again.
        """
        return 0.0

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        """Overrides of how Muon sees parameters, by local name: a [matrices, rows, cols] view, or None for AdamW.

        Without an override 2-D parameters are one matrix, 3-D ones a stack of matrices, and all else goes to AdamW.
        """
        return {}


def check_context_parallel(mixers: Iterable[Mixer], cp: int) -> None:
    """Raise ValueError if a mixer would not see the tokens that `cp` processes share."""
    unfit = sorted({type(mixer).__name__ for mixer in mixers if not mixer.context_parallel})
    if cp > 1 and unfit:
        raise ValueError(f"{', '.join(unfit)} cannot run with mesh.cp={cp}: set mesh.cp=1, or let forward read ctx.cp")


@dataclass(frozen=True)
class MixerConfig:
    """Base of all mixer configurations."""

    def build(self, shape: MixerShape) -> Mixer:
        """A new mixer with uninitialised parameters; raises ValueError in the words of the config if it cannot fit
        `shape`.
        """
        raise NotImplementedError

    def init_std(self, name: str, default: float) -> float | None:
        """Standard deviation for the initial values of a parameter by local name; 0.0 zeros; None keeps what build()
        set.
        """
        return default
