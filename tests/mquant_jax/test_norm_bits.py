"""On CPU a normed row has the same bits beside any others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.nn.norm import LayerNorm, ProjectedNorm, RMSNorm

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what CPUs do")


@pytest.mark.parametrize("features", [48, 128, 1536])
@pytest.mark.parametrize("kind", [RMSNorm, ProjectedNorm, LayerNorm])
def test_a_row_has_the_same_bits_beside_any_others(kind, features) -> None:
    norm = kind(features, 1e-6)
    x = np.random.default_rng(features).standard_normal((1, 700, features)).astype(np.float32)
    run = jax.jit(norm)
    alone = np.asarray(run(jnp.asarray(x[:, :1])))
    for rows in (2, 3, 8, 16, 64, 256, 700):
        for some in (x[:, :rows], x[:, :rows].swapaxes(0, 1)):
            np.testing.assert_array_equal(run(some)[0, 0], alone[0, 0])
