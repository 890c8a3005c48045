"""The engine's device state and what runs on it, as pure functions over pytrees.

A fixed number of rows, the decode slots, each with a request of its own: prompts enter a row chunk
by chunk (:func:`read_chunk`) while other rows decode (:func:`step`). A row's tokens stand in its
cache from column 0 on, without gaps, and each row has its own cursor.

A row that is not decoding still takes part in :func:`step`, whose result for it is dropped. What
that writes into its cache stands at its cursor, and whatever comes next is written over it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.cache import NEVER, KVCache, Store, put_at
from mquant_jax.numerics import AnyArray
from mquant_jax.runtime.sampling import RowPenalties, RowSampling, penalised, sample
from mquant_jax.runtime.steps import DecodeState, decode


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampling", "penalties", "order", "position", "prompt"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Start:
    """What a row needs beside its cache when its answer begins; every array for one row, or for
    all of them.

    Attributes:
        sampling, penalties: how its tokens are drawn.
        order, position: int32 ``[B]``, as in :class:`DecodeState`.
        prompt: bool ``[B, vocab]``, the tokens that its prompt holds.
    """

    sampling: RowSampling
    penalties: RowPenalties
    order: Any
    position: Any
    prompt: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "start", "token", "count", "counts"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """All rows.

    Attributes:
        cache: with a cursor ``[B]``.
        start: as it was given, but for ``order`` and ``position``, which go on with the answer.
        token: int32 ``[B]``, the last token of each answer.
        count: int32 ``[B]``, tokens of the answers so far.
        counts: int32 ``[B, vocab]``, how often an answer holds each token.
    """

    cache: KVCache
    start: Start
    token: jax.Array
    count: jax.Array
    counts: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "order"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of one row of a cache: keys ``[layers, 1, kv_heads, d, T]``, values
    ``[layers, 1, kv_heads, T, d]``, order ``[1, T]``."""

    k: Store
    v: Store
    order: jax.Array


def empty_slots(model: VLM, rows: int, slots: int, int8_cache: bool) -> Slots:
    """Rows without a request."""
    zero, vocab = jnp.zeros((rows,), jnp.int32), model.language.cfg.vocab_size
    off = jnp.zeros((rows,), jnp.float32)
    cache = model.language.init_cache(rows, slots, int8_cache)
    start = Start(
        RowSampling(off, zero, off + 1, jnp.zeros((rows, 2), jnp.uint32), zero),
        RowPenalties(off + 1, off, off),
        zero,
        zero,
        jnp.zeros((rows, vocab), bool),
    )
    counts = jnp.zeros((rows, vocab), jnp.int32)
    return Slots(dataclasses.replace(cache, cursor=zero), start, zero, zero, counts)


def read_chunk(
    model: VLM,
    slots: Slots,
    batch: Batch,
    features: tuple[jax.Array, ...],
    row: jax.Array,
    start: jax.Array,
    span: jax.Array,
    reach: int,
    int8_cache: bool,
) -> tuple[Slots, jax.Array]:
    """Run a chunk of a prompt into a row; donate ``slots``.

    Args:
        batch: one row, padded on its right, without pictures; ``visual_index`` counts the rows of
            all ``features``.
        features: pieces ``[PIECE, feature_width]``, any number that holds the batch's.
        row, start, span: int32 scalars: the row, the column of the first token, and rotary
            positions of the whole prompt.
        reach: columns that may hold what the chunk sees, itself included; 0 for a first chunk.

    Returns:
        The slots, and the hidden state of the chunk's last token, ``[1, hidden]``.
    """
    width = batch.order.shape[1]
    visual = jnp.concatenate(features) if features else None
    if reach:
        seen = take(slots, row, jnp.int32(0), reach)
        cache = KVCache(seen.k, seen.v, seen.order, start, span[None])
    else:
        cache = model.language.init_cache(1, width, int8_cache)
        cache = dataclasses.replace(cache, span=span[None])
    hidden, cache = model.read(batch, cache, fresh=not reach, visual=visual)
    new = _columns(cache, jnp.int32(0), start if reach else jnp.int32(0), width)
    tokens = jnp.sum(batch.order >= 0, dtype=jnp.int32)
    return _put(slots, new, row, start, tokens, span), hidden


def take(slots: Slots, row: jax.Array, start: jax.Array, width: int) -> Columns:
    """``width`` columns of a row, from ``start`` on."""
    return _columns(slots.cache, row, start, width)


def give(slots: Slots, columns: Columns, row: jax.Array, start: jax.Array, span: jax.Array):
    """The slots with columns that a row of the same prompt had; donate ``slots``."""
    return _put(slots, columns, row, start, jnp.int32(columns.order.shape[1]), span)


def _columns(cache: KVCache, row: jax.Array, start: jax.Array, width: int) -> Columns:
    def cut(x: jax.Array, rows: int, columns: int) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(x, row, 1, rows)
        return jax.lax.dynamic_slice_in_dim(x, start, width, columns)

    keys = jax.tree.map(lambda x: cut(x, 1, 4), cache.k)
    values = jax.tree.map(lambda x: cut(x, 1, 3), cache.v)
    return Columns(keys, values, cut(cache.order, 0, 1))


def _put(
    slots: Slots, new: Columns, row: jax.Array, start: jax.Array, tokens: jax.Array, span: jax.Array
) -> Slots:
    """``new`` in a row from column ``start`` on, of which ``tokens`` are no padding."""
    cache = slots.cache
    keys = jax.tree.map(lambda x, y: put_at(x, y, (0, row, 0, 0, start)), cache.k, new.k)
    values = jax.tree.map(lambda x, y: put_at(x, y, (0, row, 0, start, 0)), cache.v, new.v)
    # A first chunk also makes all unseen that the row held before.
    order = jax.lax.dynamic_slice_in_dim(cache.order, row, 1)
    order = put_at(jnp.where(start == 0, NEVER, order), new.order, (0, start))
    cache = KVCache(
        keys, values, put_at(cache.order, order, (row, 0)),
        cache.cursor.at[row].set(start + tokens), cache.span.at[row].set(span),
    )  # fmt: skip
    return dataclasses.replace(slots, cache=cache)


def begin(
    model: VLM, slots: Slots, hidden: jax.Array, row: jax.Array, start: Start
) -> tuple[Slots, jax.Array]:
    """Draw the first token of a row whose prompt is in the cache; donate ``slots``.

    Args:
        hidden: ``[1, hidden]``, of the prompt's last token.
        start: of the row, arrays ``[1, ...]``.

    Returns:
        The slots, and the token, int32 ``[1]``.
    """
    none = jnp.zeros((1, slots.counts.shape[1]), jnp.int32)
    first = jnp.zeros((1,), jnp.int32)
    token = _draw(model.language.logits(hidden), start, none, first)

    def put(old: jax.Array, new: AnyArray) -> jax.Array:
        return put_at(old, jnp.asarray(new), (row, *[0] * (old.ndim - 1)))

    return dataclasses.replace(
        slots,
        start=jax.tree.map(put, slots.start, start),
        token=put(slots.token, token),
        count=put(slots.count, first + 1),
        counts=put(slots.counts, none.at[0, token[0]].set(1)),
    ), token


def step(
    model: VLM, slots: Slots, active: jax.Array, rows: jax.Array | None = None
) -> tuple[Slots, jax.Array]:
    """One more token for each row that is ``active``, bool ``[R]``; donate ``slots``.

    Args:
        rows: int32 ``[R]``, all different: the rows that take part, on CPU alone; ``None``: all.

    Returns:
        The slots, and the tokens of those rows, int32 ``[R]``.
    """
    old = slots.cache
    some = slice(None) if rows is None else rows
    start, last, count = _at(slots.start, some), slots.token[some], slots.count[some]
    order = jnp.where(active, start.order, -1)  # as padding, which sees nothing and is not seen
    cache = KVCache(old.k, old.v, old.order, old.cursor[some], old.span[some], rows)
    logits, state = decode(model, last, DecodeState(cache, order, start.position))
    drawn = _draw(logits, start, slots.counts, count, rows)
    on = active.astype(jnp.int32)
    token = jnp.where(active, drawn, last)
    place = jnp.arange(on.shape[0], dtype=jnp.int32) if rows is None else rows
    return Slots(
        dataclasses.replace(
            state.cache, cursor=old.cursor.at[some].add(on), span=old.span, rows=None
        ),
        dataclasses.replace(
            slots.start,
            order=slots.start.order.at[some].add(on),
            position=slots.start.position.at[some].add(on),
        ),
        slots.token.at[some].set(token),
        slots.count.at[some].add(on),
        slots.counts.at[place, token].add(on),
    ), token


def _at(start: Start, rows: slice | jax.Array) -> Start:
    """Of some rows; ``prompt`` stays whole, it is large and seldom read."""
    some = jax.tree.map(lambda x: x[rows], dataclasses.replace(start, prompt=None))
    return dataclasses.replace(some, prompt=start.prompt)


def _draw(logits: jax.Array, start: Start, counts: jax.Array, draw: jax.Array, rows=None):
    """``rows``: those of ``counts`` and of the prompts that are drawn for, if not all."""
    logits = penalised(logits, start.penalties, start.prompt, counts, rows)
    return sample(logits, start.sampling, draw)
