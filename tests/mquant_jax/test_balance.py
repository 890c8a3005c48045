"""Channel balancing keeps the function and removes the imbalance."""

import dataclasses

import numpy as np
import pytest

from benchmarks.outliers import with_outliers
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.presets import METHODS
from mquant_jax.ptq.balance import balance_params
from mquant_jax.ptq.pipeline import float_model, quantize_params, untied
from mquant_jax.ptq.statistics import Statistics
from mquant_jax.recipe import Recipe, Tuning
from tests.helpers import golden_qwen2_vl, looked, quantised, relative

RECIPE = dataclasses.replace(METHODS["mquant"], tune=Tuning())


@pytest.fixture(scope="module")
def hard():
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    config, params = untied(config, get_params(model))
    params = with_outliers(params, FAMILY.streams(config), seed=0)
    real = inputs["attention_mask"] == 1
    return config, params, batch, real, outputs["logits"][real]


def seen(config, params, batch) -> Statistics:
    return looked(FAMILY, config, params, batch)


def test_the_function_stays_and_a_second_time_changes_nothing(hard) -> None:
    config, params, batch, real, expected = hard
    streams = FAMILY.streams(config)
    even, left = balance_params(params, streams, seen(config, params, batch))
    got = np.asarray(float_model(FAMILY, config, Recipe(), even)(batch))[real]
    assert relative(got, expected) < 1e-4
    # One channel in fifty was scaled 10 to 100 times, which is most of the imbalance.
    assert max(left.values()) < 0.15
    assert {name.split("/")[-1] for name in left} == {"o_proj", "down_proj"}
    assert not balance_params(even, streams, seen(config, even, batch))[1]


def test_values_lose_their_mean_where_biases_let_them(hard) -> None:
    config, params, batch, _, _ = hard
    even, _ = balance_params(params, FAMILY.streams(config), seen(config, params, batch))
    for of, largest in ((params, 1.0), (even, 0.1)):
        look = seen(config, of, batch)
        rows = look.samples["vision/layers/0/attn_out"].rows
        mean = np.abs(rows.mean(0)) / rows.std(0)
        assert (mean.max() > largest) == (of is params)


def test_w4a8_loses_less(hard) -> None:
    config, params, batch, real, expected = hard
    errors = []
    for balance in (False, True):
        recipe = dataclasses.replace(RECIPE, balance=balance)
        out, report = quantize_params(FAMILY, config, recipe, params, batch)
        logits = quantised(FAMILY, config, recipe, out, batch)[real]
        errors.append(relative(logits, expected))
        assert ("balance" in report) == balance
    assert errors[1] < 0.8 * errors[0]
