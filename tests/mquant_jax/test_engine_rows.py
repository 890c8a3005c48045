"""Prompts in chunks, in every family: the reference's tokens, whatever the chunks are."""

import dataclasses

import numpy as np
import pytest

from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.prefill import plan
from mquant_jax.runtime.prompts import on_host
from mquant_jax.runtime.requests import Clock, Request, RequestOptions
from mquant_jax.runtime.reuse import Kept, digest
from mquant_jax.runtime.rows import Rows, Work
from mquant_jax.runtime.slots import Start
from mquant_jax.runtime.text_stream import TextStream
from tests.helpers import golden_model

CASES = [
    "qwen2_vl/public", "qwen2_vl/public_video", "internvl2/public", "internvl2/public_qwen2",
    "internvl/public", "internvl/public_qwen3", "llava/public", "minicpmv2_6/public",
    "qwen_vl/public", "glm4v/public", "cogvlm2/public", "llama/public", "qwen2/public",
]  # fmt: skip


def one_row(batch, row: int):
    """A row of a batch, with all of the batch's pictures."""
    at = slice(row, row + 1)
    return dataclasses.replace(
        batch, input_ids=batch.input_ids[at], order=batch.order[at],
        positions=batch.positions[:, at], token_class=batch.token_class[at],
        visual_index=batch.visual_index[at],
    )  # fmt: skip


@pytest.mark.parametrize("kv_cache", ["float"])
@pytest.mark.parametrize("case", CASES)
def test_chunks_give_the_reference(case, kv_cache) -> None:
    family, model, config, inputs, outputs = golden_model(case)
    batch = on_host(family.reference_batch(config, inputs))
    greedy = outputs["greedy"]
    generator = Generator(model, (-1,), kv_cache=kv_cache)
    rows = Rows(generator, 3, 96, 16, 1 << 24)
    for _ in range(2):  # the second time with what was kept
        works = []
        for i in range(len(greedy)):
            works.append(work(model, one_row(batch, i), greedy.shape[1]))
            rows.admit(works[-1])
        while rows.works():
            rows.turn()
        assert [w.text.ids for w in works] == greedy.tolist()
    assert rows.counts["reused_tokens"] >= 16


def work(model, batch, limit: int) -> Work:
    made = plan(model, batch, 16)
    return Work(
        Request(made.columns, RequestOptions(), lambda: None), made, start_of(made), limit,
        TextStream(lambda ids: ""), Clock(),
    )  # fmt: skip


def start_of(made) -> Start:
    from mquant_jax.runtime.engine import _start

    return _start(made, RequestOptions())


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
