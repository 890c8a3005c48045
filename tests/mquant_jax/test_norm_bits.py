"""On CPU a row's norm is bit-identical in any batch."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.nn.norm import LayerNorm, ProjectedNorm, RMSNorm

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what CPUs do")


@pytest.mark.parametrize("features", [48, 128, 1536])
@pytest.mark.parametrize("kind", [RMSNorm, ProjectedNorm, LayerNorm])
def test_a_row_has_the_same_bits_beside_any_others(kind, features) -> None:
    rng = np.random.default_rng(features)
    graphdef, params = nnx.split(kind(features, 1e-6))
    params = jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(w.dtype), params)
    run = partial(jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)), params)
    x = rng.standard_normal((1, 700, features)).astype(np.float32)
    alone = np.asarray(run(x[:, :1]))
    for rows in (2, 3, 8, 16, 64, 256, 700):
        for some in (x[:, :rows], x[:, :rows].swapaxes(0, 1)):
            np.testing.assert_array_equal(run(some)[0, 0], alone[0, 0])
