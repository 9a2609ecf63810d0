from __future__ import annotations

import numpy as np
import pytest

from pithwood.data.order import permute, sample_order

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_every_key_gives_a_permutation(size):
    for key in ("0/0", "0/1", "7/3"):
        image = permute(np.arange(size), size, key)
        assert sorted(image.tolist()) == list(range(size))


def test_a_value_has_the_same_image_alone_and_in_company():
    whole = permute(np.arange(1000), 1000, "k")
    for value in (0, 1, 500, 999):
        assert permute(np.array([value]), 1000, "k").tolist() == [whole[value]]


def test_permutations_look_random():
    size = 2000
    images = np.stack([permute(np.arange(size), size, f"{seed}/0") for seed in range(20)])
    fixed_points = (images == np.arange(size)).sum(axis=1)
    assert fixed_points.mean() < 4  # expectation 1
    neighbours = (np.abs(np.diff(images, axis=1)) == 1).mean()
    assert neighbours < 4 / size  # expectation 2 / size
    # Correlation of place and image, and of two keys: standard deviation 1 / sqrt(size) = 0.022.
    assert all(abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.1 for image in images)
    assert all(abs(np.corrcoef(images[0], image)[0, 1]) < 0.1 for image in images[1:])


def test_small_permutations_reach_every_arrangement():
    seen = {tuple(permute(np.arange(3), 3, f"{seed}/0").tolist()) for seed in range(200)}
    assert len(seen) == 6


def test_order_is_the_same_on_every_machine_and_version():
    # Changing these values breaks the exact resumption of every run that exists.
    assert permute(np.arange(10), 10, "0/0").tolist() == [2, 6, 0, 4, 8, 7, 9, 5, 3, 1]


def test_each_epoch_is_another_permutation():
    order = sample_order(np.arange(3 * 50), 50, key=3).reshape(3, 50)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(50))
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[0], sample_order(np.arange(50), 50, key=4))


def test_huge_corpora_cost_no_memory():
    size = 10**15
    image = permute(np.array([0, 1, size - 1]), size, "k")
    assert len(set(image.tolist())) == 3
    assert image.min() >= 0
    assert image.max() < size
