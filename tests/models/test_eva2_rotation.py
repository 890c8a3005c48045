"""GLM-4V and CogVLM2: rotation keeps the function, and W4A8 logits are close."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from flax import nnx

from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.recipe import Recipe, Section
from tests.eva2_cases import CASES, ODD_TOWER
from tests.family_cases import (
    ROTATED,
    batch_of,
    changed_config,
    family_of,
    float_logits,
    golden_params,
    hardened,
    random_params,
    rotated_twin,
)
from tests.family_checks import w4a8_error
from tests.helpers import quantised, relative

_TOWER = ("q_proj", "k_proj", "v_proj", "fc1")
check = partial(rotated_twin, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_rotated_model_equals_the_original(case) -> None:
    family, config = family_of(changed_config(case))
    params = hardened(golden_params(case))
    twin = check(family, config, params, case)
    rotated = get_params(twin)
    norms = [m for _, m in nnx.iter_modules(twin) if isinstance(m, LayerNorm)]
    layer = twin.vision.layers
    kept = [twin.vision.merger.norm, layer.attn_norm, layer.mlp_norm]
    assert {id(n) for n in norms} == {id(n) for n in kept}  # these are not on a rotated stream
    same = {n for n, x in params.items() if np.array_equal(x, rotated[n])}
    same = {n for n in same if not n.endswith("frequencies")}
    language = {n for n in same if n.startswith("language/")}
    # Rope prevents rotating q and k; tensors between a stream and its norms are not rotated either.
    assert {n.split("/")[-2] for n in language} <= {"q_proj", "k_proj"}
    writers = {"vision/class_token", "vision/positions", "vision/patch_embed/proj/kernel"}
    assert all("norm/" in n or n.endswith("bias") for n in same - language - writers)
    readers = {f"vision/layers/0/{name}/kernel" for name in _TOWER}
    assert not same & (readers | {"vision/conv/proj/kernel", "vision/ends/boi"})


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_chooses_the_tower_reads(case) -> None:
    family, config = family_of(changed_config(case))
    params = hardened(golden_params(case))
    recipe = dataclasses.replace(ROTATED, online_reads=False)
    twin = check(family, config, params, case, recipe)
    rotated = get_params(twin)
    for name in _TOWER[:2] + _TOWER[3:]:  # values are rotated per head in any case
        kernel = f"vision/layers/0/{name}/kernel"
        np.testing.assert_array_equal(rotated[kernel], params[kernel])
    assert twin.vision.layers.attn_in.rotation is None
    assert twin.vision.layers.mlp_hidden.rotation is not None


@pytest.mark.parametrize("case", CASES)
def test_odd_widths_and_a_padded_mlp(case) -> None:
    family, config = family_of(changed_config(case, vision_config=ODD_TOWER))
    params = hardened(random_params(family, config))
    held = get_params(check(family, config, params, case))
    assert held["vision/layers/0/fc2/kernel"].shape == (40, 88)
    check(family, config, params, case, dataclasses.replace(ROTATED, online_signs=False))


def spiky(params):
    """Scale up one channel of the tower's stream; its readers compensate."""
    out = {name: np.array(value) for name, value in params.items()}
    for name, value in out.items():
        if name.startswith("vision/layers/"):
            if name.endswith("mlp_norm/weight"):
                value[5] *= 30
            if name.split("/")[-2] in _TOWER and name.endswith("kernel"):
                value[:, 5] /= 10
    return out


def test_rotating_what_is_read_pays_where_channels_stand_out() -> None:
    case = CASES[0]
    family, config = family_of(changed_config(case))
    batch, params = batch_of(family, config, case), spiky(golden_params(case))
    expected, _ = float_logits(family, config, Recipe(), params, case)
    error = {}
    for online in (True, False):
        recipe = Recipe("w8", Section(8, None, "static"), rotate=True, online_reads=online)
        made, _ = quantize_params(family, config, recipe, params, batch)
        got = quantised(family, config, recipe, made, batch)[np.asarray(batch.token_class) >= 0]
        error[online] = relative(got, expected)
    assert error[True] < 0.6 * error[False], error


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_w4a8_is_close(case) -> None:
    family, config = family_of(changed_config(case))
    error, report = w4a8_error(family, config, golden_params(case), case)
    parts = ("conv/proj", "merger/linear_proj", "merger/gate_proj", "merger/up_proj",
             "merger/down_proj", "patch_embed/proj", "layers/1/fc2")  # fmt: skip
    assert {f"vision/{part}/kernel" for part in parts} <= set(report["weights"])
    points = ("conv/conv_in", "merger/merger_in", "merger/mlp_in", "merger/merger_hidden")
    assert {f"vision/{point}" for point in points} <= set(report["points"])
    assert 0.01 < error < 0.35, error  # random weights of 64 channels; measured 0.23
