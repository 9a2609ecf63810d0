"""Initial weights as a function of (seed, canonical name, global element index): the same on every mesh and device.

Each element's bits come from a counter hash (the splitmix64 finaliser over the element's index, keyed by seed and
name), so any shard of a tensor can be filled without the rest of it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 24
"""Elements hashed at a time: int64 and fp64 temporaries that stay in a core's cache, or fill a GPU (400 MB)."""


def normal_values(seed: int, name: str, index: Tensor, std: float) -> Tensor:
    """Standard normal values times `std` for global element indices [n] int64; fp32, at most 8.3 standard deviations
    away.

    Box-Muller would need two uniforms; the inverse error function needs one hash per element and is smooth in it.
    """
    bits = _splitmix64(index, _key(seed, name))
    # 53 random bits, centred in their cell so that 0 and 1 cannot occur (erfinv is infinite there)
    uniform = _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.mul_(2.0).sub_(1.0).erfinv_().mul_(math.sqrt(2.0) * std).float()


@torch.no_grad()
def fill_normal(tensor: Tensor, seed: int, name: str, std: float, first: int = 0) -> None:
    """Fill a contiguous tensor in place; std 0 gives zeros. first: the number of its first element in the tensor of
    this name, of which it is a contiguous range."""
    if std == 0.0:
        tensor.zero_()
        return
    flat = tensor.view(-1)
    chunk = _GPU_CHUNK if tensor.is_cuda else _CPU_CHUNK
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        index = torch.arange(first + start, first + stop, dtype=torch.int64, device=tensor.device)
        flat[start:stop] = normal_values(seed, name, index, std).to(tensor.dtype)


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _splitmix64(index: Tensor, key: int) -> Tensor:
    """The 64-bit finaliser of Steele et al. 2014 over key + (index + 1) * golden ratio; int64 arithmetic wraps as
    needed.
    """
    x = (index + 1).mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))
