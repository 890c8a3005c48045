"""The float MiniCPM-V 2.6 against outputs of the published code (tests/goldens/minicpmv2_6)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mquant_jax.errors import UserError
from mquant_jax.models.minicpmv import FAMILY
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.minicpmv.processing import (
    VISUAL,
    collate,
    position_buckets,
    reference_batch,
    reference_prompts,
)
from mquant_jax.models.minicpmv.weights import ignored, weight_rules
from mquant_jax.nn.resampler import sincos
from tests.family_checks import (
    RTOL,
    example_prompt,
    rows_stand_alone,
    unused_tensors,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, forward, golden, relative
from tests.minicpmv_cases import (
    CASES,
    FOLDER,
    ODD,
    changed_config,
    golden_case,
    model_of,
    random_params,
)


@pytest.mark.parametrize("case", CASES)
def test_every_array_and_the_greedy_tokens(case, tmp_path, capsys) -> None:
    """One row's last prompt token is masked, but still predicts the next one."""
    arrays = verified(GOLDENS / FOLDER / case, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision", "embeds", "hidden_2", "logits"} <= arrays


@pytest.mark.parametrize("case", CASES)
def test_positions_and_masks_of_the_reference(case) -> None:
    _, config, inputs, outputs = golden_case(case)
    batch = reference_batch(config, inputs)
    np.testing.assert_array_equal(batch.token_class >= 0, inputs["attention_mask"] == 1)
    np.testing.assert_array_equal(batch.token_class == 1, outputs["is_visual"] == 1)
    np.testing.assert_array_equal(batch.positions[0], outputs["position_ids"])
    valid = outputs["vision_patch_mask"] == 1
    slices, patches = valid.shape
    np.testing.assert_array_equal(batch.vision.valid[:slices, :patches], valid)
    got = batch.vision.position_rows[:slices, :patches]
    np.testing.assert_array_equal(got, outputs["vision_position_ids"])
    real = inputs["attention_mask"].sum(1)
    np.testing.assert_array_equal(batch.next_position, real)
    np.testing.assert_array_equal(batch.lengths, real)


def test_position_buckets_of_the_published_code() -> None:
    table = load_file(GOLDENS / FOLDER / "pos_bucket_table.safetensors")["bucket_N70"]
    for n in range(1, 129):
        np.testing.assert_array_equal(position_buckets(n, 70), table[n - 1, :n])
    assert position_buckets(25, 70)[5] == 13  # floating-point rounding: 5 * 70 / 25 is 14


def test_rows_do_not_depend_on_their_company() -> None:
    model, config, inputs, _ = golden_case("public")
    prompts = list(reference_prompts(inputs, config))
    rows_stand_alone(model, partial(collate, config), prompts, pad_to=64)
    text = dataclasses.replace(prompts[0], input_ids=[5, 6, 7], grids=[])
    assert collate(config, [text]).vision is None


def test_a_masked_token_is_as_if_it_were_not_there() -> None:
    model, config, inputs, _ = golden_case("quirk_zero_token")
    prompt = next(iter(reference_prompts(inputs, config)))
    assert 0 in prompt.input_ids
    without = dataclasses.replace(prompt, input_ids=[i for i in prompt.input_ids if i])
    got, expected = (forward(model, collate(config, [p]))[0, -1] for p in (prompt, without))
    assert relative(got, expected) < RTOL


def test_counts_that_do_not_match() -> None:
    _, config, inputs, _ = golden_case("public")
    prompt = next(iter(reference_prompts(inputs, config)))
    bad = dataclasses.replace(prompt, grids=prompt.grids[:-1])
    with pytest.raises(ValueError, match="16 placeholders, but 12 visual"):
        collate(config, [bad])
    with pytest.raises(ValueError, match="slices_per_row"):
        reference_batch(config, inputs | {"slices_per_row": np.array([1, 1])})


def test_sincos_by_hand() -> None:
    got = np.asarray(sincos(jnp.array([[[2, 3]]]), 8))[0, 0]
    rates = np.array([1.0, 0.01])
    row, column = ([*np.sin(p * rates), *np.cos(p * rates)] for p in (2, 3))
    np.testing.assert_allclose(got, [*column, *row], atol=1e-6)


def test_every_tensor_of_the_checkpoint_is_used_whole() -> None:
    assert not unused_tensors(f"{FOLDER}/public")
    assert ignored("llm.model.layers.3.self_attn.rotary_emb.inv_freq")


def test_other_sizes_of_the_published_layout() -> None:
    """Odd widths, fewer layers and features without a projection run in float."""
    inputs = golden(FOLDER, "public")[1]
    for changes in (ODD, {"vision_config": {"hidden_size": 256}}, {"drop_vision_last_layer": True}):
        config = MiniCPMVConfig.from_hf(changed_config(**changes))
        logits = forward(model_of(config, random_params(config)), reference_batch(config, inputs))
        assert np.isfinite(logits).all()
    assert config.vision.num_layers == 1
    wide = MiniCPMVConfig.from_hf(changed_config(vision_config={"hidden_size": 256}))
    assert not any("kv_proj" in r.dst for r in weight_rules(wide))
    with pytest.raises(UserError, match="no kv_proj"):
        FAMILY.streams(wide)


def test_bfloat16_stays_bfloat16() -> None:
    config = MiniCPMVConfig.from_hf(changed_config())
    assert not wider_than_bfloat16(FAMILY, config, f"{FOLDER}/public")


def test_measurements_need_no_tokenizer() -> None:
    config = MiniCPMVConfig.from_hf(changed_config(image_size=56))
    prompt = example_prompt(FAMILY, config, model_of(config, random_params(config)), 100)
    assert prompt.input_ids.count(VISUAL) == config.queries * len(prompt.grids) > config.queries


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": 2.5}, "version 2.5"),
        ({"version": None}, "version None"),
        ({"scale_emb": 12}, "scale_emb"),
        ({"hidden_size": 96}, "hidden_size 96"),
        ({"vision_config": {"model_type": "clip"}}, "'clip'"),
        ({"vision_config": {"hidden_act": "relu"}}, "'relu'"),
        ({"vision_config": {"num_attention_heads": 5}}, "5 heads"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_is_not_handled_is_said(changes, word) -> None:
    with pytest.raises(UserError, match=word):
        MiniCPMVConfig.from_hf(changed_config(**changes))
    hf = changed_config()
    del hf["version"]
    with pytest.raises(UserError, match="version is missing"):
        MiniCPMVConfig.from_hf(hf)
