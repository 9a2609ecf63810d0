"""The order of samples: a keyed permutation that is computed, not stored.

Sample order must be a pure function of (seed, step) that survives library upgrades, so it uses no random generator: a
Feistel network with a fixed mixing function, evaluated only at the samples that a batch asks for. O(1) memory for any
corpus size.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 8
_U64 = np.uint64


def sample_order(numbers: NDArray[np.int64], num_samples: int, key: int | str) -> NDArray[np.int64]:
    """The samples that stand at these places of the endless stream of epochs.

    numbers     [n] int64 >= 0   place in the stream; epoch = number // num_samples
    num_samples                  samples per epoch; each epoch is a permutation of them, keyed by (key, epoch)
    key                          seed of the run, or "seed/part" for one part of a mixture
    returns     [n] int64        sample indices in [0, num_samples)
    """
    assert num_samples >= 1
    epochs = numbers // num_samples
    places = numbers % num_samples
    order = np.empty_like(places)
    for epoch in distinct(epochs):
        chosen = epochs == epoch
        order[chosen] = permute(places[chosen], num_samples, f"{key}/{epoch}")
    return order


def distinct(values: NDArray[np.int64]) -> list[int]:
    """The different values, ascending. Batches hold few of them: a set costs a tenth of a sort of a tiny array."""
    return sorted(set(values.tolist()))


def permute(values: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Images of values in [0, size) under the permutation of range(size) that belongs to `key`.

    Balanced Feistel network over the next even number of bits, walked along its cycle until the image is below `size`
    (fewer than four steps on average). Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5.
    """
    assert values.size == 0 or (values.min() >= 0 and values.max() < size)
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = np.frombuffer(blake2b(key.encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")
    image = _feistel(values.astype(_U64), half_bits, round_keys)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], half_bits, round_keys)
    return image.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = _U64(half_bits), _U64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in round_keys:
        mixed = (right ^ key) * _U64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> _U64(29))) * _U64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed ^ (mixed >> _U64(32))) & mask)
    return (left << bits) | right
