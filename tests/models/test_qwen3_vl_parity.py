"""The float Qwen3-VL against outputs of transformers (tests/goldens)."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

from mquant_jax.eval.reference import capture
from mquant_jax.models.qwen2_vl.processing import collate, reference_prompts
from mquant_jax.models.qwen3_vl import FAMILY
from mquant_jax.models.registry import family_for
from mquant_jax.models.text import text_prompt
from mquant_jax.nn.params import get_params
from tests.family_cases import model_of
from tests.family_checks import (
    RTOL,
    greedy_with_the_cache,
    rows_stand_alone,
    unused_tensors,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, forward, golden, golden_model, relative

CASES = ["qwen3_vl/public", "qwen3_vl/public_video"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden_model(request.param)[1:]


def test_every_layer_of_the_forward_pass(case) -> None:
    model, config, inputs, outputs = case
    real = inputs["attention_mask"] == 1
    got = capture(model, FAMILY.reference_batch(config, inputs))
    found = {name for name in got if name in outputs}
    assert {"embeds", "logits", f"hidden_{config.language.num_layers}"} <= found
    for name in found:
        ours, theirs = got[name], outputs[name]
        if ours.shape[:2] == real.shape:
            ours, theirs = ours[real], theirs[real]
        assert relative(ours, theirs) < RTOL, name


def test_deep_features(case) -> None:
    """Features that each tap adds, in prompt order."""
    model, config, inputs, outputs = case
    batch, hidden = FAMILY.reference_batch(config, inputs), config.language.hidden_size
    added = model.added(batch, model.parts(model.visual(batch)))
    stack = np.asarray(added.stacked())
    visual = batch.token_class == 1
    assert stack.shape == (len(config.vision.taps) + 1, *visual.shape, hidden)
    assert not stack[-1].any() and not stack[:, ~visual].any()
    for i in range(len(config.vision.taps)):
        np.testing.assert_array_equal(added.at_layer(i), stack[i])
        if f"deepstack_{i}" in outputs:
            assert relative(stack[i][visual], outputs[f"deepstack_{i}"]) < RTOL
    assert added.at_layer(len(config.vision.taps)) is None


def test_positions_match_the_reference(case) -> None:
    _, config, inputs, outputs = case
    batch, real = FAMILY.reference_batch(config, inputs), inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.positions[:, real], outputs["position_ids"][:, real])
    np.testing.assert_array_equal(batch.token_class == 1, outputs["is_visual"] == 1)


def test_greedy_with_the_cache(case) -> None:
    model, config, inputs, outputs = case
    got = greedy_with_the_cache(model, FAMILY.reference_batch(config, inputs), outputs)
    assert relative(got[:, 0], outputs["logits"][:, -1]) < RTOL


def test_a_row_alone_equals_the_row_in_the_batch() -> None:
    _, model, config, inputs, _ = golden_model(CASES[0])
    own = partial(collate, config=config, pad_id=0)
    rows_stand_alone(model, own, list(reference_prompts(inputs, config)), pad_to=48)


def test_the_converter_and_the_verifier(tmp_path, capsys) -> None:
    got = verified(GOLDENS / CASES[0], tmp_path / "dst", capsys)
    arrays = {"vision", "vision_pre", "embeds", "logits", "deepstack_0", "deepstack_1"}
    assert arrays | {f"hidden_{i}" for i in range(4)} <= got


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_used_whole(name) -> None:
    assert unused_tensors(name) == set()


def test_bfloat16(case) -> None:
    _, config, _, _ = case
    assert wider_than_bfloat16(FAMILY, config, CASES[0]) == set()


def test_text_alone_is_qwen3() -> None:
    """A text-only prompt gives the same logits through the language-model family."""
    _, model, config, _, _ = golden_model(CASES[0])
    hf = golden("qwen3_vl", "public")[0]["text_config"]
    family = family_for(hf | {"model_type": "qwen3"})
    hf = {k: v for k, v in hf.items() if k != "rope_scaling"} | {"model_type": "qwen3"}
    text = family.config_from_hf(hf)
    once = dataclasses.replace(config.language, rope_streams=text.language.rope_streams)
    assert once == text.language and set(once.rope_streams) == {0}
    params = {n: x for n, x in get_params(model).items() if n.startswith("language/")}
    prompts = [text_prompt([5, 9, 300, 7]), text_prompt([8, 1])]
    expected = forward(model, FAMILY.collate(config, prompts))
    got = forward(model_of(family, text, params), family.collate(text, prompts))
    assert relative(got[0], expected[0]) < 1e-6
