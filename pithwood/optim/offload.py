"""Optimizer state that lives in host memory and visits the device a stretch at a time.

While one stretch is worked on, the next is on its way in and the last on its way out, each on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Residence = Callable[[list[list[Tensor]]], Iterator[list[Tensor]]]
"""Takes groups of state tensors and gives each group in turn as tensors on the device, to be changed in place; asking
for the next, or for the end, hands the changed ones back."""

_ALIGNMENT = 256


def in_place(groups: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The residence of state that lives on the device: the tensors themselves."""
    yield from groups


class HostState:
    """Makes state in host memory and is its residence on `device`.

    On CUDA the memory is pinned (torch rounds each tensor up to a power of two), and two windows on the device hold a
    group each. On other devices everything works alike, with ordinary memory and without streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._arriving = torch.cuda.Stream(device) if cuda else None
        self._leaving = torch.cuda.Stream(device) if cuda else None

    def zeros_like(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in host memory, of the parameter's shape."""
        return torch.zeros(param.shape, dtype=dtype, pin_memory=self._arriving is not None)

    def settle(self) -> None:
        """Wait until all that is on its way to the host has arrived: call it before reading or writing the state."""
        if self._leaving is not None:
            self._leaving.synchronize()

    def __call__(self, groups: list[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Give each group in turn, copied to one of two windows; see `Residence`. No host sync."""
        if not groups:
            return
        size = max(sum(_padded(tensor) for tensor in group) for group in groups)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(min(2, len(groups)))]
        if self._arriving is None or self._leaving is None:
            for group in groups:
                window = _window(buffers[0], group)
                _copy(window, group)
                yield window
                _copy(group, window)
            return
        arriving, leaving = self._arriving, self._leaving
        main = torch.cuda.current_stream(self.device)
        # Windows are memory that the main stream may have used, and the host's copy may still be on its way there.
        arriving.wait_stream(main)
        arriving.wait_stream(leaving)
        for buffer in buffers:
            buffer.record_stream(arriving)
            buffer.record_stream(leaving)
        free: list[torch.cuda.Event | None] = [None, None]

        def fetch(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
            window = _window(buffers[index % 2], groups[index])
            with torch.cuda.stream(arriving):
                before = free[index % 2]
                if before is not None:
                    arriving.wait_event(before)
                _copy(window, groups[index])
                return window, arriving.record_event()

        fetched = fetch(0)
        for index, group in enumerate(groups):
            window, there = fetched
            if index + 1 < len(groups):
                fetched = fetch(index + 1)
            main.wait_event(there)
            yield window
            leaving.wait_event(main.record_event())
            with torch.cuda.stream(leaving):
                _copy(group, window)
                free[index % 2] = leaving.record_event()


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _window(buffer: Tensor, group: list[Tensor]) -> list[Tensor]:
    """Tensors like those of the group, one after the other in the buffer."""
    views, start = [], 0
    for tensor in group:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _padded(tensor)
    return views


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for target, value in zip(to, source, strict=True):
        target.copy_(value, non_blocking=True)
