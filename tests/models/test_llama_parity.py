"""The text-only families against outputs of transformers, before and after rotation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mquant_jax.models.llama import FAMILY
from mquant_jax.models.llama.processing import collate, reference_batch, reference_prompts
from mquant_jax.nn.params import get_params
from mquant_jax.nn.rope import Llama3Scaling, frequencies
from mquant_jax.ptq.pipeline import float_model, quantize_params, untied
from mquant_jax.recipe import Recipe
from tests.family_checks import RTOL, greedy_with_the_cache, rows_stand_alone
from tests.helpers import forward, golden_llama, relative

# Features that the goldens lack: all biases and a scaled context.
RICH = {
    "attention_bias": True,
    "mlp_bias": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def case(request):
    return golden_llama(request.param)


def test_every_position_of_the_forward_pass(case) -> None:
    model, config, inputs, outputs = case
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    assert batch.vision is None and model.vision is None
    np.testing.assert_array_equal(batch.positions[0][real], outputs["position_ids"][real])
    assert relative(forward(model, batch)[real], outputs["logits"][real]) < RTOL


def test_greedy_with_the_cache(case) -> None:
    model, config, inputs, outputs = case
    greedy_with_the_cache(model, reference_batch(config, inputs), outputs)


def test_a_row_alone_equals_the_row_in_the_batch(case) -> None:
    model, _, inputs, _ = case
    rows_stand_alone(model, collate, reference_prompts(inputs), inputs["input_ids"].shape[1] + 5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("llama", RICH)],
)
def test_the_rotated_model_equals_the_original(family, changes) -> None:
    model, config, inputs, _ = golden_llama(family, **changes)
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    recipe = Recipe("rotated", rotate=True, seed=3)
    own, params = untied(config, get_params(model))
    rotated, _ = quantize_params(FAMILY, own, recipe, params)
    twin = float_model(FAMILY, own, recipe, rotated)
    assert relative(forward(twin, batch)[real], forward(model, batch)[real]) < 1e-4


def test_llama3_frequencies_by_hand() -> None:
    dim, theta = 16, 1000.0
    scaling = Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=64)
    expected = []
    for j in range(dim // 2):
        f = theta ** (-2 * j / dim)
        wavelength = 2 * np.pi / f
        if wavelength > 64 / 1.0:
            f /= 8.0
        elif wavelength >= 64 / 4.0:
            s = (64 / wavelength - 1.0) / (4.0 - 1.0)
            f = (1 - s) * f / 8.0 + s * f
        expected.append(f)
    np.testing.assert_allclose(frequencies(dim, theta, scaling), expected, rtol=1e-6)
    changed = expected / frequencies(dim, theta)
    assert changed[0] == pytest.approx(1) and changed[-1] == pytest.approx(1 / 8)
    assert any((changed > 0.13) & (changed < 0.99))  # the blend is exercised


def test_scaled_positions_change_the_output() -> None:
    model, config, inputs, _ = golden_llama("llama", **RICH)
    plain = golden_llama("llama", **{**RICH, "rope_scaling": None})[0]
    batch = reference_batch(config, inputs)
    assert relative(forward(model, batch), forward(plain, batch)) > 1e-3
    assert jax.numpy.isfinite(forward(model, batch)).all()
