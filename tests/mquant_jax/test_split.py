"""RMS: splitting off the outlier channel that a plain Hadamard transform makes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.hadamard import plan_rotation
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.numerics import QWeight, quantize_weight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.ptq.rotate import times
from mquant_jax.ptq.split import split_weight
from mquant_jax.recipe import Split, Weights
from tests.helpers import golden_qwen2_vl, quantised, relative


def nearest(weight, hessian) -> QWeight:
    return quantize_weight(weight, 4)


def spiked(seed: int | None) -> jnp.ndarray:
    """Weights ``[32, 128]`` with a mean, after a Hadamard transform with or without signs."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (32, 128)) + rng.normal(0.01, 0.01, (32, 1))
    return jnp.asarray(times(weight, plan_rotation(128, seed)), jnp.float32)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("criterion", ["paper", "measured"])
def test_a_plain_hadamard_makes_a_spike_that_is_split_off(criterion, bits) -> None:
    out = split_weight(spiked(None), None, nearest, Split(criterion, bits))
    assert out.report["split"] and out.report["rows_led"] > 0.5
    assert out.report["error_split"] < 0.7 * out.report["error"]
    assert not np.asarray(out.q.unpacked().values)[:, int(out.index)].any()
    assert relative(out.dequantize(), spiked(None)) < 0.25


@pytest.mark.parametrize("criterion", ["paper", "measured"])
def test_signs_leave_nothing_to_split(criterion) -> None:
    weight = spiked(0)
    out = split_weight(weight, None, nearest, Split(criterion))
    assert out.report["rows_led"] < 0.3
    if criterion == "paper":
        assert not out.report["split"] and not np.asarray(out.column.values).any()
        assert np.array_equal(out.q.values, nearest(weight, None).values)
    else:
        assert out.report["split"] == (out.report["error_split"] < out.report["error"])


@pytest.mark.parametrize("activations", ["static", "none"])
def test_the_model_runs_with_split_channels(activations) -> None:
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    real = inputs["attention_mask"] == 1
    section = dataclasses.replace(PRESETS["w4a8"].language, activations=activations)
    recipe = dataclasses.replace(
        PRESETS["w4a8"],
        language=section,
        weights=Weights(),
        online_signs=False,
        split=Split("measured"),
    )
    params, report = quantize_params(FAMILY, config, recipe, get_params(model), batch)
    layers = config.vision.num_layers + config.language.num_layers
    assert len(report["split"]) == layers
    got = quantised(FAMILY, config, recipe, params, batch)[real]
    # Random weights at 4 bits: this tests the mechanism, not the gain.
    assert relative(got, outputs["logits"][real]) < 0.6
    for name, found in report["split"].items():
        column = np.asarray(params[f"{name}/split/column"].values)
        assert column.any() == found["split"]
