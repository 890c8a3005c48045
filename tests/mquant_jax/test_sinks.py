"""Sink tokens: detection by magnitude, and their token class."""

import dataclasses

import numpy as np

from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.decoder import SinkRule
from mquant_jax.nn.params import get_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import quantize_params, sink_rule
from mquant_jax.ptq.sinks import find_sinks
from tests.helpers import golden_qwen2_vl


def sequences(rows: int = 12, length: int = 40):
    """Magnitudes of left-padded sequences without sinks, with ids, order and classes."""
    rng = np.random.default_rng(0)
    order = np.maximum(np.arange(length)[None] - np.arange(rows)[:, None], -1)
    classes = np.where(order >= 0, 0, -1)
    classes[:, -8:-4] = 1
    ids = rng.integers(10, 500, order.shape)
    return rng.uniform(1, 3, order.shape), ids, order, classes


def test_the_first_token_always_and_nothing_else_in_calm_data() -> None:
    magnitudes, *rest = sequences()
    assert find_sinks({"a": magnitudes}, *rest, 4, 8) == ([0], [])


def test_loud_positions_and_ids_are_found() -> None:
    magnitudes, ids, order, classes = sequences()
    loud = magnitudes.copy()
    loud[order == 3] = 200.0
    ids[:, 20:22] = 7
    loud[(ids == 7) & (order >= 0)] = 50.0
    loud[classes == 1] *= 1.5  # ids never make visual tokens sinks
    quiet = {"calm": magnitudes, "loud": loud}
    assert find_sinks(quiet, ids, order, classes, 4, 8) == ([0, 3], [7])
    assert find_sinks(quiet, ids, order, classes, 1, 8)[0] == [0]


def test_the_rule_marks_real_tokens_only() -> None:
    rule = SinkRule()
    for name, value in sink_rule([0, 2], [9]).items():
        getattr(rule, name.split("/")[-1]).set_value(value)
    ids = np.array([[9, 5, 6, 9, 9]], np.int32)
    order = np.array([[-1, 0, 1, 2, 3]], np.int32)
    classes = np.array([[-1, 0, 1, 1, 0]], np.int32)
    assert np.asarray(rule(ids, order, classes)).tolist() == [[-1, 2, 1, 2, 2]]


def test_a_sink_of_its_own_lowers_the_scale_of_the_others() -> None:
    model, config, inputs, _ = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    params = get_params(model)
    first = np.asarray(batch.input_ids)[np.asarray(batch.order) == 0]
    table = np.array(params["language/embedding"])
    table[first] *= 50  # a massive first token; attn_out has no norm before it
    params["language/embedding"] = table
    recipe = dataclasses.replace(PRESETS["w8a8"], rotate=False)
    out, report = quantize_params(FAMILY, config, recipe, params, batch)
    assert report["sinks"]["positions"] == [0]
    assert np.asarray(out["language/sinks/positions"]).tolist() == [0, -1, -1, -1]
    shared = dataclasses.replace(recipe, sink_class=False)
    other, _ = quantize_params(FAMILY, config, shared, params, batch)
    name = "language/layers/0/attn_in/act_scale"
    assert (out[name][:2] <= other[name][:2]).all()
    assert "language/sinks/positions" not in other
