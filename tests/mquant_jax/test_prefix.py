"""Prefix sinks equal sink tokens before every prompt, without prefill cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.lazy import lazy
from mquant_jax.models.base import Batch
from mquant_jax.models.text import collate, text_prompt
from mquant_jax.nn.params import get_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import abstract_float, float_model, quantize_params, untied
from mquant_jax.ptq.prefix import prefix_ids, prefix_params
from mquant_jax.ptq.states import States
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.generate import Generator
from tests.helpers import forward, golden_model, quantised, relative

PREFIX = [5, 9]
RECIPE = Recipe(prefix_sinks=len(PREFIX))
ROWS = ([11, 3, 7, 20, 4], [8, 30, 2])


def texts(rows) -> Batch:
    return jax.tree.map(jnp.asarray, collate([text_prompt(list(r)) for r in rows]))


def keys_of(family, config, params, ids):
    return prefix_params(abstract_float(family, config, Recipe()), lazy(params), ids, States())


@pytest.fixture(scope="module", params=["llama/public", "qwen2_vl/public"])
def models(request):
    """Family, config, and the float model without and with a prefix."""
    family, plain, config, _, _ = golden_model(request.param)
    params = get_params(plain)
    extra = keys_of(family, config, params, PREFIX)
    return family, config, plain, float_model(family, config, RECIPE, params | extra)


def batch_for(family, rows) -> Batch:
    batch = texts(rows)
    streams = 1 if family.name == "llama" else 3
    return dataclasses.replace(batch, positions=jnp.repeat(batch.positions[:1], streams, 0))


def test_a_prefix_is_a_longer_prompt(models) -> None:
    family, _, plain, prefixed = models
    expected = forward(plain, batch_for(family, [[*PREFIX, *r] for r in ROWS]))
    got = forward(prefixed, batch_for(family, ROWS))
    for row, tokens in enumerate(ROWS):  # prompts are padded on the left
        n = len(tokens)
        assert relative(got[row, -n:], expected[row, -n:]) < 1e-5


def test_generation_sees_the_prefix(models) -> None:
    family, _, plain, prefixed = models
    expected = Generator(plain, (-1,)).generate(batch_for(family, [[*PREFIX, *r] for r in ROWS]), 6)
    got = Generator(prefixed, (-1,)).generate(batch_for(family, ROWS), 6)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_a_quantised_model_has_one() -> None:
    family, plain, config, inputs, _ = golden_model("qwen2_vl/public")
    batch = family.reference_batch(config, inputs)
    config, params = untied(config, get_params(plain))
    recipe = dataclasses.replace(PRESETS["w4a8"], prefix_sinks=1)
    out, report = quantize_params(family, config, recipe, params, batch)
    assert len(report["prefix"]) == 1 and report["prefix"][0] in np.asarray(batch.input_ids)
    name = "language/layers/1/prefix_k"
    head_dim = config.language.head_dim
    assert out[name].shape == (config.language.num_kv_heads, 1, head_dim)
    assert np.abs(out[name]).max() > 0
    got = quantised(family, config, recipe, out, batch)
    extra = keys_of(family, config, params, report["prefix"])
    model = float_model(family, config, Recipe(prefix_sinks=1), params | extra)
    real = np.asarray(batch.token_class) >= 0
    expected = np.asarray(forward(model, batch))
    assert relative(got[real], expected[real]) < 0.3


def test_too_few_sinks_are_named() -> None:
    batch = texts(ROWS)
    assert prefix_ids([0], [4, 11], [batch], 2) in ([11, 4], [8, 4])
    with pytest.raises(UserError, match="prefix_sinks is 3, but calibration shows 2"):
        prefix_ids([0], [4], [batch], 3)
