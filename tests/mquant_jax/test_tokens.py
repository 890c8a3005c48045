"""AIFS, turns and chunks: tokens may be in any column and may arrive in several calls."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch
from mquant_jax.nn.act_quant import SINK
from mquant_jax.runtime.generate import Generator, decode, extend, prefill
from mquant_jax.runtime.tokens import arrange, chunks, follow, restore, uses_aifs
from tests.helpers import GOLDENS, forward, golden_model, has_pictures, mostly_slow, relative

# One golden per multimodal family.
CASES = [
    case
    for case in sorted(f"{folder.parent.name}/public" for folder in GOLDENS.glob("*/public"))
    if has_pictures(case)
]
# Experts, taps, a resampler, three position axes and one.
FAST = [f"{name}/public" for name in ("cogvlm2", "qwen3_vl", "qwen_vl")]
SLOTS = 256
RTOL = 1e-5

start = jax.jit(prefill, static_argnums=2)
go_on = jax.jit(extend)
step = jax.jit(decode)


def host(batch: Batch) -> Batch:
    return jax.tree.map(np.asarray, batch)


@pytest.fixture(scope="module", params=mostly_slow(CASES, *FAST))
def case(request):
    family, model, config, inputs, outputs = golden_model(request.param)
    return model, host(family.reference_batch(config, inputs)), outputs


def test_each_modality_is_one_slice(case) -> None:
    _, batch, _ = case
    moved, columns = arrange(batch)
    front, back = np.split(moved.token_class, [moved.visual_slots], axis=1)
    assert set(np.unique(front)) <= {-1, 1} and 1 in front
    assert (back != 1).all()
    for row in range(batch.order.shape[0]):
        # No token is lost, duplicated or out of order.
        real = columns[row] >= 0
        before = np.flatnonzero(batch.order[row] >= 0)
        np.testing.assert_array_equal(np.sort(columns[row][real]), before)
        for part in (columns[row, : moved.visual_slots], columns[row, moved.visual_slots :]):
            assert (np.diff(part[part >= 0]) > 0).all()
            assert (np.diff((part >= 0).astype(int)) >= 0).all()  # padding on the left


def test_whole_prompts_agree(case) -> None:
    model, batch, _ = case
    moved, columns = arrange(batch)
    expected = np.asarray(forward(model, batch))
    got = np.asarray(restore(forward(model, moved), columns, batch.order.shape[1]))
    real = batch.order >= 0
    assert relative(got[real], expected[real]) < RTOL
    assert (got[~real] == 0).all()


def test_greedy_answers_agree(case) -> None:
    model, batch, outputs = case
    n = outputs["greedy"].shape[1]
    out = Generator(model, (-1,), layout="aifs").generate(batch, n)
    assert np.array_equal(out.tokens, outputs["greedy"])


@pytest.mark.parametrize("layout", ["masked", "aifs"])
def test_chunks_agree_with_one_call(case, layout) -> None:
    model, batch, _ = case
    expected, whole = start(model, batch, SLOTS)
    pieces = chunks(batch, -(-batch.order.shape[1] // 3))
    if layout == "aifs":
        pieces = [arrange(piece)[0] for piece in pieces]
    visual = jax.jit(type(model).visual)(model, batch)
    logits, state = start(model, pieces[0], SLOTS)
    for piece in pieces[1:]:
        logits, state = go_on(model, piece, state, visual)
    assert relative(logits, expected) < RTOL
    np.testing.assert_array_equal(state.order, whole.order)
    np.testing.assert_array_equal(state.position, whole.position)
    token = jnp.argmax(logits, axis=-1)
    assert relative(step(model, token, state)[0], step(model, token, whole)[0]) < RTOL


@pytest.mark.parametrize("layout", ["masked", "aifs"])
def test_a_second_turn_agrees_with_one_prompt(case, layout) -> None:
    """A prompt, two generated tokens, then the same prompt again with its pictures."""
    model, batch, _ = case
    place = (lambda b: arrange(b)[0]) if layout == "aifs" else (lambda b: b)
    logits, state = start(model, place(batch), SLOTS)
    answer = [jnp.argmax(logits, axis=-1)]
    for _ in range(2):
        logits, state = step(model, answer[-1], state)
        answer.append(jnp.argmax(logits, axis=-1))
    between = np.stack(answer[:2], axis=1).astype(np.int32)  # already in the cache
    second = follow(batch, np.asarray(state.order), np.asarray(state.position))
    got, after = go_on(model, place(second), state)

    order = np.asarray(state.order)[:, None] - 2 + np.arange(2)
    position = np.asarray(state.position)[:, None] - 2 + np.arange(2)
    streams = batch.positions.shape[0]
    join = partial(np.concatenate, axis=1)
    whole = dataclasses.replace(
        batch,
        input_ids=join([batch.input_ids, between, batch.input_ids]),
        order=join([batch.order, order, second.order]),
        positions=np.concatenate(
            [batch.positions, np.stack([position] * streams), second.positions], axis=2
        ),
        token_class=join([batch.token_class, between * 0, batch.token_class]),
        visual_index=join([batch.visual_index, between * 0 - 1, batch.visual_index]),
    )
    expected, alone = start(model, whole, SLOTS)
    assert relative(got, expected) < RTOL
    np.testing.assert_array_equal(after.order, alone.order)
    np.testing.assert_array_equal(after.position, alone.position)


def test_arranging_can_be_traced(case) -> None:
    _, batch, _ = case
    expected, columns = arrange(batch)
    text = expected.order.shape[1] - expected.visual_slots
    traced = jax.jit(arrange, static_argnums=(1, 2))
    got, traced_columns = traced(jax.tree.map(jnp.asarray, batch), expected.visual_slots, text)
    np.testing.assert_array_equal(traced_columns, columns)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_sinks_stand_first_among_the_text() -> None:
    order = np.arange(8, dtype=np.int32)[None]
    batch = Batch(
        input_ids=order,
        order=order,
        positions=order[None],
        token_class=np.int32([[0, 0, 1, 1, 0, 1, 0, 0]]),
        visual_index=np.int32([[-1, -1, 0, 1, -1, 2, -1, -1]]),
        vision=None,
    )
    classes = np.where(np.isin(order, [0, 6]), SINK, batch.token_class)
    moved, columns = arrange(batch, 4, 6, classes)
    np.testing.assert_array_equal(columns, [[-1, 2, 3, 5, -1, 0, 6, 1, 4, 7]])
    np.testing.assert_array_equal(moved.order, columns)
    np.testing.assert_array_equal(moved.visual_index, [[-1, 0, 1, 2, -1, -1, -1, -1, -1, -1]])


def test_the_layout_follows_the_model_and_can_be_chosen() -> None:
    expert, plain = (golden_model(f"{name}/public")[1] for name in ("cogvlm2", "qwen2_vl"))
    assert [uses_aifs(m, "auto") for m in (expert, plain)] == [True, False]
    assert uses_aifs(plain, "aifs") and not uses_aifs(expert, "masked")
    with pytest.raises(UserError, match="expected one of auto, masked, aifs"):
        uses_aifs(plain, "front")


def test_misuse_is_refused() -> None:
    order = np.arange(4, dtype=np.int32)[None]
    batch = Batch(order, order, order[None], order * 0 + 1, order, None)
    with pytest.raises(ValueError, match="4 visual tokens in a row, but 3 visual slots"):
        arrange(batch, 3, 4)
    with pytest.raises(ValueError, match="chunks first"):
        chunks(arrange(batch)[0], 2)
