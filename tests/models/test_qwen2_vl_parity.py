"""The float Qwen2-VL and Qwen2.5-VL against outputs of transformers (tests/goldens)."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.eval.reference import capture
from mquant_jax.models.qwen2_vl.processing import collate, reference_batch, reference_prompts
from tests.family_checks import RTOL, greedy_with_the_cache, rows_stand_alone
from tests.helpers import forward, golden_model, relative

embed = nnx.jit(lambda model, batch: model.embed(batch))
prefill = nnx.jit(lambda model, batch, cache: model.prefill(batch, cache))


CASES = ["qwen2_vl/public", "qwen2_vl/public_video", "qwen2_5_vl/public"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden_model(request.param)[1:]


def test_every_position_of_the_forward_pass(case) -> None:
    model, config, inputs, outputs = case
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    assert relative(embed(model, batch)[real], outputs["embeds"][real]) < RTOL
    assert relative(forward(model, batch)[real], outputs["logits"][real]) < RTOL


def test_visual_tokens(case) -> None:
    model, config, inputs, outputs = case
    batch, visual = reference_batch(config, inputs), outputs["is_visual"] == 1
    assert relative(embed(model, batch)[visual], outputs["vision"]) < RTOL


def test_a_runner_that_captures_layers_sees_the_same(case) -> None:
    """Runners with their own layer loop pass each layer its context, such as its windows."""
    model, config, inputs, outputs = case
    got = capture(model, reference_batch(config, inputs))
    assert relative(got["vision"], outputs["vision"]) < RTOL


def test_positions_match_the_reference(case) -> None:
    _, config, inputs, outputs = case
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.positions[:, real], outputs["position_ids"][:, real])


def test_greedy_with_the_cache(case) -> None:
    model, config, inputs, outputs = case
    got = greedy_with_the_cache(model, reference_batch(config, inputs), outputs)
    assert relative(got[:, 0], outputs["logits"][:, -1]) < RTOL


def test_more_padding_changes_nothing(case) -> None:
    model, config, inputs, _ = case
    prompts = list(reference_prompts(inputs, config))
    length = inputs["input_ids"].shape[1]
    short = forward(model, collate(prompts, config, 0))
    long = forward(model, collate(prompts, config, 0, pad_to=length + 9))
    for row, prompt in enumerate(prompts):
        n = len(prompt.input_ids)
        assert relative(long[row, -n:], short[row, -n:]) < RTOL


def test_a_row_alone_equals_the_row_in_the_batch(case) -> None:
    model, config, inputs, _ = case
    own = partial(collate, config=config, pad_id=0)
    rows_stand_alone(model, own, list(reference_prompts(inputs, config)))


def test_text_alone(case) -> None:
    """A text-only batch needs no vision input, and prefill agrees with the forward pass."""
    model, config, inputs, _ = case
    prompt = next(reference_prompts(inputs, config))
    visual = (config.image_token_id, config.video_token_id)
    ids = [i for i in prompt.input_ids if i not in visual]
    text = type(prompt)(ids, [], prompt.patches[:0])
    batch = collate([text], config, 0)
    assert batch.vision is None
    logits, _ = prefill(model, batch, model.language.init_cache(1, len(ids)))
    assert jax.numpy.isfinite(logits).all()
    assert relative(logits, forward(model, batch)[:, -1]) < RTOL
