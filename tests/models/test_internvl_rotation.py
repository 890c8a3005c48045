"""InternVL: rotation keeps the function for both kinds of norms, and W4A8 logits are close."""

from functools import partial

import pytest
from flax import nnx

from mquant_jax.models.internvl import FAMILY
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.ptq.rotate import rotate_params
from mquant_jax.recipe import Recipe
from tests.family_cases import ROTATED, float_logits, hardened, rotated_twin
from tests.family_checks import w4a8_error
from tests.helpers import relative
from tests.internvl_cases import BIG_TOWER, CASES, changed_config, golden_case, random_params

logits = partial(float_logits, FAMILY)


@pytest.mark.parametrize("case", CASES)
def test_the_rotated_model_equals_the_original(case) -> None:
    model, config, _, _ = golden_case(case)
    config, params = untied(config, hardened(get_params(model)))
    twin = rotated_twin(FAMILY, config, params, case)
    assert not [m for _, m in nnx.iter_modules(twin) if isinstance(m, LayerNorm)]
    assert not [name for name in get_params(twin) if name.endswith("gain")]


@pytest.mark.parametrize("case", BIG_TOWER)
def test_a_tower_of_rms_norms_keeps_its_mean(case) -> None:
    config = InternVLConfig.from_hf(changed_config(case, vision_config=BIG_TOWER[case]))
    params = hardened(random_params(config))
    expected, _ = logits(config, Recipe(), params, case)
    rotated, _ = quantize_params(FAMILY, config, ROTATED, params)
    got, twin = logits(config, ROTATED, rotated, case)
    assert relative(got, expected) < 1e-4
    assert len([m for _, m in nnx.iter_modules(twin) if isinstance(m, ProjectedNorm)]) == 1
    # The projection matters here: without it the result differs.
    rotated["vision/merger/norm/weight"] = 0 * rotated["vision/merger/norm/weight"]
    assert relative(logits(config, ROTATED, rotated, case)[0], expected) > 1e-3


def test_readers_without_biases_get_them() -> None:
    case = CASES[0]
    config = InternVLConfig.from_hf(changed_config(case, vision_config={"qkv_bias": False}))
    params = hardened(random_params(config))
    assert "vision/layers/0/q_proj/bias" not in params
    rotated = rotate_params(params, FAMILY.streams(config), ROTATED.seed)
    expected, _ = logits(config, Recipe(), params, case)
    assert relative(logits(config, ROTATED, rotated, case)[0], expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_w4a8_is_close(case) -> None:
    model, config, _, _ = golden_case(case)
    error, report = w4a8_error(FAMILY, *untied(config, get_params(model)), case)
    assert {"vision/merger/fc1/kernel", "vision/patch_embed/proj/kernel"} <= set(report["weights"])
    assert 0.01 < error < 0.3, error  # random weights of 96 channels; measured 0.19 and 0.16
