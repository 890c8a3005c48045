"""Hadamard matrices and the rotations built from them."""

import numpy as np
import pytest

from mquant_jax.hadamard import Rotation, hadamard, has_hadamard, plan_rotation

# Widths of the paper's published models and of the demo model.
WIDTHS = (192, 256, 512, 576, 1024, 1152, 1280, 1536, 1664, 3584, 4096, 4304, 5120, 8192, 8960,
          11008, 13696, 14336, 15360, 18944, 29568, 3420)  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 60, 64, 76, 100, 108,
                               140, 148, 256])  # fmt: skip
def test_orders_are_orthogonal(n) -> None:
    h = hadamard(n).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize("n", [3, 6, 10, 14, 22, 90])
def test_orders_that_do_not_exist(n) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard(n)


@pytest.mark.parametrize("n", WIDTHS)
def test_every_published_width_has_a_rotation(n) -> None:
    r = plan_rotation(n, seed=1)
    assert r.blocks * r.outer * r.inner == n and max(r.outer, r.inner) <= 256
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, n)).astype(np.float32)
    y = np.asarray(r(x))
    np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=2e-5, atol=2e-3 * n**0.5)


def test_the_matrix_is_orthogonal_and_seeded() -> None:
    eye = np.eye(60, dtype=np.float32)
    first, again, other = (np.asarray(plan_rotation(60, seed=s)(eye)) for s in (1, 1, 2))
    np.testing.assert_allclose(first @ first.T, eye, atol=1e-5)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_signs_keep_a_mean_from_gathering_in_one_channel() -> None:
    x = 1 + 0.1 * np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    plain = np.abs(np.asarray(plan_rotation(512, seed=None)(x))).max()
    signed = np.abs(np.asarray(plan_rotation(512, seed=0)(x))).max()
    assert signed < plain / 4


def test_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="odd width 7"):
        plan_rotation(7)


@pytest.mark.parametrize(("n", "blocks", "outer", "inner", "padding"), [
    (576, 1, 24, 24, 0), (1280, 1, 32, 40, 0), (1536, 1, 32, 48, 0), (3420, 15, 1, 228, 0),
    (3584, 1, 56, 64, 0), (4096, 1, 32, 128, 0), (4304, 1, 60, 72, 16), (5120, 1, 40, 128, 0),
    (8960, 1, 72, 128, 256), (11008, 43, 16, 16, 0), (13696, 107, 8, 16, 0),
    (14336, 1, 112, 128, 0), (15360, 1, 120, 128, 0), (18944, 1, 148, 128, 0),
])  # fmt: skip
def test_plans_stay(n, blocks, outer, inner, padding) -> None:
    """Plans are part of the checkpoint format: a change needs a new
    ``checkpoint.FORMAT_VERSION``."""
    expected = Rotation(n + padding, blocks, outer, inner, 7, padding)
    assert plan_rotation(n, 7, may_pad=True) == expected


def test_signs_stay() -> None:
    """Signs are part of the checkpoint format as well."""
    signs = Rotation(64, 1, 8, 8, seed=7).signs[:16]
    assert np.flatnonzero(signs < 0).tolist() == [0, 1, 5, 8, 12, 13, 14, 15]
