"""LLaVA: rotation keeps the function for every tower, and W4A8 logits are close."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.llava import FAMILY
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.pipeline import untied
from mquant_jax.ptq.rotate import rotate_params
from mquant_jax.recipe import Recipe
from tests.family_cases import (
    ROTATED,
    changed_config,
    family_of,
    float_logits,
    golden_params,
    hardened,
    random_params,
    rotated_twin,
)
from tests.family_checks import w4a8_error
from tests.helpers import mostly_slow, relative
from tests.llava_cases import CLIP, DINOV2, GOLDEN_CASES, VARIED


def kinds(twin) -> list[str]:
    """Kinds of the tower's norms other than plain RMSNorm."""
    found = [type(m).__name__ for _, m in nnx.iter_modules(twin.vision)]
    return sorted({n for n in found if n in (LayerNorm.__name__, ProjectedNorm.__name__)})


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_rotated_model_equals_the_original(case) -> None:
    _, config = family_of(changed_config(case))
    config, params = untied(config, hardened(golden_params(case)))
    twin = rotated_twin(FAMILY, config, params, case)
    # CLIP's first norm writes the stream, so it stays a LayerNorm.
    assert kinds(twin) == (["LayerNorm", "ProjectedNorm"] if case == CLIP else ["ProjectedNorm"])
    held = get_params(twin)
    assert not [name for name in held if name.endswith("gain")]
    same = {n for n, x in params.items() if np.array_equal(x, held.get(n))}
    entry = {"vision/class_token", "vision/positions", "vision/patch_embed/proj/kernel"}
    assert same & entry == (entry if case == CLIP else set())
    assert not same & {"vision/merger/fc1/kernel", "vision/merger/fc2/bias"}


@pytest.mark.parametrize("name", VARIED)
def test_other_towers_and_layers(name) -> None:
    case, changes = VARIED[name]
    config = LlavaConfig.from_hf(changed_config(case, **changes))
    config, params = untied(config, hardened(random_params(FAMILY, config)))
    rotated_twin(FAMILY, config, params, case)
    rotated_twin(FAMILY, config, params, case, dataclasses.replace(ROTATED, orthogonal=True))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_projector_needs_the_mean_of_the_stream(case) -> None:
    """Removing the mean from all writers, as is done for a stream with a final norm, changes the
    function."""
    _, config = family_of(changed_config(case))
    config, params = untied(config, hardened(golden_params(case)))
    streams = FAMILY.streams(config)
    centred = dataclasses.replace(streams.streams[0], centred=True)
    wrong = dataclasses.replace(streams, streams=(centred, streams.streams[1]))
    expected, _ = float_logits(FAMILY, config, Recipe(), params, case)
    got, _ = float_logits(FAMILY, config, ROTATED, rotate_params(params, wrong, ROTATED.seed), case)
    assert relative(got, expected) > 1e-2


@pytest.mark.parametrize("case", mostly_slow(GOLDEN_CASES, DINOV2))
def test_w4a8_is_close(case) -> None:
    _, config = family_of(changed_config(case))
    error, report = w4a8_error(FAMILY, *untied(config, golden_params(case)), case)
    parts = ("merger/fc1", "merger/fc2", "patch_embed/proj", "layers/1/fc2")
    assert {f"vision/{part}/kernel" for part in parts} <= set(report["weights"])
    assert {"vision/merger/merger_in", "vision/merger/merger_hidden"} <= set(report["points"])
    assert 0.01 < error < 0.35, error  # random weights of 48 to 96 channels


def test_layer_scale_is_declared_where_there_is_some() -> None:
    gains = {
        case: FAMILY.streams(family_of(changed_config(case))[1]).streams[0].gains
        for case in GOLDEN_CASES
    }
    assert [g.vector.split("/")[-1] for g in gains[DINOV2]] == ["attn_gain", "mlp_gain"]
    assert not gains[CLIP]
