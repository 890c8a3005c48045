"""The decode loop: greedy tokens of the reference, stop tokens, streaming, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.runtime.generate import Generator, decode, prefill
from mquant_jax.runtime.sampling import Sampling, per_row, sample
from tests.helpers import golden_qwen2_vl, relative


@pytest.fixture(scope="module", params=["public", "public_video"])
def case(request):
    model, config, inputs, outputs = golden_qwen2_vl(request.param)
    return model, FAMILY.reference_batch(config, inputs), outputs


def test_greedy_equals_the_reference(case) -> None:
    model, batch, outputs = case
    out = Generator(model, (-1,)).generate(batch, 8)
    assert np.array_equal(out.tokens, outputs["greedy"])
    assert out.stopped == [False, False] and out.steps == 7


def test_rows_stop_on_their_own(case) -> None:
    model, batch, outputs = case
    stop = int(outputs["greedy"][0, 3])
    first = [row.tolist().index(stop) if stop in row else 8 for row in outputs["greedy"]]
    out = Generator(model, (stop,)).generate(batch, 8)
    expected = [row[:n].tolist() for row, n in zip(outputs["greedy"], first, strict=True)]
    assert out.tokens == expected
    assert out.stopped == [n < 8 for n in first]


def test_streaming_gives_the_same_tokens(case) -> None:
    model, batch, outputs = case
    seen: list[np.ndarray] = []
    out = Generator(model, (-1,)).generate(batch, 8, on_tokens=seen.append)
    assert np.array_equal(np.stack(seen, axis=1), outputs["greedy"])
    assert np.array_equal(out.tokens, outputs["greedy"])


def test_the_pure_functions_follow_the_reference_logits(case) -> None:
    model, batch, outputs = case
    logits, state = jax.jit(prefill, static_argnums=2)(model, batch, 48)
    step = jax.jit(decode, donate_argnums=2)
    for i in range(8):
        assert relative(logits, outputs["greedy_logits"][:, i]) < 1e-5
        logits, state = step(model, jnp.asarray(outputs["greedy"][:, i]), state)


def test_an_int8_cache_is_close(case) -> None:
    model, batch, outputs = case
    logits, state = jax.jit(prefill, static_argnums=(2, 3))(model, batch, 48, True)
    step, store = jax.jit(decode, donate_argnums=2), state.cache.v
    assert store.values.dtype == jnp.int8 and store.scale.shape == (*store.values.shape[:-1], 1)
    assert state.cache.k.scale.shape == (*store.values.shape[:-2], 1, store.values.shape[-2])
    assert relative(logits, outputs["greedy_logits"][:, 0]) < 1e-5  # prefill attends in float
    for i in range(1, 8):
        logits, state = step(model, jnp.asarray(outputs["greedy"][:, i - 1]), state)
        assert 0 < relative(logits, outputs["greedy_logits"][:, i]) < 0.02
    out = Generator(model, (-1,), kv_cache="int8").generate(batch, 8)
    assert np.mean(np.asarray(out.tokens) == outputs["greedy"]) > 0.8
    with pytest.raises(UserError, match="kv_cache is 'int4'; known: float, int8"):
        Generator(model, (-1,), kv_cache="int4")


def test_sampling_is_repeatable_and_varies_with_the_key(case) -> None:
    model, batch, _ = case
    how = Sampling(temperature=2.0)
    g = Generator(model, (-1,))
    runs = [g.generate(batch, 8, how, jax.random.key(k)).tokens for k in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def draws(how: Sampling, logits: list[float], n: int = 2000) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    tokens = jax.jit(sample)(rows, per_row(how, None, n), jnp.zeros(n, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / n


def test_sampling_follows_the_distribution() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert np.allclose(draws(Sampling(1.0), logits), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    assert np.allclose(draws(Sampling(1.0, top_k=2), logits), [0.625, 0.375, 0, 0], atol=0.04)
    assert np.allclose(draws(Sampling(1.0, top_p=0.6), logits), [0.625, 0.375, 0, 0], atol=0.04)
    assert draws(Sampling(1.0, top_p=0.01), logits)[0] == 1
    assert draws(Sampling(0.05), logits)[0] > 0.99
    assert draws(Sampling(), logits)[0] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_options_are_named(options, words) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**options)
