"""Qwen3-VL: rotation keeps the function, deep features included, and W4A8 logits are close."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mquant_jax.models.qwen3_vl import FAMILY
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

CASES = ["qwen3_vl/public", "qwen3_vl/public_video"]


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_rotated_model_equals_the_original(case, orthogonal) -> None:
    _, config = family_of(changed_config(case))
    config, params = untied(config, hardened(golden_params(case)))
    recipe = dataclasses.replace(ROTATED, orthogonal=orthogonal)
    held = get_params(rotated_twin(FAMILY, config, params, case, recipe))
    moved = {n for n, x in params.items() if not np.array_equal(x, held.get(n))}
    for i in range(len(config.vision.taps)):
        merger = f"vision/deepstack_{i}"
        assert {f"{merger}/{n}" for n in ("fc1/kernel", "fc2/kernel", "fc2/bias")} <= moved
        wide = held[f"{merger}/norm/weight"]  # the mean direction of four merged patches
        assert wide.shape == (4 * config.vision.hidden_size,)
        assert abs(np.linalg.norm(wide) - 1) < 1e-5
    assert held["vision/merger/norm/weight"].shape == (config.vision.hidden_size,)
    assert "vision/positions" in moved


@pytest.mark.parametrize(
    "vision", [{"intermediate_size": 86}, {"deepstack_visual_indexes": []}, {"num_heads": 2}]
)  # 4304 = 50 * 86 + 4
def test_other_towers(vision) -> None:
    _, config = family_of(changed_config(CASES[0], vision_config=vision))
    config, params = untied(config, hardened(random_params(FAMILY, config)))
    rotated_twin(FAMILY, config, params, CASES[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_w4a8_is_close(case) -> None:
    """The full pipeline: GPTQ, per-modality scales and sinks, part by part."""
    _, config = family_of(changed_config(case))
    error, report = w4a8_error(FAMILY, *untied(config, golden_params(case)), case)
    parts = ("merger/fc1", "deepstack_0/fc1", "deepstack_1/fc2", "patch_embed/proj", "layers/1/fc2")
    assert {f"vision/{part}/kernel" for part in parts} <= set(report["weights"])
    assert {"vision/deepstack_1/merger_hidden", "vision/layers/0/mlp_hidden"} <= set(
        report["points"]
    )
    assert {"text", "visual"} <= set(report["points"]["language/layers/1/attn_in"])
    assert 0.01 < error < 0.35, error  # random weights of 32 to 80 channels
