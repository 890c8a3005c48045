"""The outlier benchmark adds outliers to activations without changing the function."""

import jax
import numpy as np

from benchmarks.demo_bed import interval
from benchmarks.outliers import HIGH, LOW, with_outliers
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import float_model
from mquant_jax.recipe import Recipe
from tests.helpers import forward, golden_qwen2_vl, relative


def test_outliers_keep_the_function() -> None:
    model, config, inputs, outputs = golden_qwen2_vl("public")
    real = inputs["attention_mask"] == 1
    plain = get_params(model)
    params = with_outliers(plain, FAMILY.streams(config), seed=1)
    batch = jax.tree.map(jax.numpy.asarray, FAMILY.reference_batch(config, inputs))
    got = forward(float_model(FAMILY, config, Recipe(), params), batch)
    assert relative(np.asarray(got)[real], outputs["logits"][real]) < 1e-4
    for name in ("language/layers/0/attn_norm/weight", "vision/merger/norm/weight"):
        gain = params[name] / np.asarray(plain[name])
        moved = gain[gain > 1.5]
        assert 1 <= moved.size <= 3 and moved.min() > 0.9 * LOW and moved.max() < 1.1 * HIGH
    # The tower's norms have biases, which are shifted and compensated; the decoder's have none.
    moved = np.abs(
        params["vision/layers/0/attn_norm/bias"] - plain["vision/layers/0/attn_norm/bias"]
    )
    assert 1 <= (moved > 1).sum() <= 3
    for name, changes in (
        ("vision/layers/0/o_proj/bias", True),
        ("language/layers/0/q_proj/bias", False),
    ):
        assert np.array_equal(params[name], plain[name]) != changes


def test_the_interval_holds_the_mean() -> None:
    low, high = interval([True] * 80 + [False] * 20)
    assert 0.70 < low < 0.8 < high < 0.90
