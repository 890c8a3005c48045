"""Qwen-VL: rotation keeps the function, input norm and resampler included; W4A8 is close."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.qwen_vl import FAMILY
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import quantize_params
from tests.family_cases import ROTATED, float_logits, hardened, rotated_twin
from tests.family_checks import RESAMPLER_POINTS, RESAMPLER_WEIGHTS, w4a8_error
from tests.helpers import relative
from tests.qwen_vl_cases import CASES, LONG, ODD, changed_config, golden_case, random_params


@pytest.mark.parametrize("case", CASES)
def test_the_rotated_model_equals_the_original(case) -> None:
    model, config, _, _ = golden_case(case)
    twin = rotated_twin(FAMILY, config, hardened(get_params(model)), case)
    vision = twin.vision
    norms = [m for _, m in nnx.iter_modules(twin) if isinstance(m, LayerNorm)]
    # These are not on a rotated stream.
    assert norms == [vision.input.norm, vision.keys.norm, vision.queries.norm]
    assert isinstance(vision.layers.attn_norm, ProjectedNorm)


def test_odd_widths_a_padded_mlp_and_a_scaled_context() -> None:
    config = QwenVLConfig.from_hf(changed_config(**ODD, **LONG))
    params = hardened(random_params(config))
    twin = rotated_twin(FAMILY, config, params, CASES[0])
    block = jax.tree.map(lambda x: x[0], nnx.state(twin.vision.layers))
    assert block["fc2"]["kernel"].get_value().shape == (40, 88)
    unsigned = dataclasses.replace(ROTATED, online_signs=False)
    rotated_twin(FAMILY, config, params, CASES[0], unsigned)


def test_orthogonal_streams_begin_behind_the_input_norm_too() -> None:
    model, config, _, _ = golden_case(CASES[0])
    recipe = dataclasses.replace(ROTATED, orthogonal=True)
    rotated_twin(FAMILY, config, hardened(get_params(model)), CASES[0], recipe)


def test_the_stream_needs_its_mean() -> None:
    """The resampler reads the mean of the tower's stream, which the tower's norms remove."""
    model, config, _, _ = golden_case(CASES[0])
    params = hardened(get_params(model))
    expected, _ = float_logits(FAMILY, config, ROTATED, _rotated(config, params), CASES[0])
    for name in ("vision/layers/1/fc2/kernel", "vision/layers/1/fc2/bias"):
        params[name] = params[name] - params[name].mean(axis=0)
    got, _ = float_logits(FAMILY, config, ROTATED, _rotated(config, params), CASES[0])
    assert relative(got, expected) > 1e-3


def _rotated(config, params):
    return quantize_params(FAMILY, config, ROTATED, params)[0]


def test_every_part_takes_part() -> None:
    """Rotation changes every tensor except those before a stream's first norm."""
    model, config, _, _ = golden_case(CASES[0])
    params = hardened(get_params(model))
    rotated = _rotated(config, params)
    same = {n for n, x in params.items() if n in rotated and np.array_equal(x, rotated[n])}
    language = {n for n in same if n.startswith("language/") and n.endswith("bias")}
    assert {n.split("/")[-2] for n in language} == {"q_proj", "k_proj"}  # rope prevents it
    kept = {"patch_embed/proj/kernel", "positions", "query", "input/norm/weight",
            "input/norm/bias", "keys/k_proj/bias", "queries/q_proj/bias"}  # fmt: skip
    kept |= {f"{part}/{leaf}" for part in ("keys", "queries")
             for leaf in ("norm/weight", "norm/bias", "positions")}  # fmt: skip
    assert same - language == {f"vision/{n}" for n in kept}
    assert set(rotated) - set(params) == {"vision/merger/proj/bias"}


@pytest.mark.slow
def test_w4a8_is_close() -> None:
    model, config, _, _ = golden_case(CASES[0])
    error, report = w4a8_error(FAMILY, config, get_params(model), CASES[0])
    assert {f"vision/{part}/kernel" for part in RESAMPLER_WEIGHTS} <= set(report["weights"])
    assert {f"vision/{point}" for point in RESAMPLER_POINTS} <= set(report["points"])
    assert 0.01 < error < 0.3, error  # random weights of 48 channels; measured 0.11
