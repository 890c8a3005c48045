"""Learned scales: what moves, what stays, and that the divergence falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.base import abstract_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.numerics import QWeight, quantize_static, simulate_static
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Tuning
from tests.helpers import forward, golden_qwen2_vl, relative

PLAIN = PRESETS["w4a8"]
TUNED = dataclasses.replace(PLAIN, tune=Tuning(epochs=6, rate=3e-3))


@pytest.fixture(scope="module")
def made():
    """The batch, and for both recipes tensors, report and model."""
    model, config, inputs, _ = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    config, params = untied(config, get_params(model))
    out = [batch]
    for recipe in (PLAIN, TUNED):
        tensors, report = quantize_params(FAMILY, config, recipe, params, batch)
        built = abstract_model(FAMILY, config, recipe)
        set_params(built, dict(tensors))
        out.append((tensors, report, built))
    return out


def test_divergence_falls_and_only_scales_and_gains_move(made) -> None:
    _, (before, _, _), (after, report, _) = made
    assert report["tuning"]["last"] < 0.8 * report["tuning"]["first"]
    moved = set()
    for name, old in before.items():
        new = after[name]
        if isinstance(old, QWeight):
            np.testing.assert_array_equal(new.values, old.values)
            old, new = old.scale, new.scale
        if not np.array_equal(old, new):
            assert (np.asarray(new) * np.asarray(old) > 0).all()
            moved.add(name)
    assert moved and all(name.startswith("language/") for name in moved)
    kinds = {name.rsplit("/", 1)[-1] for name in moved}
    assert kinds == {"kernel", "act_scale", "weight"}


def test_simulation_is_what_the_integers_compute(made) -> None:
    batch, _, (_, _, model) = made
    expected = forward(model, batch)
    for _, node in nnx.iter_graph(model.language):
        if isinstance(node, ActQuant):
            node.simulated = True
    real = batch.order >= 0
    assert relative(forward(model, batch)[real], expected[real]) < 1e-4


def test_gradients_pass_the_rounding_and_stop_at_the_clip() -> None:
    x, scale = jnp.asarray([0.26, -3.4, 900.0]), jnp.float32(0.5)
    got = simulate_static(x, scale).dequantize()
    np.testing.assert_allclose(got, quantize_static(x, scale).dequantize())
    slope = jax.grad(lambda a: simulate_static(a, scale).dequantize().sum())(x)
    np.testing.assert_allclose(slope, [1, 1, 0])
    by_scale = jax.jacobian(lambda x, s: simulate_static(x, s).dequantize(), argnums=1)(x, scale)
    np.testing.assert_allclose(by_scale, [1 - 0.52, -7 + 6.8, 127], atol=1e-5)
