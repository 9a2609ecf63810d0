"""Save a checkpoint while the training goes on: copied to host memory at once, written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.checkpoint.ranges import Held
from pithwood.checkpoint.save import Save, carry_out, prepare
from pithwood.parallel.mesh import Mesh


def begin_save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor | Held],
    state: dict[str, Any],
    keep: int = 2,
    keep_every: int | None = None,
    mesh: Mesh | None = None,
    after: Saving | None = None,
) -> Saving:
    """As `save_checkpoint`, but what is saved is copied to host memory and written by a thread; returns that save.

    after    the save begun before this one: it is waited for first, and its error raised here
    raises   ValueError on bad input, OSError if the folder cannot be made; later errors come from `Saving.wait`

    Costs host memory for what this process writes (pinned, if it comes from a GPU) until the save is done. The tensors
    may change as soon as it returns: copies from a GPU are queued behind the work that made them and ahead of what
    comes next. On a mesh it calls collectives of the whole mesh before it returns, and none after.
    """
    if after is not None:
        after.wait()
    save = prepare(run_dir, step, tensors, state, keep, keep_every, mesh)
    try:
        copies, arrived = _host_copies(save.tensors)
    except BaseException:
        save.drop()
        raise
    return Saving(step, replace(save, tensors=copies), arrived)


class Saving:
    """A checkpoint that is being written beside the training; the thread ends with the process, the save undone."""

    def __init__(self, step: int, save: Save, arrived: torch.cuda.Event | None) -> None:
        self.step = step
        """Of the checkpoint."""
        self._path: Path | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(save, arrived), name=f"save of step {step}", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return not self._thread.is_alive()

    @property
    def path(self) -> Path | None:
        """The checkpoint's folder if it is complete by now."""
        return self._path

    def wait(self) -> Path:
        """The checkpoint's folder, once it is complete; raises what went wrong, the same on all processes."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def _run(self, save: Save, arrived: torch.cuda.Event | None) -> None:
        try:
            if arrived is not None:
                arrived.synchronize()
            self._path = carry_out(save)
        except Exception as error:
            self._error = error


def _host_copies(tensors: Mapping[str, Held]) -> tuple[dict[str, Held], torch.cuda.Event | None]:
    """Copies of what this process writes, in host memory, and when those from a GPU have arrived."""
    devices = {held.tensor.device for held in tensors.values() if held.tensor.device.type == "cuda"}
    if devices:
        # tensors on the host may be the target of copies that are still under way
        torch.cuda.synchronize(next(iter(devices)))
    copies = {}
    for name, held in tensors.items():
        value = held.tensor.detach()
        if not held.writes:
            # its name, dtype and shape are told all the same, so that a tensor that nobody writes is noticed
            copies[name] = held
        elif value.device.type == "cuda":
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copies[name] = replace(held, tensor=pinned.copy_(value, non_blocking=True))
        else:
            copies[name] = replace(held, tensor=value.clone(memory_format=torch.contiguous_format))
    if not devices:
        return copies, None
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(next(iter(devices))))
    return copies, arrived
