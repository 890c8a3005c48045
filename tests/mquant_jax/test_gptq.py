"""GPTQ on single layers: error, and robustness to degenerate inputs."""

import tracemalloc

import jax
import numpy as np
import pytest

from mquant_jax.numerics import QWeight, quantize_weight
from mquant_jax.ptq.gptq import (
    accumulate,
    complete,
    empty_gram,
    fitted,
    gptq,
    output_error,
    prepare,
)
from mquant_jax.ptq.scales import clip_search
from tests.helpers import relative


def gram(x, weight=None, y=None):
    return accumulate(empty_gram(x.shape[1]), x, np.ones(len(x)) if weight is None else weight, y)


def layer(out: int, k: int, seed: int = 0):
    """A random weight and correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = np.diag(rng.uniform(0.2, 3, k)) + 0.1 * rng.standard_normal((k, k))
    x = (rng.standard_normal((4 * k, k)) @ mix).astype(np.float32)
    weight = jax.numpy.asarray(rng.standard_normal((out, k)), jax.numpy.float32)
    return weight, x, gram(x)


def error_on(weight, q: QWeight, x) -> float:
    return relative(x @ np.asarray(q.dequantize()).T, x @ np.asarray(weight).T)


@pytest.mark.parametrize(("k", "group"), [(64, None), (200, 40), (300, None)])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_lowers_the_output_error(k, group, act_order) -> None:
    weight, x, hessian = layer(48, k)
    scale = clip_search(weight, 4, group)
    nearest = error_on(weight, quantize_weight(weight, 4, group, scale), x)
    inputs = prepare(hessian, None, act_order)
    q = gptq(weight, inputs, scale, 4)
    assert error_on(weight, q, x) < 0.8 * nearest
    assert float(inputs.damping) == pytest.approx(0.01)
    assert q.values.dtype == np.int8 and abs(np.asarray(q.values)).max() <= 8


def test_gptq_with_white_inputs_is_rounding_to_nearest() -> None:
    weight, _, _ = layer(16, 96)
    scale = clip_search(weight, 4)
    q = gptq(weight, prepare(5.0 * jax.numpy.eye(96)), scale, 4)
    assert np.array_equal(q.values, quantize_weight(weight, 4, None, scale).values)


def test_gptq_survives_singular_and_dead_inputs() -> None:
    weight, x, _ = layer(16, 96)
    x[:, 7] = 0
    x[:, 50:] = x[:, :1]
    hessian = gram(x[:20])
    inputs, scale = prepare(hessian), clip_search(weight, 4)
    q = gptq(weight, inputs, scale, 4)
    assert np.isfinite(np.asarray(q.dequantize())).all() and np.isfinite(float(inputs.damping))
    # A column unused in calibration is rounded to nearest, because it may be used later.
    nearest = quantize_weight(weight, 4, None, scale).values
    assert np.array_equal(q.values[:, 7], nearest[:, 7])


def test_padding_has_no_weight_in_the_hessian() -> None:
    _, x, _ = layer(4, 8)
    mask = np.arange(len(x)) < 10
    weight = mask.astype(np.float32)
    full = gram(x, weight)
    complete(full)
    assert relative(full, x[:10].T @ x[:10]) < 1e-6
    on_device = accumulate(jax.numpy.zeros((8, 8)), x, jax.numpy.asarray(weight))
    assert relative(on_device, full) < 1e-6


@pytest.mark.parametrize("group", [None, 20])
def test_refitted_scales_lower_the_error_of_every_channel(group) -> None:
    weight, x, hessian = layer(24, 100)
    inputs, scale = prepare(hessian), clip_search(weight, 4, group)
    hessian = inputs.hessian
    errors = [
        np.asarray(output_error(weight, fitted(weight, inputs, scale, 4, rounds), hessian))
        for rounds in (0, 2)
    ]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.97 * errors[0].sum()
    q = fitted(weight, inputs, scale, 4, 2)
    assert np.abs(np.asarray(q.values)).max() <= 8 and (np.asarray(q.scale) > 0).all()


def test_the_shift_makes_up_for_inputs_that_differ() -> None:
    weight, x, _ = layer(24, 64)
    rng = np.random.default_rng(5)
    seen = (x + 0.3 * rng.standard_normal(x.shape) + 0.2 * x[:, ::-1]).astype(np.float32)
    hessian, cross = gram(seen), gram(seen, None, x - seen)
    wanted = x @ np.asarray(weight).T
    moved = prepare(hessian, cross).target(weight)
    best = np.linalg.lstsq(seen, wanted, rcond=None)[0].T
    errors = [relative(seen @ w.T, wanted) for w in (np.asarray(weight), moved, best)]
    assert errors[1] < 0.6 * errors[0] and errors[1] < 1.05 * errors[2]


def test_no_more_than_three_square_arrays_are_alive() -> None:
    """The Hessian, the correction for the float model, and a copy that is factorised in place."""
    k = 1536
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((300, k), np.float32), rng.standard_normal((32, k), np.float32)
    scale = np.asarray(clip_search(weight, 4))
    tracemalloc.start()
    inputs = prepare(gram(x), gram(x, None, 0.1 * x))
    gptq(inputs.target(weight), inputs, scale, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / (4 * k * k) < 3.6  # the rest: row blocks and the inputs
