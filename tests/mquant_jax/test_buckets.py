"""Bucket sizes: few, and never much larger than the request."""

import numpy as np
import pytest

from mquant_jax.runtime import buckets

SIZES = {
    "patches": (buckets.patches, 1),
    "prompt": (buckets.prompt, 32),
    "slots": (buckets.slots, 256),
    "rows": (buckets.rows, 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_hold_what_is_asked_and_are_sizes_themselves(name) -> None:
    size, least = SIZES[name]
    sizes = [size(n) for n in range(1, 6000)]
    assert sizes[0] >= least and sizes == sorted(sizes)
    assert all(n <= s and size(s) == s for n, s in enumerate(sizes, start=1))
    assert list(buckets.up_to(5999, size)) == sorted(set(sizes))


def test_padding_shrinks_with_size() -> None:
    for n in range(129, 20000, 7):
        assert buckets.prompt(n) < n * (1.5 if n <= 1024 else 1.25)
    assert len({buckets.prompt(n) for n in range(1, 2049)}) == 13
    assert len({buckets.slots(n) for n in range(1, 2049)}) == 6


def test_patches_are_a_multiple_of_what_becomes_one_token() -> None:
    for multiple in (1, 4, 9, 16):
        assert all(buckets.patches(n, multiple) % multiple == 0 for n in range(1, 3000, 11))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_groups_sum_up_and_are_few(platform) -> None:
    for n in range(1, 70):
        groups = buckets.groups(n, 64, platform)
        assert sum(groups) == n and set(groups) <= {1, 4, 16, 64}
    assert buckets.groups(5, 4096, "cpu") == [1] * 5


def test_features_of_many_small_pictures_find_room() -> None:
    assert buckets.feature_pieces(3, 1, 64) == buckets.feature_pieces(0, 1, 64)
    needed = np.arange(1, 100)
    assert all(buckets.feature_pieces(int(n), 1, 64) >= n for n in needed)


@pytest.mark.parametrize("multiple", [1, 4, 9, 36, 64])
def test_fine_buckets_waste_little(multiple) -> None:
    for n in range(1, 2000):
        size = buckets.fine(n, multiple)
        assert size % multiple == 0 and n <= size <= n * 1.125 + multiple
