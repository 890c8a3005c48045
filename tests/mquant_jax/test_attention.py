"""Attention computed in parts, over queries or heads, equals attention in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.nn.cache import NEVER, key_order
from mquant_jax.nn.rope import apply_rope
from mquant_jax.numerics import quantize_dynamic, quantize_static
from mquant_jax.ops.attention import attend, attend_rows, split_heads
from mquant_jax.ops.visibility import Visibility
from mquant_jax.target import tracing_for
from tests.helpers import cpu_target


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_parts_make_the_whole(batch, with_prefix) -> None:
    rng = np.random.default_rng(0)
    t, s, d = 150, 170, 8

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = draw(batch, 4, t, d), draw(batch, 2, d, s), draw(batch, 2, s, d)
    prefix = (draw(2, 3, d), draw(2, 3, d)) if with_prefix else None
    own, keys = (jnp.tile(jnp.arange(n, dtype=jnp.int32), (batch, 1)) for n in (t, s))
    for seen in (Visibility(own, keys), Visibility.of_keys(keys >= 0, t)):
        whole = attend(q, k, v, seen, prefix)
        with tracing_for(cpu_target(most_logits=1000, part_logits=1000)):
            got = attend(q, k, v, seen, prefix)
        np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [30, 150, 600])
def test_keys_behind_a_block_of_queries_are_not_missed(t) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((2, 4, t, 8), (2, 2, 8, t), (2, 2, t, 8))
    )
    own = jnp.maximum(jnp.arange(t, dtype=jnp.int32) - jnp.asarray([[0], [11]]), -1)
    keys = key_order(own, jnp.zeros_like(own))
    plain = attend(q, k, v, Visibility(own, keys))
    got = attend(q, k, v, Visibility(own, keys, after=0))
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1, 11:], plain[1, 11:], rtol=1e-5, atol=1e-6)
    assert np.isfinite(got).all()  # also queries that see no key


def test_int8_keys_and_values_are_what_they_stand_for() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((1, 4, 70, 8), (1, 2, 8, 90), (1, 2, 90, 8))
    )
    k8, v8 = quantize_dynamic(k, axis=-2), quantize_dynamic(v)
    assert k8.scale.shape == (1, 2, 1, 90)
    seen = Visibility.of_keys(jnp.ones((1, 90), bool), 70)
    expected = attend(q, k8.dequantize(), v8.dequantize(), seen)
    np.testing.assert_allclose(attend(q, k8, v8, seen), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [2**21, 60_000, 1000])
@pytest.mark.parametrize("ordered", [True, False])
def test_rows_are_attended_to_as_heads_are(ordered, most) -> None:
    """``attend_rows`` equals ``attend`` with padding, partial rope, gains and static scales."""
    rng = np.random.default_rng(3)
    b, t, heads, kv_heads, d = 4, 70, 6, 2, 8

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = (draw(b, t, n * d) for n in (heads, kv_heads, kv_heads))
    angles, gain = draw(b, t, 3), 1 + draw(b, t) / 4
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (b, t, 1)), jnp.float32)
    order = np.tile(np.arange(t) if ordered else rng.permutation(t), (b, 1))
    order[1, order[1] < 5] = -1
    real, order = order >= 0, jnp.asarray(order, jnp.int32)
    seen = Visibility(order, key_order(order, order), after=0 if ordered else None)
    split = [split_heads(x, d) for x in (q, k, v)]
    turned_q, turned_k = apply_rope(split[0], angles), apply_rope(split[1], angles)
    expected = attend(
        turned_q * gain[:, None, :, None], jnp.swapaxes(turned_k, 2, 3), split[2], seen
    )  # fmt: skip

    def rows(*args, **options):
        with tracing_for(cpu_target(most_logits=2 * most, part_logits=most)):
            return attend_rows(*args, **options)

    got = rows(q, k, v, d, seen, angles, gain)
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.isfinite(got).all()
    q8 = rows(q, k, v, d, seen, angles, gain, scale)
    assert q8.values.dtype == jnp.int8
    step = np.asarray(q8.values, float) - np.asarray(quantize_static(got, scale).values, float)
    assert np.abs(step).max() <= 1  # rounding of values halfway between integers
    slope = jax.grad(lambda x: rows(q, x, v, d, seen)[real].sum())

    def by_heads(x):
        return attend(split[0], jnp.swapaxes(split_heads(x, d), 2, 3), split[2], seen)[real].sum()

    np.testing.assert_allclose(slope(k), jax.grad(by_heads)(k), rtol=1e-4, atol=1e-5)


def test_where_all_see_all_no_mask_is_looked_at() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 80, 32)), jnp.float32) for _ in range(3))
    zero = jnp.zeros((2, 80), jnp.int32)
    whole = attend_rows(q, k, v, 8, Visibility(zero, zero))
    heads = [split_heads(x, 8) for x in (q, k, v)]
    seen = Visibility.of_keys(zero == 0, 80)
    expected = attend(heads[0], jnp.swapaxes(heads[1], 2, 3), heads[2], seen)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
    hidden = zero.at[1, 3:9].set(NEVER)  # one of the rows has padding
    some = attend_rows(q, k, v, 8, Visibility(zero, hidden))
    np.testing.assert_allclose(some[0], expected[0], rtol=1e-5, atol=1e-6)
    left = np.delete(np.asarray(k[1]), np.s_[3:9], 0), np.delete(np.asarray(v[1]), np.s_[3:9], 0)
    alone = attend_rows(
        q[1:], *(jnp.asarray(np.pad(x, ((0, 6), (0, 0))))[None] for x in left), 8,
        Visibility(zero[1:], zero[1:].at[0, 74:].set(NEVER)),
    )  # fmt: skip
    np.testing.assert_allclose(some[1], alone[0], rtol=1e-4, atol=1e-5)
