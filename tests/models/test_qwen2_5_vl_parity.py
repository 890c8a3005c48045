"""The float Qwen2.5-VL against transformers' own numbers (tests/goldens/qwen2_5_vl)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from flax import nnx

from mquant_jax.eval.reference import capture
from mquant_jax.models.qwen2_vl.processing import collate, reference_batch, reference_prompts
from tests.family_checks import RTOL, greedy_with_the_cache, rows_stand_alone
from tests.helpers import forward, golden_model, relative

CASE = "qwen2_5_vl/public"
embed = nnx.jit(lambda model, batch: model.embed(batch))


@pytest.fixture(scope="module")
def case():
    return golden_model(CASE)[1:]


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
    """Runners with loops of their own give each layer its windows, too."""
    model, config, inputs, outputs = case
    got = capture(model, reference_batch(config, inputs))
    assert relative(got["vision"], outputs["vision"]) < RTOL


def test_greedy_with_the_cache(case) -> None:
    model, config, inputs, outputs = case
    got = greedy_with_the_cache(model, reference_batch(config, inputs), outputs)
    assert relative(got[:, 0], outputs["logits"][:, -1]) < RTOL


def test_a_row_alone_equals_the_row_in_the_batch(case) -> None:
    model, config, inputs, _ = case
    own = partial(collate, config=config, pad_id=0)
    rows_stand_alone(model, own, list(reference_prompts(inputs, config)))


def test_positions_match_the_reference(case) -> None:
    _, config, inputs, outputs = case
    batch, real = reference_batch(config, inputs), inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.positions[:, real], outputs["position_ids"][:, real])
