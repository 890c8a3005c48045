"""SmoothQuant keeps the function, moves outliers, and chooses its strength by the error."""

import dataclasses

import numpy as np

from benchmarks.outliers import with_outliers
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import float_model, quantize_params, untied
from mquant_jax.ptq.smooth import smooth_params
from mquant_jax.recipe import Recipe, Weights
from tests.helpers import golden_qwen2_vl, looked, quantised, relative

PLAIN = dataclasses.replace(PRESETS["w8a8"], rotate=False, sink_class=False, weights=Weights())


def test_smoothing_keeps_the_function_and_lowers_the_error() -> None:
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    real = inputs["attention_mask"] == 1
    config, params = untied(config, get_params(model))
    streams = FAMILY.streams(config)
    hard = with_outliers(params, streams, seed=0)
    look = looked(FAMILY, config, hard, batch)
    smooth, strengths = smooth_params(hard, streams, PLAIN, look)
    got = np.asarray(float_model(FAMILY, config, Recipe(), smooth)(batch))[real]
    assert relative(got, outputs["logits"][real]) < 1e-4
    assert max(strengths.values()) > 0
    errors = []
    for recipe in (PLAIN, dataclasses.replace(PLAIN, smooth=True)):
        quantised_params, report = quantize_params(FAMILY, config, recipe, hard, batch)
        logits = quantised(FAMILY, config, recipe, quantised_params, batch)[real]
        errors.append(relative(logits, outputs["logits"][real]))
    assert errors[1] < 0.5 * errors[0]
    assert report["smoothing"] == strengths
