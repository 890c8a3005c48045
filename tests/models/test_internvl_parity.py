"""The float InternVL against outputs of the published code (tests/goldens/internvl*)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.internvl.modeling import pixel_shuffle
from mquant_jax.models.internvl.processing import collate, reference_batch, reference_prompts
from mquant_jax.models.internvl.weights import canonical_name, weight_rules
from mquant_jax.models.rules import Rows
from mquant_jax.nn.resample import cubic_weights, resample_grid
from mquant_jax.nn.rope import DynamicScaling, frequencies, multi_axis_angles
from tests.family_checks import rows_stand_alone, verified
from tests.helpers import GOLDENS, forward, golden
from tests.internvl_cases import (
    BIG_TOWER,
    CASES,
    changed_config,
    golden_case,
    model_of,
    random_params,
)


@pytest.mark.parametrize("case", CASES)
def test_every_array_and_the_greedy_tokens(case, tmp_path, capsys) -> None:
    arrays = verified(GOLDENS / case, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision", "embeds", "hidden_2", "logits"} <= arrays


@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_rows_do_not_depend_on_their_company(case) -> None:
    model, config, inputs, outputs = golden_case(case)
    prompts, token = reference_prompts(inputs, config)
    own = partial(collate, config=config, image_token=token)
    rows_stand_alone(model, own, prompts, pad_to=64)
    text = dataclasses.replace(prompts[0], input_ids=[5, 6, 7], grids=[])
    assert collate([text], config, token).vision is None


def test_counts_that_do_not_match() -> None:
    _, config, inputs, _ = golden_case(CASES[0])
    prompts, token = reference_prompts(inputs, config)
    bad = dataclasses.replace(prompts[0], grids=prompts[0].grids[:-1])
    with pytest.raises(ValueError, match="27 placeholders|36 placeholders"):
        collate([bad], config, token)
    with pytest.raises(ValueError, match="tiles given"):
        reference_batch(config, inputs | {"input_ids": 0 * inputs["input_ids"]})


def test_pixel_shuffle_by_hand() -> None:
    patches = np.arange(16.0).reshape(1, 16, 1)  # a 4 x 4 picture; each value is its patch's index
    rows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(pixel_shuffle(patches, 2)[0], rows)
    columns = [rows[0], rows[2], rows[1], rows[3]]
    np.testing.assert_array_equal(pixel_shuffle(patches, 2, transposed=True)[0], columns)


def test_grouped_rows_by_hand_and_back() -> None:
    # Two key/value heads of width 1, three query heads per key/value head.
    source = np.array([0, 1, 2, 100, 200, 3, 4, 5, 101, 201])[:, None]
    parts = {"q": Rows(0, 3, 5, 2), "k": Rows(3, 4, 5, 2), "v": Rows(4, 5, 5, 2)}
    got = {name: rows.view(source).reshape(-1).tolist() for name, rows in parts.items()}
    assert got == {"q": [0, 1, 2, 3, 4, 5], "k": [100, 101], "v": [200, 201]}
    _, config, _, _ = golden_case(CASES[0])
    rng = np.random.default_rng(0)
    out = {r.src: np.full(r.src_shape, np.nan) for r in weight_rules(config)}
    ours = {r.dst: rng.normal(size=r.shape) for r in weight_rules(config)}
    for rule in weight_rules(config):
        rule.scatter(ours[rule.dst], out[rule.src])
    assert all(np.isfinite(x).all() for x in out.values())
    for rule in weight_rules(config):
        np.testing.assert_array_equal(rule.apply(out[rule.src]), ours[rule.dst])


def test_positions_are_resampled_for_other_tiles() -> None:
    """A linear ramp stays linear away from the border; an unchanged size changes nothing."""
    np.testing.assert_array_equal(cubic_weights(7, 7), np.eye(7))
    assert cubic_weights(8, 5).sum(1) == pytest.approx(1)
    # Cubic weights (a = -0.75) for the second of four points when the size doubles.
    far, near, beside, beyond = -0.03515625, 0.26171875, 0.87890625, -0.10546875
    expected = [beyond, near, beside, beside, near, beyond, far, 0]
    assert cubic_weights(4, 8)[:, 1] == pytest.approx(expected, abs=1e-12)
    ramp = np.arange(64.0).reshape(8, 8)[..., None].astype(np.float32)
    small = np.asarray(resample_grid(ramp.reshape(64, 1), 8, 4)).reshape(4, 4)
    assert np.diff(small[1:3, 1:3], axis=1) == pytest.approx(2)
    assert np.diff(small[1:3, 1:3], axis=0) == pytest.approx(16)
    config = InternVLConfig.from_hf(changed_config(CASES[0], force_image_size=56))
    _, _, inputs, _ = golden_case(CASES[0])
    model = model_of(config, random_params(config))
    batch = reference_batch(
        config,
        {
            "pixel_values": inputs["pixel_values"][:1, :, :56, :56],
            "input_ids": np.array([[1, 2, 377, 377, 377, 377, 3]]),
            "attention_mask": np.ones((1, 7), np.int32),
            "img_context_token_id": inputs["img_context_token_id"],
        },
    )
    assert config.tile_tokens == 4 and np.isfinite(forward(model, batch)).all()


@pytest.mark.parametrize("case", BIG_TOWER)
def test_the_big_tower_norms_queries_over_all_heads(case) -> None:
    hf = changed_config(case, vision_config=BIG_TOWER[case])
    config = InternVLConfig.from_hf(hf)
    names = {r.src for r in weight_rules(config)}
    width = config.vision.hidden_size
    norms = [r for r in weight_rules(config) if r.dst.endswith("layers/0/q_norm/weight")]
    assert [r.shape for r in norms] == [(width,)]
    assert not [n for n in names if "qkv.bias" in n or n.endswith("norm1.bias")]
    model = model_of(config, random_params(config))
    block = jax.tree.map(lambda x: x[0], nnx.state(model.vision.layers))
    assert "bias" not in block["attn_norm"]
    assert np.isfinite(forward(model, reference_batch(config, golden(*case.split("/"))[1]))).all()


def test_dynamic_rope_by_hand() -> None:
    dim, theta, scaling = 8, 100.0, DynamicScaling(2.0, 16)
    short = np.arange(16, dtype=np.int32)[None, None]
    plain = multi_axis_angles(short, dim, theta, (0,) * 4)
    got = multi_axis_angles(short, dim, theta, (0,) * 4, scaling)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    long = np.arange(24, dtype=np.int32)[None, None]
    base = theta * (2.0 * 24 / 16 - 1.0) ** (dim / (dim - 2))
    got = multi_axis_angles(long, dim, theta, (0,) * 4, scaling)
    np.testing.assert_allclose(got[0, 1], frequencies(dim, base), rtol=1e-5)


def test_names_of_transformers_5() -> None:
    for name, hub in {
        "model.language_model.layers.0.mlp.up_proj.weight":
            "language_model.model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.vision_tower.embeddings.cls_token": "vision_tower.embeddings.cls_token",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
        "mlp1.0.weight": "mlp1.0.weight",
    }.items():  # fmt: skip
        assert canonical_name(name) == hub


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        (CASES[0], {"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "Phi3ForCausalLM"),
        (CASES[0], {"select_layer": -4}, "select_layer -4"),
        (CASES[0], {"ps_version": "v3"}, "ps_version 'v3'"),
        (CASES[0], {"downsample_ratio": 0.3}, "do not fit"),
        (CASES[0], {"vision_config": {"norm_type": "batch_norm"}}, "norm_type"),
        (CASES[2], {"text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"),
        (CASES[2], {"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling"),
        (CASES[2], {"vision_config": {"image_size": [56, 70]}}, "not square"),
        (CASES[2], {"vision_feature_layer": -2}, "vision_feature_layer -2"),
        (CASES[2], {"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "factor is missing"),
    ],
)
def test_what_is_not_handled_is_said(case, changes, word) -> None:
    with pytest.raises(UserError, match=word):
        InternVLConfig.from_hf(changed_config(case, **changes))
    key = "llm_config" if case == CASES[0] else "text_config"
    with pytest.raises(UserError, match=f"{key} 3: expected an object"):
        InternVLConfig.from_hf(changed_config(case, **{key: 3}))
