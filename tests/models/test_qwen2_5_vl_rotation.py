"""Qwen2.5-VL rotated: the function stays; W4A8 comes out close."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mquant_jax.hadamard import plan_rotation
from mquant_jax.models.qwen2_5_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import untied
from tests.family_cases import (
    ROTATED,
    changed_config,
    family_of,
    golden_params,
    hardened,
    random_params,
    rotated_twin,
)
from tests.family_checks import w4a8_error

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


def test_w4a8_is_close() -> None:
    _, config = family_of(changed_config(CASE))
    error, report = w4a8_error(FAMILY, *untied(config, golden_params(CASE)), CASE)
    parts = ("merger/fc1", "merger/fc2", "patch_embed/proj", "layers/1/down_proj",
             "layers/2/gate_proj", "layers/0/up_proj")  # fmt: skip
    assert {f"vision/{part}/kernel" for part in parts} <= set(report["weights"])
    assert {"vision/layers/0/mlp_hidden", "vision/merger/merger_in"} <= set(report["points"])
    assert 0.01 < error < 0.35, error  # random weights of 64 and 96 channels
