"""Attention a few queries at a time is attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.ops import attention
from mquant_jax.ops.attention import attend


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_parts_make_the_whole(monkeypatch, batch, with_prefix) -> None:
    rng = np.random.default_rng(0)
    t, s, d = 150, 170, 8

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = draw(batch, 4, t, d), draw(batch, 2, s, d), draw(batch, 2, s, d)
    prefix = (draw(2, 3, d), draw(2, 3, d)) if with_prefix else None
    causal = jnp.arange(s)[None, None] <= jnp.arange(t)[None, :, None]
    for mask in (causal, jnp.ones((batch, 1, s), bool)):
        whole = attend(q, k, v, mask, prefix)
        monkeypatch.setattr(attention, "_MOST_LOGITS", {"cpu": (1000, 1000)})
        np.testing.assert_allclose(attend(q, k, v, mask, prefix), whole, rtol=1e-5, atol=1e-6)
        monkeypatch.undo()
