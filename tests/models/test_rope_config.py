"""YaRN and linear scaling: frequencies, context lengths, and the families that support them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.registry import family_for
from mquant_jax.nn.rope import LinearScaling, YarnScaling, frequencies
from tests.family_cases import batch_of, changed_config, model_of, random_params
from tests.helpers import forward, relative

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# Golden -> key of its text config ("" at the top level).
TEXTS = {
    "qwen2_vl/public": None, "llama/public": None, "qwen2/public": None,
    "minicpmv2_6/public": None, "internvl2/public": "llm_config", "internvl/public": "text_config",
    "llava/public": "text_config", "llava/public_dinov2": "text_config",
    "qwen3_vl/public": "text_config",
}  # fmt: skip
SECTIONS = {"qwen2_vl/public": [2, 5, 5], "qwen3_vl/public": [6, 5, 5]}


def language(case: str = "llama/public", **keys):
    """Decoder config of a golden with these text-model keys."""
    hf = with_keys(case, keys)
    return family_for(hf).config_from_hf(hf).language


def with_keys(case: str, keys: dict) -> dict:
    if case in SECTIONS and isinstance(keys.get("rope_scaling"), dict):
        keys = keys | {"rope_scaling": {"mrope_section": SECTIONS[case]} | keys["rope_scaling"]}
    hf = changed_config(case)
    text = hf[TEXTS[case]] if TEXTS[case] else hf
    text.update(keys)
    return hf


def yarn_by_the_letter(dim, theta, factor, original, fast=32.0, slow=1.0, truncate=True):
    """Inverse frequencies slot by slot in float64, from the paper's appendix."""
    bounds = []
    for turns in (fast, slow):
        wavelength = original / turns  # of the slot with so many turns
        bounds.append(dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta))
    low, high = bounds
    if truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, dim - 1.0)
    if low == high:
        high += 0.001
    out = []
    for slot in range(dim // 2):
        f = theta ** (-2.0 * slot / dim)
        share = min(max((slot - low) / (high - low), 0.0), 1.0)
        out.append((1 - share) * f + share * f / factor)
    return np.array(out)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "original", "more"),
    [
        (128, 1e6, 4.0, 32768, {}),
        (128, 1e4, 8.0, 4096, {"fast": 16.0, "slow": 2.0}),
        (64, 1e6, 2.5, 32768, {"truncate": False}),
        (24, 300.0, 4.0, 64, {}),
        (16, 1e4, 4.0, 4, {}),
    ],
)
def test_yarn_frequencies_by_hand(dim, theta, factor, original, more) -> None:
    got = frequencies(dim, theta, YarnScaling(factor, original, **more))
    expected = yarn_by_the_letter(dim, theta, factor, original, **more)
    np.testing.assert_allclose(got, expected, rtol=2e-7)


def test_published_yarn_of_qwen() -> None:
    """Slots with 32 turns or more are unchanged; those with one turn or less are 4 times slower."""
    plain, scaled = frequencies(128, 1e6), frequencies(128, 1e6, YarnScaling(4.0, 32768))
    ratio, turns = scaled / plain, 32768 * plain / (2 * np.pi)
    assert (ratio[turns > 40] == 1).all() and np.allclose(ratio[turns < 0.8], 0.25)
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.3) & (ratio < 0.9)).any()


def test_linear_frequencies() -> None:
    np.testing.assert_allclose(
        frequencies(16, 1e4, LinearScaling(2.5)), 1e4 ** (-np.arange(8) / 8) / 2.5, rtol=1e-7
    )


@pytest.mark.parametrize(
    ("keys", "attention"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
    ],
)
def test_yarn_scales_attention(keys, attention) -> None:
    got = language(rope_scaling=YARN | keys)
    assert got.rope_scaling.attention == pytest.approx(attention, rel=1e-15)
    assert got.score_gain == pytest.approx(attention**2, rel=1e-15)


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_every_family_reads_yarn_and_linear(case, name) -> None:
    base = {"rope_scaling": None, "max_position_embeddings": 32768}
    sections = {"mrope_section": SECTIONS[case]} if case in SECTIONS else {}
    got = language(case, **(base | {name: YARN | sections}))
    assert got.rope_scaling == YarnScaling(4.0, 32768, attention=0.1 * math.log(4) + 1)
    assert got.max_positions == 131072
    got = language(case, **(base | {name: {"rope_type": "linear", "factor": 3} | sections}))
    assert got.rope_scaling == LinearScaling(3.0) and got.max_positions == 32768
    hf = with_keys(case, base | {name: YARN | sections})
    assert not family_for(hf).unknown_keys(hf)


@pytest.mark.parametrize(
    ("keys", "context"),
    [
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 128000, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN | {"factor": 2.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN | {"factor": None}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 4096),
    ],
)
def test_the_context_is_what_the_config_means(keys, context) -> None:
    assert language(**keys).max_positions == context


@pytest.mark.parametrize("case", ["qwen2_vl/public", "llama/public", "internvl2/public"])
@pytest.mark.parametrize("scaling", [YARN | {"original_max_position_embeddings": 16},
                                     {"rope_type": "linear", "factor": 4.0}])  # fmt: skip
def test_scaling_changes_the_logits_as_frequencies_and_gain_do(case, scaling) -> None:
    """The scaled model equals the plain one with other frequencies and scores times
    ``attention^2``."""
    hf = with_keys(case, {"rope_scaling": {"type": "default"}, "rope_parameters": None})
    family = family_for(hf)
    config = family.config_from_hf(hf)
    params = random_params(family, config)
    batch = batch_of(family, config, case)
    plain = np.asarray(forward(model_of(family, config, params), batch))
    hf = with_keys(case, {"rope_scaling": scaling, "rope_parameters": None})
    scaled_config = family.config_from_hf(hf)
    scaled = np.asarray(forward(model_of(family, scaled_config, params), batch))
    real = np.asarray(batch.token_class) >= 0
    assert relative(scaled[real], plain[real]) > 1e-3
    gain = scaled_config.language.score_gain
    # Fold the gain into the weights of queries and keys: the same scores without a gain.
    twin = dict(params)
    for layer in range(config.language.num_layers):
        for part in ("q_proj", "k_proj"):
            for leaf in ("kernel", "bias"):
                name = f"language/layers/{layer}/{part}/{leaf}"
                if name in twin:
                    twin[name] = twin[name] * gain**0.5
    without = {**scaling, "attention_factor": 1.0} if scaling.get("type") == "yarn" else scaling
    hf = with_keys(case, {"rope_scaling": without, "rope_parameters": None})
    got = np.asarray(forward(model_of(family, family.config_from_hf(hf), twin), batch))
    assert relative(got[real], scaled[real]) < 1e-5


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"type": "longrope", "factor": 4.0}, "'longrope' is not supported"),
        ({"type": "yarn", "rope_type": "linear", "factor": 4.0}, "remove the wrong one"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "linear", "factor": "4"}, "factor '4': expected a number"),
        ({"type": "linear", "factor": 0.5}, "factor 0.5: expected a number from 1"),
        ({"type": "linear", "factor": float("nan")}, "factor nan"),
        ({"type": "default", "factor": 4.0}, "factor has no meaning for rope type 'default'"),
        ({"factor": 4.0}, "factor has no meaning"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast has no meaning"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast"),
        (YARN | {"long_factor": [1.0]}, "longrope"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (YARN | {"rope_thta": 1}, "rope_scaling.rope_thta is unknown"),
        (YARN | {"rope_theta": 7.0}, "rope_theta is given twice"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention is unknown"),
        ("yarn", "rope_scaling 'yarn': expected an object"),
        ({"type": "mrope", "mrope_section": [1, 2, 3]}, "'mrope' is not supported for this model"),
    ],
)
def test_what_would_be_ignored_is_refused(scaling, word) -> None:
    with pytest.raises(UserError, match=word):
        language(rope_scaling=scaling)


def test_two_objects_must_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    assert language(rope_scaling=linear, rope_parameters=dict(linear)).rope_scaling.factor == 2
    with pytest.raises(UserError, match="factor is given twice, as 2.0 and 3.0"):
        language(rope_scaling=linear, rope_parameters=linear | {"factor": 3.0})


def test_a_nested_text_model_is_not_contradicted_at_the_top() -> None:
    """transformers only reads ``text_config`` and would ignore keys outside it."""
    hf = changed_config("qwen2_vl/public")
    text = {k: v for k, v in hf.items() if k != "vision_config"} | {"image_token_id": None}
    hf["text_config"] = text | {"model_type": "qwen2_vl_text"}
    family = family_for(hf)
    assert family.config_from_hf(hf) == family.config_from_hf(changed_config("qwen2_vl/public"))
    hf["text_config"]["rope_scaling"] = {
        "type": "default", "rope_type": "default", "mrope_section": [2, 5, 5],
    }  # fmt: skip
    assert family.config_from_hf(hf) == family.config_from_hf(changed_config("qwen2_vl/public"))
    assert family.unknown_keys(hf) == []
    with pytest.raises(UserError, match="hidden_size is 97, but 96 in text_config"):
        family.config_from_hf(hf | {"hidden_size": 97})
    hf["rope_scaling"] = YARN | {"mrope_section": [2, 5, 5]}
    with pytest.raises(UserError, match="rope_scaling .* make them agree"):
        family.config_from_hf(hf)
