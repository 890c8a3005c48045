"""Rotation keeps the function: float models before and after agree."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.hadamard import plan_rotation, stream_rotation
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.flow import run
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.params import get_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import float_model, quantize_params, untied
from mquant_jax.ptq.rotate import times
from mquant_jax.recipe import Recipe
from tests.family_cases import ROTATED, hardened
from tests.helpers import forward, golden_qwen2_vl, quantised, relative


@pytest.fixture(scope="module")
def case():
    model, config, inputs, _ = golden_qwen2_vl("public")
    params = hardened(get_params(model))
    batch = jax.tree.map(jax.numpy.asarray, FAMILY.reference_batch(config, inputs))
    return config, params, batch, inputs["attention_mask"] == 1


def logits(config, recipe, params, case):
    model = float_model(FAMILY, config, recipe, params)
    return np.asarray(forward(model, case[2]))[case[3]]


def test_the_rotated_model_equals_the_original(case) -> None:
    config, params, batch, _ = case
    expected = logits(config, Recipe(), params, case)
    for seed, orthogonal in ((0, False), (7, False), (0, True)):
        recipe = dataclasses.replace(ROTATED, seed=seed, orthogonal=orthogonal)
        rotated, _ = quantize_params(FAMILY, config, recipe, params)
        assert relative(logits(config, recipe, rotated, case), expected) < 1e-4


def test_a_tied_model_gets_a_head_of_its_own(case) -> None:
    config, params, batch, _ = case
    language = dataclasses.replace(config.language, tied_head=True)
    tied = dataclasses.replace(config, language=language)
    params = {k: v for k, v in params.items() if k != "language/head/kernel"}
    before = logits(tied, Recipe(), params, case)
    config, own = untied(tied, params)
    rotated, _ = quantize_params(FAMILY, config, ROTATED, own)
    assert relative(logits(config, ROTATED, rotated, case), before) < 1e-4


def test_no_layer_norm_is_left_and_the_stream_has_no_mean(case) -> None:
    config, params, batch, _ = case
    rotated, _ = quantize_params(FAMILY, config, ROTATED, params)
    model = float_model(FAMILY, config, ROTATED, rotated)
    assert not [m for _, m in nnx.iter_modules(model) if isinstance(m, LayerNorm)]
    assert all(np.all(v == 1) for k, v in rotated.items() if k.endswith("norm/weight"))
    x = run(model.vision.features(batch.vision))
    assert abs(np.asarray(rotated["vision/patch_embed/proj/kernel"])).max() > 0
    width = config.vision.hidden_size
    matrix = times(np.eye(width), stream_rotation(width, 3, "vision"))
    natural = np.asarray(x, np.float64) @ matrix.T
    assert abs(natural.mean(-1)).max() < 1e-4 * abs(natural).max()


@pytest.mark.parametrize("n", [96, 36, 60, 44, 538, 45])
def test_weights_and_activations_get_the_same_matrix(n) -> None:
    rotation = plan_rotation(n, 5, may_pad=True)
    assert rotation.inputs == n and (rotation.padding > 0) == (n in (538, 45))
    matrix = times(np.eye(n), rotation)
    assert relative(matrix @ matrix.T, np.eye(n)) < 1e-12
    x = np.random.default_rng(0).standard_normal((4, n)).astype(np.float32)
    assert relative(rotation(x), x @ matrix) < 1e-6
    twice = np.concatenate([x, x], axis=1).astype(np.float64)
    assert relative(times(twice, rotation), np.tile(x @ matrix, 2)) < 1e-6


def test_rotation_helps_static_quantisation_of_a_hardened_model(case) -> None:
    config, params, batch, real = case
    # Channel outliers too large for static per-tensor scales, without changing the function.
    rng = np.random.default_rng(1)
    hard = dict(params)
    for i in range(config.language.num_layers):
        layer = f"language/layers/{i}"
        scale = np.ones(config.language.hidden_size, np.float32)
        scale[rng.choice(scale.size, 3, replace=False)] = 50
        hard[f"{layer}/attn_norm/weight"] = hard[f"{layer}/attn_norm/weight"] * scale
        for name in ("q_proj", "k_proj", "v_proj"):
            hard[f"{layer}/{name}/kernel"] = hard[f"{layer}/{name}/kernel"] / scale
    expected = logits(config, Recipe(), hard, case)
    error = {}
    for rotate in (False, True):
        recipe = dataclasses.replace(PRESETS["w8a8"], rotate=rotate)
        made, _ = quantize_params(FAMILY, config, recipe, hard, batch)
        got = quantised(FAMILY, config, recipe, made, batch)[real]
        error[rotate] = relative(got, expected)
    assert error[True] < 0.5 * error[False]
