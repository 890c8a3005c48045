"""The float GLM-4V against outputs of the published code (tests/goldens/glm4v)."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import hf_to_flax, verify
from mquant_jax.errors import UserError
from mquant_jax.eval.reference import greedy_tokens
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.glm4v import FAMILY, TEXT_FAMILY
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.glm4v.processing import collate, expand, reference_batch, reference_prompts
from mquant_jax.models.glm4v.weights import rope_order, weight_rules
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import get_params
from mquant_jax.nn.rope import apply_rope, frequencies
from tests.eva2_cases import ODD_TOWER
from tests.family_cases import changed_config, golden_case, model_of, random_params
from tests.family_checks import (
    RTOL,
    example_prompt,
    greedy_with_the_cache,
    rows_stand_alone,
    unused_tensors,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, forward, golden, relative

CASE = "glm4v/public"


def test_every_array_and_the_greedy_tokens(tmp_path, capsys) -> None:
    arrays = verified(GOLDENS / CASE, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision_conv", "vision", "embeds", "hidden_2", "logits"} <= arrays


def test_positions_and_masks_of_the_reference() -> None:
    model, config, inputs, outputs = golden_case(CASE)
    batch = reference_batch(config, inputs)
    real = outputs["attention_mask_expanded"] == 1
    np.testing.assert_array_equal(batch.token_class >= 0, real)
    np.testing.assert_array_equal(batch.token_class == 1, outputs["is_visual"] == 1)
    np.testing.assert_array_equal(batch.visual_index >= 0, outputs["is_visual"] == 1)
    np.testing.assert_array_equal(batch.positions[0], outputs["position_ids"])
    np.testing.assert_array_equal(batch.next_position, inputs["position_ids"].max(1) + 1)
    context = model.language.context(batch.positions, batch.order, batch.token_class)
    seen = outputs["attention_allowed"] == 1
    np.testing.assert_array_equal(np.asarray(context.seen.mask)[real], seen[real])


def test_what_only_the_golden_records() -> None:
    model, config, inputs, outputs = golden_case(CASE)
    batch = reference_batch(config, inputs)
    real = outputs["attention_mask_expanded"] == 1
    final = model.language.norm(nnx.jit(lambda m, b: m.stream(b))(model, batch))
    assert relative(final[real], outputs["hidden_final"][real]) < RTOL
    greedy_with_the_cache(model, batch, outputs)


def test_a_picture_anywhere_and_rows_without() -> None:
    """Rows with pictures at any position and text-only rows share a batch, which the published code
    does not support, without changing each other's logits."""
    model, config, inputs, _ = golden_case(CASE)
    first, second = reference_prompts(config, inputs)
    text = dataclasses.replace(first, input_ids=[5, 6, 7], grids=[], patches=np.zeros((0, 0)))
    picture = [VISUAL] * config.vision.tokens
    late = dataclasses.replace(first, input_ids=[*range(9), *picture])
    prompts = [first, second, text, late]
    rows_stand_alone(model, partial(collate, config), prompts)
    batch = collate(config, prompts)
    assert batch.positions[0, 3, -3:].tolist() == [10, 10, 11]
    assert batch.next_position.tolist()[2:] == [3, 12]


def test_a_second_batch_of_text_is_verified(tmp_path, capsys) -> None:
    """Arrays named ``text_*`` hold a second, text-only batch; here recorded from our own model."""
    model, config, inputs, outputs = golden_case(CASE)
    ids = inputs["input_ids"][:, -7:].copy()
    ids[0, :2] = config.boi - 10
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    batch = reference_batch(config, text)
    text_out = {"text_logits": np.asarray(forward(model, batch)),
                "text_greedy": greedy_tokens(model, batch, 4)}  # fmt: skip
    save_file(inputs | {f"text_{k}": v for k, v in text.items()}, tmp_path / "inputs.safetensors")
    dst = tmp_path / "dst"
    assert hf_to_flax.main([str(GOLDENS / CASE), str(dst)]) == 0
    for wrong, status in ((0, 0), (1, 1)):
        text_out["text_greedy"] = text_out["text_greedy"] + wrong
        save_file(outputs | text_out, tmp_path / "outputs.safetensors")
        capsys.readouterr()
        args = [str(dst), "--reference", str(tmp_path), "--json"]
        assert verify.main(args) == status
    assert "text_logits" in json.loads(capsys.readouterr().out)["arrays"]


def test_bad_references_are_said() -> None:
    _, config, inputs, _ = golden_case(CASE)
    with pytest.raises(ValueError, match="tokens apart"):
        expand(config, [1, config.boi, 7, 7, config.eoi])
    with pytest.raises(ValueError, match="one picture per row"):
        reference_batch(config, inputs | {"pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="not of 84"):
        reference_batch(config, inputs | {"pixel_values": inputs["pixel_values"][..., :56, :56]})
    prompt = next(reference_prompts(config, inputs))
    with pytest.raises(ValueError, match="11 placeholders, but 0"):
        collate(config, [dataclasses.replace(prompt, grids=[])])
    with pytest.raises(ValueError, match="6 patches square"):
        collate(config, [dataclasses.replace(prompt, grids=[(1, 4, 9)])])


def test_partial_rope_turns_neighbouring_pairs() -> None:
    """Compared with the published definition in complex numbers, on the published channel order."""
    rng, d = np.random.default_rng(0), 24
    published = rng.normal(size=(2, 5, d)).astype(np.float32)  # [B, T, d]
    angles = np.arange(5)[:, None] * frequencies(d // 2, 30000.0)  # [T, d/4]
    pairs = published[..., : d // 2].reshape(2, 5, d // 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    expected = np.concatenate(
        [np.stack([turned.real, turned.imag], -1).reshape(2, 5, -1), published[..., d // 2 :]], -1
    )
    ours = published[..., rope_order(d)][:, None]
    got = apply_rope(jnp.asarray(ours), jnp.asarray(np.broadcast_to(angles, (2, *angles.shape))))
    np.testing.assert_allclose(got[:, 0], expected[..., rope_order(d)], atol=1e-5)


def test_every_tensor_of_the_checkpoint_is_used_whole() -> None:
    assert unused_tensors(CASE) == {"transformer.rotary_pos_emb.inv_freq"}


def test_other_sizes_and_settings() -> None:
    inputs = golden(*CASE.split("/"))[1]
    changes = {
        "hidden_size": 88, "num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 20,
        "ffn_hidden_size": 90, "add_qkv_bias": False, "vision_config": ODD_TOWER,
    }  # fmt: skip
    config = GLM4VConfig.from_hf(changed_config(CASE, **changes))
    assert not any("q_proj/bias" in r.dst for r in weight_rules(config) if "language" in r.dst)
    params = random_params(FAMILY, config)
    batch = reference_batch(config, inputs)
    one = forward(model_of(FAMILY, config, params), batch)
    assert np.isfinite(one).all()
    for other in ({"rope_ratio": 3}, {"vision_config": ODD_TOWER | {"scaling_factor": 5}}):
        config = GLM4VConfig.from_hf(changed_config(CASE, **(changes | other)))
        assert relative(forward(model_of(FAMILY, config, params), batch), one) > 1e-3


def test_the_language_model_alone() -> None:
    """GLM-4, without a tower, is published under the same model_type."""
    hf = changed_config(CASE)
    del hf["vision_config"]
    assert family_for(hf) is TEXT_FAMILY and family_for(changed_config(CASE)) is FAMILY
    model, full, inputs, _ = golden_case(CASE)
    config = GLM4VConfig.from_hf(hf)
    params = {k: v for k, v in get_params(model).items() if k.startswith("language/")}
    assert {r.dst for r in weight_rules(config)} == set(params)
    text = {"input_ids": inputs["input_ids"][:, -4:], "attention_mask": np.ones((2, 4), np.int32)}
    got = forward(model_of(TEXT_FAMILY, config, params), reference_batch(config, text))
    expected = forward(model, reference_batch(full, text))
    np.testing.assert_array_equal(got, expected)
    assert TEXT_FAMILY.example_prompt(config, 4, 84).grids == []


def test_bfloat16_stays_bfloat16() -> None:
    assert not wider_than_bfloat16(FAMILY, GLM4VConfig.from_hf(changed_config(CASE)), CASE)


def test_measurements_need_no_tokenizer() -> None:
    model, config, _, _ = golden_case(CASE)
    prompt = example_prompt(FAMILY, config, model, 448)
    assert prompt.input_ids.count(VISUAL) == config.vision.tokens == 11


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rmsnorm": False}, "rmsnorm False"),
        ({"original_rope": False}, "original_rope"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"pre_seq_len": 64}, "pre_seq_len"),
        ({"multi_query_group_num": 3}, "into 3 groups"),
        ({"vision_config": {"hidden_act": "relu"}}, "'relu'"),
        ({"vision_config": {"num_heads": 5}}, "5 heads"),
        ({"vision_config": {"num_positions": 26}}, "num_positions"),
        ({"vision_config": {"image_size": 70, "num_positions": 26}}, "even number"),
        ({"vision_config": {"scaling_factor": 0}}, "scaling_factor"),
    ],
)
def test_what_is_not_handled_is_said(changes, word) -> None:
    with pytest.raises(UserError, match=word):
        GLM4VConfig.from_hf(changed_config(CASE, **changes))
    hf = changed_config(CASE)
    del hf["boi_token_id"]
    with pytest.raises(UserError, match="boi_token_id is missing"):
        GLM4VConfig.from_hf(hf)
