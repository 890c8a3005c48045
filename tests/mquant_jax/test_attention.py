"""Attention a few queries at a time is attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.numerics import quantize_dynamic
from mquant_jax.ops import attention
from mquant_jax.ops.attention import attend


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_parts_make_the_whole(monkeypatch, batch, with_prefix) -> None:
    rng = np.random.default_rng(0)
    t, s, d = 150, 170, 8

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = draw(batch, 4, t, d), draw(batch, 2, d, s), draw(batch, 2, s, d)
    prefix = (draw(2, 3, d), draw(2, 3, d)) if with_prefix else None
    causal = jnp.arange(s)[None, None] <= jnp.arange(t)[None, :, None]
    for mask in (causal, jnp.ones((batch, 1, s), bool)):
        whole = attend(q, k, v, mask, prefix)
        monkeypatch.setattr(attention, "_MOST_LOGITS", {"cpu": (1000, 1000)})
        np.testing.assert_allclose(attend(q, k, v, mask, prefix), whole, rtol=1e-5, atol=1e-6)
        monkeypatch.undo()


@pytest.mark.parametrize("t", [30, 150, 600])
def test_keys_behind_a_block_of_queries_are_not_missed(t) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((2, 4, t, 8), (2, 2, 8, t), (2, 2, t, 8))
    )
    padded = jnp.arange(t)[None] >= jnp.asarray([[0], [11]])
    mask = jnp.tril(jnp.ones((t, t), bool)) & padded[:, None]
    plain = attend(q, k, v, mask)
    got = attend(q, k, v, mask, in_order=True)
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1, 11:], plain[1, 11:], rtol=1e-5, atol=1e-6)
    assert np.isfinite(got).all()  # those that see nothing as well


def test_int8_keys_and_values_are_what_they_stand_for() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((1, 4, 70, 8), (1, 2, 8, 90), (1, 2, 90, 8))
    )
    k8, v8 = quantize_dynamic(k, axis=-2), quantize_dynamic(v)
    assert k8.scale.shape == (1, 2, 1, 90)
    mask = jnp.ones((1, 1, 90), bool)
    expected = attend(q, k8.dequantize(), v8.dequantize(), mask)
    np.testing.assert_allclose(attend(q, k8, v8, mask), expected, rtol=1e-5, atol=1e-6)
