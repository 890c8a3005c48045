"""MiniCPM-V: rotation keeps the function, resampler included, and W4A8 logits are close."""

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.minicpmv import FAMILY
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.recipe import Recipe
from tests.family_cases import ROTATED, hardened, rotated_twin
from tests.family_checks import RESAMPLER_POINTS, RESAMPLER_WEIGHTS, w4a8_error
from tests.minicpmv_cases import CASES, FOLDER, ODD, changed_config, golden_case, random_params


def check(config, params, case, recipe=ROTATED):
    return rotated_twin(FAMILY, config, params, f"{FOLDER}/{case}", recipe)


@pytest.mark.parametrize("case", CASES)
def test_the_rotated_model_equals_the_original(case) -> None:
    model, config, _, _ = golden_case(case)
    twin = check(config, hardened(get_params(model)), case)
    norms = [m for _, m in nnx.iter_modules(twin) if isinstance(m, LayerNorm)]
    assert norms == [twin.vision.keys.norm]  # this one is not on a rotated stream


def test_odd_widths_and_a_padded_mlp() -> None:
    config = MiniCPMVConfig.from_hf(changed_config(**ODD))
    twin = check(config, hardened(random_params(config)), "public")
    block = jax.tree.map(lambda x: x[0], nnx.state(twin.vision.layers))
    assert block["fc2"]["kernel"].get_value().shape == (40, 88)
    unsigned = Recipe("unsigned", rotate=True, seed=3, online_signs=False)
    check(config, hardened(random_params(config)), "public", unsigned)


def test_every_part_takes_part() -> None:
    """Rotation changes every tensor that it should."""
    model, config, _, _ = golden_case("public")
    params = hardened(get_params(model))
    rotated, _ = quantize_params(FAMILY, config, ROTATED, params)
    same = [n for n, x in params.items() if n in rotated and np.array_equal(x, rotated[n])]
    keys = {"vision/keys/norm/weight", "vision/keys/norm/bias", "vision/keys/k_proj/bias"}
    language = {n for n in same if n.startswith("language/") and n.endswith("bias")}
    assert set(same) == keys | language  # rope prevents rotating q and k
    assert {n.split("/")[-2] for n in language} == {"q_proj", "k_proj"}
    assert {"vision/merger/proj/bias", "vision/keys/kv_proj/bias"} <= set(rotated) - set(params)


def test_w4a8_is_close() -> None:
    model, config, _, _ = golden_case("public")
    error, report = w4a8_error(FAMILY, config, get_params(model), f"{FOLDER}/public")
    assert {f"vision/{part}/kernel" for part in RESAMPLER_WEIGHTS} <= set(report["weights"])
    assert {f"vision/{point}" for point in RESAMPLER_POINTS} <= set(report["points"])
    assert 0.01 < error < 0.3, error  # random weights of 48 channels; measured 0.19
