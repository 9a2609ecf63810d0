"""Activations that wait in host memory between the forward and the backward pass of their block.

Copies run on a stream of their own, beside the computation, and are ordered by events alone: the host waits for
nothing. One stream carries both directions, so a buffer may be written again as soon as its last reading is queued.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL_BYTES = 1 << 20
"""Tensors below this size stay on the device: their copies would cost more than their room."""


class HostStash:
    """Pinned buffers and the stream that fills and empties them, for all blocks of a model on one GPU.

    Besides the block at work, one block's tensors are on the device: in the forward pass those whose copies run while
    the next block computes, in the backward pass those that come back one block ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._last: weakref.ref[Stashed] | None = None
        """What was put last: its tensors have not been let go yet, and the backward pass will ask for it first."""

    def put(self, tensors: Sequence[Tensor]) -> Stashed:
        """Start moving tensors to the host; those of the `put` before are let go on the device.

        By then the computation in between has hidden the copy, and the wait for it costs nothing.
        """
        main = torch.cuda.current_stream(self.device)
        before = None if self._last is None else self._last()
        if before is not None:
            before.let_go(main)
        buffers = [None if tensor.nbytes < SMALL_BYTES else self._buffer(tensor) for tensor in tensors]
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                if buffer is not None:
                    buffer.copy_(tensor, non_blocking=True)
        stashed = Stashed(self, list(tensors), buffers, self.stream.record_event(), before)
        self._last = weakref.ref(stashed)
        return stashed

    def _buffer(self, like: Tensor) -> Tensor:
        free = self._free.setdefault((like.shape, like.dtype), [])
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def give_back(self, buffer: Tensor) -> None:
        """A buffer whose last reading is queued on the stream may be filled again."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


class Stashed:
    """What one `put` took: on the device until the next one, then on the host, then back for `get`."""

    def __init__(
        self,
        stash: HostStash,
        tensors: list[Tensor],
        buffers: list[Tensor | None],
        copied: torch.cuda.Event,
        before: Stashed | None,
    ) -> None:
        self.stash, self.buffers, self.copied = stash, buffers, copied
        self.tensors: list[Tensor] | None = tensors
        """The device tensors while they are there; small ones always are."""
        self.kept = [tensor if buffer is None else None for tensor, buffer in zip(tensors, buffers, strict=True)]
        self.returned: torch.cuda.Event | None = None
        """Set while the tensors come back: the end of their copies."""
        self.spent = False
        # weak: a chain of strong references would keep every forward pass of a run
        self.before = None if before is None else weakref.ref(before)

    def let_go(self, main: torch.cuda.Stream) -> None:
        """Free the device tensors once they are copied; `main` may use their memory again from here on."""
        if not self.spent and self.returned is None:
            main.wait_event(self.copied)
            self.tensors = None

    def fetch(self) -> None:
        """Start bringing the tensors back, unless they are there or on their way."""
        if self.spent or self.tensors is not None:
            return
        stream, main = self.stash.stream, torch.cuda.current_stream(self.stash.device)
        back: list[Tensor] = []
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            # allocated on the stream that will use and free it; the copies wait for what this memory held before
            back.append(torch.empty_like(buffer, device=self.stash.device) if kept is None else kept)  # type: ignore[arg-type]
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for tensor, buffer in zip(back, self.buffers, strict=True):
                if buffer is not None:
                    tensor.copy_(buffer, non_blocking=True)
        self.tensors, self.returned = back, stream.record_event()

    def get(self) -> list[Tensor]:
        """The tensors, for the current stream; those of the `put` before start to come back meanwhile. Once only."""
        if self.spent:
            raise RuntimeError("a second backward pass through activations that were offloaded; run the forward again")
        main = torch.cuda.current_stream(self.stash.device)
        self.fetch()
        main.wait_event(self.copied if self.returned is None else self.returned)
        tensors, self.tensors, self.spent = self.tensors, None, True
        assert tensors is not None
        for buffer in self.buffers:
            if buffer is not None:
                self.stash.give_back(buffer)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensors
