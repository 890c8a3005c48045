"""Qwen2.5-VL: rotation keeps the function, and W4A8 logits are close."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import families
from benchmarks.families import WIDE, merged
from benchmarks.outliers import with_outliers
from mquant_jax.hadamard import plan_rotation
from mquant_jax.models.qwen2_5_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.presets import METHODS
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Recipe, Tuning
from tests.family_cases import (
    ROTATED,
    batch_of,
    changed_config,
    family_of,
    golden_params,
    hardened,
    random_params,
    rotated_twin,
)
from tests.family_checks import w4a8_error
from tests.helpers import golden, relative

CASE = "qwen2_5_vl/public"


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_rotated_model_equals_the_original(orthogonal) -> None:
    _, config = family_of(changed_config(CASE))
    config, params = untied(config, hardened(golden_params(CASE)))
    recipe = dataclasses.replace(ROTATED, orthogonal=orthogonal)
    twin = rotated_twin(FAMILY, config, params, CASE, recipe)
    held = get_params(twin)
    norms = [name for name in held if name.startswith("vision") and name.endswith("norm/weight")]
    assert len(norms) == 2 * 3 + 1 and all((held[name] == 1).all() for name in norms)
    moved = {n for n, x in params.items() if not np.array_equal(x, held.get(n))}
    layers = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    assert {f"vision/layers/0/{layer}/kernel" for layer in layers} <= moved


@pytest.mark.parametrize("width", [76, 108, 342])  # 3420 = 10 * 342
def test_widths_of_the_gated_mlp(width) -> None:
    _, config = family_of(changed_config(CASE, vision_config={"intermediate_size": width}))
    config, params = untied(config, hardened(random_params(FAMILY, config)))
    rotated_twin(FAMILY, config, params, CASE)


def test_the_published_width_has_a_rotation() -> None:
    for width in (3420, 3456):
        rotation = plan_rotation(width, 0, may_pad=True)
        assert rotation.inputs == width and width <= rotation.n < 1.1 * width


@pytest.mark.slow
def test_w4a8_is_close() -> None:
    _, config = family_of(changed_config(CASE))
    error, report = w4a8_error(FAMILY, *untied(config, golden_params(CASE)), CASE)
    parts = ("merger/fc1", "merger/fc2", "patch_embed/proj", "layers/1/down_proj",
             "layers/2/gate_proj", "layers/0/up_proj")  # fmt: skip
    assert {f"vision/{part}/kernel" for part in parts} <= set(report["weights"])
    assert {"vision/layers/0/mlp_hidden", "vision/merger/merger_in"} <= set(report["points"])
    assert 0.01 < error < 0.35, error  # random weights of 64 and 96 channels


@pytest.mark.slow
def test_outliers_of_the_widened_model() -> None:
    """Rotation and smoothing recover most of the loss, both with round-to-nearest weights."""
    hf = merged(golden(*CASE.split("/"))[0], WIDE[CASE])
    _, config = family_of(hf)
    batch = families.other_content(batch_of(FAMILY, config, CASE), config.language.vocab_size, 2)
    config, params = untied(config, families.random_params(FAMILY, config, 0))
    plain = families.logits(FAMILY, config, Recipe(), params, batch)
    params = with_outliers(params, FAMILY.streams(config), 0)
    prompts = [FAMILY.example_prompt(config, 40, 56)] * 4
    calibration = families.other_content(
        FAMILY.collate(config, prompts), config.language.vocab_size, 1
    )
    errors = {}
    for name in ("rtn", "mquant"):
        recipe = METHODS[name]
        weights = dataclasses.replace(recipe.weights, method="rtn")
        recipe = dataclasses.replace(recipe, tune=Tuning(), weights=weights)
        made = quantize_params(FAMILY, config, recipe, params, calibration)[0]
        errors[name] = relative(families.logits(FAMILY, config, recipe, made, batch), plain)
    assert errors["mquant"] < 0.5 * errors["rtn"] and errors["mquant"] < 0.3, errors
