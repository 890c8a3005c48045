"""The TPU's implementation of rope against the plain one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.nn.rope import apply_rope
from mquant_jax.ops.attention import split_heads
from mquant_jax.target import tracing_for


@pytest.mark.parametrize("width", [2, 80, 128])
def test_tpu_form(width) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, width)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(-4, 4, (2, 5, width // 2)), jnp.float32)
    plain = apply_rope(x, angles)
    with tracing_for("tpu"):
        assert "dot_general" in str(jax.make_jaxpr(apply_rope)(x, angles))
        got = apply_rope(x, angles)
        wide = apply_rope(x.astype(jnp.float32), angles)
    assert got.dtype == jnp.bfloat16
    # The swap of halves is exact; sums may round differently.
    np.testing.assert_allclose(got.astype(float), plain.astype(float), atol=2e-2)
    np.testing.assert_allclose(wide, apply_rope(x.astype(jnp.float32), angles), atol=1e-6)


def test_heads() -> None:
    x = jnp.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(heads[1, 1, 2], x[1, 2, 4:])
    with tracing_for("tpu"):
        np.testing.assert_array_equal(split_heads(x, 4), heads)
