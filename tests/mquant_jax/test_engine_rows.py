"""Chunked prefill gives the reference's tokens in every family."""

import dataclasses

import numpy as np
import pytest

from mquant_jax.nn.rope import DynamicScaling, SteppedScaling, multi_axis_angles
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.prefill import plan
from mquant_jax.runtime.prompts import on_host
from mquant_jax.runtime.requests import Clock, Request, RequestOptions
from mquant_jax.runtime.reuse import Kept, digest
from mquant_jax.runtime.rows import Rows, Work, start_of
from mquant_jax.runtime.text_stream import TextStream
from tests.helpers import golden_model, mostly_slow

CASES = [
    "qwen2_vl/public", "qwen2_vl/public_video", "internvl2/public", "internvl2/public_qwen2",
    "internvl/public", "internvl/public_qwen3", "llava/public", "minicpmv2_6/public",
    "qwen_vl/public", "glm4v/public", "cogvlm2/public", "llama/public", "qwen2/public",
    "qwen3_vl/public", "qwen3_vl/public_video",
]  # fmt: skip

FAST = ["minicpmv2_6/public", "cogvlm2/public", "llama/public", "qwen3_vl/public_video"]


def one_row(batch, row: int):
    """One row of a batch, with all pictures of the batch."""
    at = slice(row, row + 1)
    return dataclasses.replace(
        batch, input_ids=batch.input_ids[at], order=batch.order[at],
        positions=batch.positions[:, at], token_class=batch.token_class[at],
        visual_index=batch.visual_index[at],
    )  # fmt: skip


@pytest.mark.parametrize("case", mostly_slow(CASES, *FAST))
def test_chunks_give_the_reference(case) -> None:
    family, model, config, inputs, outputs = golden_model(case)
    batch = on_host(family.reference_batch(config, inputs))
    greedy = outputs["greedy"]
    rows = Rows(Generator(model, (-1,)), 3, 96, 16, 1 << 24)
    for _ in range(2):  # the second time from the prefix cache
        assert answers(rows, batch, greedy.shape[1]) == greedy.tolist()
    assert rows.counts["reused_tokens"] >= 16


def answers(rows: Rows, batch, limit: int) -> list[list[int]]:
    """Tokens that the engine's rows generate for each row of a batch."""
    model = rows.generator.model
    works = [work(model, one_row(batch, i), limit) for i in range(len(batch.order))]
    for each in works:
        rows.admit(each)
    while rows.works():
        rows.turn()
    return [each.text.ids for each in works]


def test_an_int8_cache() -> None:
    family, model, config, inputs, outputs = golden_model("qwen2_vl/public")
    batch = on_host(family.reference_batch(config, inputs))
    rows = Rows(Generator(model, (-1,), kv_cache="int8"), 3, 96, 16, 1 << 24)
    first = answers(rows, batch, 8)
    assert np.mean(np.asarray(first) == outputs["greedy"]) > 0.8
    assert answers(rows, batch, 8) == first and rows.counts["reused_tokens"] >= 16


def test_dynamic_rope_is_a_row_s_own() -> None:
    """The base depends on each row's own length, not on the longest row's."""
    positions = np.tile(np.arange(40, dtype=np.int32), (1, 2, 1))
    positions[:, 1] = np.minimum(positions[:, 1], 9)
    scaling = DynamicScaling(2.0, 16)
    both = multi_axis_angles(positions, 8, 100.0, (0,) * 4, scaling)
    for row in range(2):
        alone = multi_axis_angles(positions[:, row : row + 1], 8, 100.0, (0,) * 4, scaling)
        np.testing.assert_array_equal(both[row], alone[0])
    # A chunk uses the base of its whole prompt, and so do decoded tokens up to that length.
    length = np.full(2, 64, np.int32)
    chunk = multi_axis_angles(positions, 8, 100.0, (0,) * 4, scaling, length)
    whole = np.tile(np.arange(64, dtype=np.int32), (1, 1, 1))
    np.testing.assert_array_equal(
        chunk[0], multi_axis_angles(whole, 8, 100.0, (0,) * 4, scaling)[0, :40]
    )


@pytest.mark.parametrize("case", ["internvl2/public", "qwen_vl/public"])
def test_chunks_of_prompts_beyond_the_trained_length(case) -> None:
    """Length-dependent rope uses the whole prompt's length in every chunk."""
    family, model, config, inputs, outputs = golden_model(case)
    scaling = DynamicScaling(2.0, 8) if case.startswith("internvl2") else SteppedScaling(8)
    model.language.cfg = dataclasses.replace(model.language.cfg, rope_scaling=scaling)
    batch = on_host(family.reference_batch(config, inputs))
    # One row at a time, because the engine also prefills rows one at a time.
    expected = [
        Generator(model, (-1,)).generate(one_row(batch, i), 8).tokens[0]
        for i in range(len(batch.order))
    ]
    rows = Rows(Generator(model, (-1,)), 3, 96, 16, 1 << 24)
    assert answers(rows, batch, 8) == answers(rows, batch, 8) == expected
    assert expected != outputs["greedy"][:, :8].tolist()


def work(model, batch, limit: int) -> Work:
    made, options = plan(model, batch, 16), RequestOptions()
    return Work(
        Request(made.columns, options, lambda: None), made, start_of(made, options), limit,
        TextStream(lambda ids: ""), Clock(),
    )  # fmt: skip


def test_what_is_kept_is_the_latest() -> None:
    kept, one = Kept(3 * 400), np.zeros(100, np.float32)
    for name in (b"a", b"b", b"c"):
        kept.put(name, (one,))
    assert kept.get(b"a") is not None
    kept.put(b"d", (one,))
    assert kept.get(b"b") is None and kept.bytes == 1200 and len(kept) == 3
    kept.put(b"too large", (np.zeros(1000, np.float32),))
    assert kept.get(b"too large") is None and kept.get(b"a") is not None


def test_keys_tell_contents_apart() -> None:
    x = np.arange(6, dtype=np.int32)
    keys = {digest(x), digest(x.reshape(2, 3)), digest(x.astype(np.float32)), digest(x[:5]),
            digest(x[:3], x[3:]), digest(x, None), digest()}  # fmt: skip
    assert len(keys) == 7 and digest(x) == digest(x.copy())
