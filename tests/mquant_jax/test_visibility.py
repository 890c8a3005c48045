"""Visibility intervals against explicit masks, in every implementation of attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.nn.vit_block import VisionContext
from mquant_jax.nn.windows import Windows
from mquant_jax.numerics import quantize_dynamic
from mquant_jax.ops.attention import CACHE, HEADS, ROWS, attend, attend_cache, attend_rows
from mquant_jax.ops.band import Band
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.target import tracing_for
from tests.helpers import cpu_target, interpreting, mostly_slow, relative

B, T, HEADS_KV, D = 2, 330, (2, 1), 64
PADDING = np.array([0, 11])  # per row, before the text or after the picture


class Case(NamedTuple):
    """A visibility and its mask, bool ``[B, T, T]``; rows of padding queries are undefined."""

    seen: Visibility
    mask: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.mask.any(-1)


def ints(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def text(window: int | None = None, moved: bool = False, hints: bool = True) -> Case:
    """A causal prompt after left padding; ``moved`` shuffles the tokens, like AIFS."""
    place = np.arange(T) - PADDING[:, None]
    if moved:
        place = np.random.default_rng(5).permuted(place, axis=1)
    distance = place[:, :, None] - place[:, None]
    mask = (distance >= 0) & (place >= 0)[:, None] & (place >= 0)[..., None]
    mask &= distance < (window or T)
    keys = np.where(place < 0, NEVER, place)
    low = None if window is None else ints(place - window + 1)
    before = None if window is None or not hints else window - 1
    return Case(Visibility(ints(np.maximum(place, -1)), ints(keys), low, before,
                           0 if hints else None), mask)  # fmt: skip


def picture_in_text() -> Case:
    """Tokens 100 to 179 of a causal prompt see each other."""
    plain = text(hints=False)
    place = np.arange(T) - PADDING[:, None]
    inside = (100 <= place) & (place < 180)
    top = np.where(inside, 179, plain.seen.top)
    mask = plain.mask | (inside[:, :, None] & inside[:, None])
    return Case(Visibility(ints(top), plain.seen.keys), mask)


def windows() -> Case:
    """Pictures of 22 x 15 and 29 x 11 patches in windows of 4 x 4."""
    coords = np.zeros((B, T, 2), np.int32)
    valid = np.zeros((B, T), bool)
    for row, (h, w) in enumerate(((22, 15), (29, 11))):
        coords[row, : h * w] = np.indices((h, w)).reshape(2, -1).T
        valid[row, : h * w] = True
    made = Windows.of(coords, ints(np.where(valid, 0, -1)), 4)
    cells, valid = (np.asarray(made.sort(x)) for x in (coords // 4, valid))
    mask = (cells[:, :, None] == cells[:, None]).all(-1) & valid[:, None] & valid[..., None]
    return Case(made.inside, mask)


def one_of_a_loop(full: bool) -> Case:
    """The windows inside a layer loop in which ``full`` layers see whole pictures."""
    seen, mask = windows()
    valid = np.asarray(seen.keys != NEVER)
    ctx = VisionContext(None, ints(np.where(valid, 0, -1)), seen, jnp.asarray([full]))
    every = valid[:, None] & valid[..., None]
    return Case(ctx.at_layer(0).seen, every if full else mask)


def picture() -> Case:
    valid = np.arange(T) < T - PADDING[:, None]
    return Case(
        Visibility.of_keys(jnp.asarray(valid), T), np.broadcast_to(valid[:, None], (B, T, T))
    )


CASES: dict[str, Callable[[], Case]] = {
    "causal": text,
    "causal, unknown": partial(text, hints=False),
    "sliding": partial(text, 40),
    "sliding over most": partial(text, 250),
    "sliding, unknown": partial(text, 40, hints=False),
    "moved": partial(text, moved=True, hints=False),
    "moved, sliding": partial(text, 40, moved=True, hints=False),
    "picture in text": picture_in_text,
    "windows": windows,
    "windows in a loop": partial(one_of_a_loop, False),
    "full in a loop": partial(one_of_a_loop, True),
    "picture": picture,
}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()


def rows_of(rng) -> list[jax.Array]:
    heads, kv = HEADS_KV
    return [jnp.asarray(rng.normal(size=(B, T, n * D)), jnp.float32) for n in (heads, kv, kv)]


def split(q, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split rows into heads; keys get the layout ``[B, heads, d, S]``."""
    q, k, v = (x.reshape(B, -1, x.shape[-1] // D, D) for x in (q, k, v))
    return q.swapaxes(1, 2), jnp.moveaxis(k, 1, 3), v.swapaxes(1, 2)


def dense(q, k, v, mask) -> np.ndarray:
    """Reference attention in float64: rows ``[B, T or S, heads * d]``, mask bool ``[B, T, S]``."""
    q, k, v = (np.asarray(x, np.float64) for x in split(q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.where(mask[:, None], q @ k / np.sqrt(D), -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1)


REPEATED = ("causal, unknown", "sliding over most", "sliding, unknown")


@pytest.fixture(params=mostly_slow([*CASES], *CASES.keys() - {*REPEATED}), name="case")
def _case(request) -> Case:
    return case_of(request.param)


def test_an_interval_is_a_mask(case) -> None:
    real = case.real
    np.testing.assert_array_equal(np.asarray(case.seen.mask)[real], case.mask[real])
    assert bool(case.seen.sees_all) == bool(np.asarray(case.seen.mask).all())
    columns, lifted = np.arange(T), case.seen.lifted is not None and bool(case.seen.lifted.all())
    ahead = columns - columns[:, None]
    if case.seen.after is not None and not lifted:
        assert not (case.mask & (ahead > case.seen.after)).any()
    if case.seen.before is not None and not lifted:
        assert not (case.mask & (-ahead > case.seen.before)).any()


@pytest.mark.parametrize("size", [1, 64, 128])
def test_no_key_that_is_skipped_is_seen(case, size) -> None:
    first, end = (np.asarray(x).repeat(size, 1)[:, :T, None] for x in case.seen.key_range(size))
    assert (first >= 0).all() and (first < end).all() and (end <= T).all()
    column = np.arange(T)
    assert not (((column < first) | (end <= column)) & case.mask).any()


def test_blocks_of_a_window_are_found() -> None:
    """Skipping is effective: of 330 patches, a block of 64 only reads those nearby."""
    first, end = case_of("windows").seen.key_range(64)
    assert (np.asarray(end - first) <= 64 + 15 + 15).all()
    first, end = case_of("sliding, unknown").seen.key_range(64)
    assert (np.asarray(end - first)[0] <= 64 + 39).all()
    assert Band.of(T, case_of("windows").seen) == Band(64, 1, 1)
    assert Band.of(T, case_of("sliding").seen) == Band(64, 1, 0)
    assert Band.of(T, case_of("sliding over most").seen) is None


def test_on_cpu(case) -> None:
    """Row-wise and head-wise attention, in few and in many parts."""
    q, k, v = rows_of(np.random.default_rng(0))
    expected = dense(q, k, v, case.mask)

    def near(got) -> bool:
        return np.isfinite(got).all() and relative(got[case.real], expected[case.real]) < 1e-5

    with tracing_for(cpu_target()):
        assert near(jax.jit(lambda *x: attend_rows(*x, D, case.seen))(q, k, v))
    with tracing_for(cpu_target(most_logits=2**15, part_logits=2**14)):
        assert near(jax.jit(lambda *x: attend(*split(*x), case.seen))(q, k, v))


@pytest.mark.parametrize("name", ["causal", "sliding", "windows in a loop"])
def test_gradients(name) -> None:
    q, k, v = rows_of(np.random.default_rng(1))
    (seen, _), real = case_of(name), case_of(name).real

    def slope(form):
        return jax.jit(jax.grad(lambda k: (form(k)[real] ** 2).sum()))(k)

    every = Visibility(seen.top, seen.keys, seen.low)
    got = slope(lambda k: attend_rows(q, k, v, D, seen))
    assert relative(got, slope(lambda k: attend(*split(q, k, v), every))) < 1e-5


@pytest.mark.parametrize(("platform", "op", "form"), [
    ("gpu", HEADS, "flash_gpu"), ("gpu", HEADS, "xla"), ("tpu", ROWS, "pallas_tpu"),
])  # fmt: skip
def test_on_accelerators(case, platform, op, form) -> None:
    dtype = jnp.float32 if form == "xla" else jnp.bfloat16
    q, k, v = (x.astype(dtype) for x in rows_of(np.random.default_rng(2)))
    expected = dense(*(x.astype(jnp.float32) for x in (q, k, v)), case.mask)

    def run(q, k, v):
        if op is ROWS:
            return attend_rows(q, k, v, D, case.seen)
        return attend(*split(q, k, v), case.seen)

    with interpreting(platform) as ran:
        got = jax.jit(run)(q, k, v)
    assert [(c.op, c.name) for c in ran] == [(op.name, form)]
    got = np.asarray(got, np.float32)
    assert np.isfinite(got).all() and relative(got[case.real], expected[case.real]) < 0.01


# Sliding window, int8 entries, number of queries.
CACHES = [*itertools.product((None, 40), (False, True), (1, 70))]
PAIRS = [(None, False, 1), (None, True, 70), (40, False, 70), (40, True, 1)]


@pytest.mark.parametrize("options", mostly_slow(CACHES, *PAIRS), ids=str)
def test_a_cache(options) -> None:
    """The last tokens of a prompt attend to a cache with some empty slots."""
    window, narrow, tokens = options
    whole, rng, slots = text(window), np.random.default_rng(3), T + 20
    q, k, v = rows_of(rng)
    q, mask = q[:, -tokens:], whole.mask[:, -tokens:]
    expected = dense(q, k, v, mask)
    free = ((0, 0), (0, slots - T))
    keys = jnp.pad(whole.seen.keys, free, constant_values=NEVER)
    low = None if window is None else whole.seen.low[:, -tokens:]
    seen = Visibility(whole.seen.top[:, -tokens:], keys, low)
    heads, *stores = split(q, *(jnp.pad(x, (*free, (0, 0))) for x in (k, v)))
    stores = [jnp.stack([x * 0, x]) for x in stores]
    if narrow:
        stores = [quantize_dynamic(stores[0], axis=-2), quantize_dynamic(stores[1])]
    layer, used = jnp.int32(1), ints([T, T])
    runs = {"whole_layer": {}, "row_by_row": {"used": used}}
    for form, more in runs.items():
        with tracing_for(cpu_target()):
            got = attend_cache(heads, tuple(stores), layer, seen, **more)
        assert relative(got, expected) < (0.02 if narrow else 1e-5), form
    with interpreting("gpu") as ran:
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if not narrow else x, stores)
        got = attend_cache(heads.astype(jnp.bfloat16), tuple(half), layer, seen)
    assert ran[0].op == CACHE.name
    assert ran[0].name == ("decode_gpu" if tokens == 1 else "whole_layer")
    assert relative(np.asarray(got, np.float32), expected) < 0.02
