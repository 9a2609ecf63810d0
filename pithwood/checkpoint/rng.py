"""State of the random number generators as JSON values, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

import base64
import random
from typing import Any

import torch
from torch import Tensor


def capture_rng() -> dict[str, Any]:
    """States of Python's generator, torch's CPU generator and that of each CUDA device in use, for `restore_rng`."""
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
    }


def restore_rng(saved: dict[str, Any]) -> None:
    """Set the generators to a captured state; devices that this machine or the saved state lacks keep theirs.

    Raises ValueError if `saved` was not made by `capture_rng`.
    """
    try:
        version, words, gauss = saved["python"]
        state, cuda = _decode(saved["torch"]), [_decode(text) for text in saved["cuda"]]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"random state cannot be restored ({error}); it must come from capture_rng()") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, device_state in enumerate(cuda[:count]):
        torch.cuda.set_rng_state(device_state, index)


def _encode(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
