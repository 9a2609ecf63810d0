"""Rounding to bf16 up or down by chance, so that on average nothing is lost: what state in bf16 needs.

A change below half of a bf16 digit would be rounded away every time; with chances in proportion to the distance it
arrives on average. The chance is a function of (seed, name, step, element) alone, so a resumed run rounds as the
unbroken one did, on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

RoundingKey = tuple[int, int]

_LOW = 0xFFFFFFFF


def rounding_key(seed: int, name: str, step: int) -> RoundingKey:
    """Two int32 that stand for a tensor in a step; equal inputs give equal keys on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def random_bits(count: int, key: RoundingKey, first: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """[count] int64 in 0 to 2^32 - 1: the bits of elements `first` to `first + count - 1`.

    Two rounds of Wellons' 32-bit mixer (lowbias32, https://nullprogram.com/blog/2018/07/31/), the second with the
    other half of the key: far from cryptography, but without visible pattern in its 32 bits.
    """
    element = torch.arange(first, first + count, dtype=torch.int64, device=device)
    bits = _mix((element & _LOW) ^ (key[0] & _LOW))
    return _mix(bits ^ (((element >> 32) + key[1]) & _LOW))


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """x (fp32) rounded to bf16, up with the chance of the distance from below; bits (int64) of which the low 16 count.

    A value that bf16 holds exactly stays itself whatever the bits; infinities and NaN stay what they are.
    """
    pattern = x.contiguous().view(torch.int32).to(torch.int64)
    raised = (pattern + (bits & 0xFFFF).view(x.shape)) & ~0xFFFF
    # back into the range of int32, whose bits are those of the number
    rounded = torch.where(raised > 0x7FFFFFFF, raised - (1 << 32), raised).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
