"""The float Qwen-VL against outputs of the published code (tests/goldens/qwen_vl)."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.qwen_vl import FAMILY
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.qwen_vl.processing import VISUAL, collate, reference_batch
from mquant_jax.models.qwen_vl.weights import ignored, weight_rules
from mquant_jax.models.registry import family_for
from mquant_jax.nn.flow import run
from mquant_jax.nn.params import get_params
from mquant_jax.nn.rope import SteppedScaling, frequencies, multi_axis_angles
from tests.family_checks import (
    RTOL,
    cached_logits,
    example_prompt,
    greedy_with_the_cache,
    rows_stand_alone,
    unused_tensors,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, forward, golden, mostly_slow, relative
from tests.qwen_vl_cases import (
    CASES,
    LONG,
    ODD,
    changed_config,
    golden_case,
    model_of,
    random_params,
)


@pytest.mark.parametrize("case", CASES)
def test_every_array_and_the_greedy_tokens(case, tmp_path, capsys) -> None:
    """One case decodes beyond the training length."""
    arrays = verified(GOLDENS / case, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision", "embeds", "hidden_1", "logits"} <= arrays


@pytest.mark.parametrize("case", CASES)
def test_what_the_verifier_does_not_look_at(case) -> None:
    model, config, inputs, outputs = golden_case(case)
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.token_class >= 0, real)
    np.testing.assert_array_equal(batch.token_class == 1, outputs["is_visual"] == 1)
    np.testing.assert_array_equal(batch.positions[0][real], outputs["position_ids"][real])
    normed = nnx.jit(lambda m, b: m.language.norm(m.stream(b)))(model, batch)
    assert relative(normed[real], outputs["hidden_final"][real]) < RTOL
    assert relative(pooled(model.vision, batch.vision), outputs["vision_pool"]) < RTOL
    assert outputs["ntk_alpha"] == [1.0]
    greedy_with_the_cache(model, batch, outputs)


@nnx.jit
def pooled(tower, vision):
    """The resampler's output before its last norm."""
    kv = tower.keys((run(tower.features(vision)), vision.coords))
    q = tower.queries(tower.query.get_value()[None])
    return tower.merger.pool((jnp.broadcast_to(q, (len(kv), *q.shape[1:])), kv, vision.valid))


def plain_decoder(p: dict, x: np.ndarray, first: int, prompt: int, length: int, heads: int):
    """Logits of one row in float64, from the family's description.

    Args:
        x: embeddings ``[T, d]``; columns before ``first`` are padding.
        prompt: number of columns in the prompt, which determines the rope base.
        length: training length.
    """

    def norm(h, name):
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/weight"]

    def dense(h, name):
        return h @ p[f"{name}/kernel"].T + p.get(f"{name}/bias", 0)

    t, d = x.shape
    hd, at = d // heads, np.arange(t)
    alpha = max(2 ** math.ceil(math.log2(prompt / length) + 1) - 1, 1)
    base = 10000 * alpha ** (hd / (hd - 2))
    angles = np.tile(at[:, None] * base ** (-np.arange(0, hd, 2) / hd), 2)
    logn = np.maximum(np.log(at + 1) / math.log(length), 1)[:, None]
    seen = (at[:, None] >= at) & (at >= first)

    def turn(h):
        a, b = np.split(h, 2, axis=-1)
        return h * np.cos(angles) + np.concatenate([-b, a], -1) * np.sin(angles)

    for i in range(100):
        name = f"language/layers/{i}"
        if f"{name}/q_proj/kernel" not in p:
            break
        h = norm(x, f"{name}/attn_norm")
        q, k, v = (
            dense(h, f"{name}/{n}").reshape(t, heads, hd).swapaxes(0, 1)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        scores = (turn(q) * logn) @ turn(k).swapaxes(1, 2) / math.sqrt(hd)
        scores = np.where(seen, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        h = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + dense(h.swapaxes(0, 1).reshape(t, d), f"{name}/o_proj")
        h = norm(x, f"{name}/mlp_norm")
        gate = dense(h, f"{name}/gate_proj")
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, f"{name}/up_proj"), f"{name}/down_proj")
    return dense(norm(x, "language/norm"), "language/head")


@pytest.mark.parametrize("length", mostly_slow([15, 40], 40))
def test_beyond_the_training_length(length) -> None:
    """Prompts of 63 columns and 8 decoded tokens against :func:`plain_decoder`."""
    config = QwenVLConfig.from_hf(changed_config(seq_length=length))
    params = {k: np.asarray(v, np.float64) for k, v in get_params(golden_case(CASES[0])[0]).items()}
    model = model_of(config, {k: v.astype(np.float32) for k, v in params.items()})
    inputs = golden(*CASES[0].split("/"))[1]
    batch = reference_batch(config, inputs)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 8))
    got = np.concatenate([forward(model, batch)[:, :-1], cached_logits(model, batch, tokens)], 1)
    embeds = np.asarray(model.embed(batch), np.float64)
    for row, mask in enumerate(inputs["attention_mask"]):
        first = int(np.argmax(mask))
        x = np.concatenate([embeds[row], params["language/embedding"][tokens[row, :-1]]])
        expected = plain_decoder(params, x, first, len(mask), length, config.language.num_heads)
        assert relative(got[row, first:], expected[first:]) < RTOL


def test_rows_do_not_depend_on_their_company() -> None:
    """Also beyond the training length, unlike in the published code."""
    config = QwenVLConfig.from_hf(changed_config(**LONG))
    model = model_of(config, random_params(config))
    prompts = [FAMILY.example_prompt(config, n, side) for n, side in ((30, 1), (7, 0), (20, 0))]
    rows_stand_alone(model, partial(collate, config), prompts, pad_to=64)


def test_stepped_rope_by_hand() -> None:
    dim, theta, scaling = 8, 100.0, SteppedScaling(10)
    for length, alpha in ((1, 1), (10, 1), (11, 3), (20, 3), (21, 7), (40, 7), (41, 15)):
        assert alpha == max(2 ** math.ceil(math.log2(length / 10) + 1) - 1, 1)
        places = np.arange(length, dtype=np.int32)[None, None]
        got = multi_axis_angles(places, dim, theta, (0,) * 4, scaling)
        expected = frequencies(dim, theta * alpha ** (dim / (dim - 2))) * (length - 1)
        np.testing.assert_allclose(got[0, -1], expected, rtol=1e-6)
    # Each row's base depends on its own prompt length, also for decoded tokens.
    positions = np.array([[[5], [50]]], np.int32)
    prompts = np.array([30, 9], np.int32)
    got = multi_axis_angles(positions, dim, theta, (0,) * 4, scaling, prompts)
    expected = frequencies(dim, theta * 7 ** (dim / (dim - 2))) * 5
    np.testing.assert_allclose(got[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(got[1, 0], frequencies(dim, theta) * 50, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_checkpoint_is_used_whole(case) -> None:
    assert not unused_tensors(case)
    assert ignored("transformer.rotary_emb.inv_freq")


def test_the_tower_groups_its_fused_rows_by_head() -> None:
    config = QwenVLConfig.from_hf(changed_config())
    width, head = config.vision.hidden_size, config.vision.head_dim
    source = np.arange(3 * width)
    rules = {r.dst: r for r in weight_rules(config)}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        got = rules[f"vision/layers/0/{name}/bias"].apply(source).reshape(-1, head)
        assert got[:, 0].tolist() == [(3 * h + i) * head for h in range(len(got))]


def test_counts_that_do_not_match() -> None:
    _, config, inputs, _ = golden_case(CASES[0])
    ids = inputs["input_ids"].copy()
    with pytest.raises(ValueError, match="placeholders for 3"):
        reference_batch(config, inputs | {"pixel_values": inputs["pixel_values"][:2]})
    ids[0, 9] = 5  # overwrites the first picture's start token
    with pytest.raises(ValueError, match="expected 16 slots"):
        reference_batch(config, inputs | {"input_ids": ids})
    prompt = FAMILY.example_prompt(config, 10, 80)
    with pytest.raises(ValueError, match="16 placeholders, but 0 visual"):
        collate(config, [dataclasses.replace(prompt, grids=[])])
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    assert reference_batch(config, text | {"input_ids": 0 * ids}).vision is None


def test_other_sizes_of_the_published_layout() -> None:
    """Odd widths, features without projection, biases, a tied head and plain rope run in float."""
    inputs = golden(*CASES[0].split("/"))[1]
    small = {"pixel_values": inputs["pixel_values"][:, :, :64, :64]}  # the table's 16 x 16 patches
    for changes, other in (
        (ODD, {}),
        ({"no_bias": False, "use_dynamic_ntk": False, "use_logn_attn": False}, {}),
        ({"tie_word_embeddings": True, "visual": {"image_size": 64}}, small),
        ({"visual": {"width": 140}}, {}),
    ):
        config = QwenVLConfig.from_hf(changed_config(**changes))
        model = model_of(config, random_params(config))
        assert np.isfinite(forward(model, reference_batch(config, inputs | other))).all()
    assert not any("kv_proj" in r.dst for r in weight_rules(config))
    with pytest.raises(UserError, match="no kv_proj"):
        FAMILY.streams(config)


def test_bfloat16_stays_bfloat16() -> None:
    assert not wider_than_bfloat16(FAMILY, QwenVLConfig.from_hf(changed_config()), CASES[0])


def test_measurements_need_no_tokenizer() -> None:
    config = QwenVLConfig.from_hf(changed_config())
    prompt = example_prompt(FAMILY, config, model_of(config, random_params(config)), 100)
    assert prompt.input_ids.count(VISUAL) == config.resampler.queries and len(prompt.grids) == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"visual": None}, "no key 'visual'"),
        ({"kv_channels": 32}, "kv_channels 32"),
        ({"intermediate_size": 175}, "intermediate_size 175"),
        ({"rotary_pct": 0.5}, "rotary_pct 0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights False"),
        ({"seq_length": 1}, "seq_length 1"),
        ({"visual": {"output_dim": 128}}, "output_dim 128"),
        ({"hidden_size": 96, "kv_channels": 24, "num_attention_heads": 4,
          "visual": {"output_dim": 96}}, "output_dim 96"),
        ({"visual": {"heads": 5}}, "5 heads"),
        ({"visual": {"n_queries": 15}}, "n_queries 15"),
        ({"visual": {"patch_size": 96}}, "has no patch"),
        ({"visual": {"image_start_id": 318}}, "image_start_id 318"),
    ],
)  # fmt: skip
def test_what_is_not_handled_is_said(changes, word) -> None:
    with pytest.raises(UserError, match=word):
        family_for({"model_type": "qwen"}).config_from_hf(changed_config(**changes))
    hf = changed_config()
    del hf["visual"]["width"]
    with pytest.raises(UserError, match="width"):
        QwenVLConfig.from_hf(hf)
