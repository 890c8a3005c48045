"""Device code as pure functions over pytrees.

:func:`prefill`, :func:`extend` and :func:`decode` are the interface for users' JAX programs.
:class:`mquant_jax.runtime.generate.Generator` compiles the functions below them: :func:`see` turns
pictures into features, :func:`read` prompts into cache entries, :func:`insert` writes entries into
the rows of a batch, and :func:`run` decodes. Features and entries are passed in pieces of
:data:`mquant_jax.runtime.buckets.PIECE` tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.cache import NEVER, KVCache, Store, put_at
from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime.buckets import PIECE, pieces
from mquant_jax.runtime.sampling import RowSampling, sample


@partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "order", "position"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding, all that a decode step needs besides the token.

    Attributes:
        cache: the KV cache.
        order: int32 ``[B]``, index of the next token in its sequence.
        position: int32 ``[B]``, its rotary position.
    """

    cache: KVCache
    order: jax.Array
    position: jax.Array


def prefill(
    model: VLM, batch: Batch, slots: int, int8_cache: bool = False
) -> tuple[jax.Array, DecodeState]:
    """Run the prompts. Pure; jit it with ``slots`` and ``int8_cache`` static.

    Args:
        slots: cache length: padded prompt plus new tokens.
        int8_cache: store keys and values as int8 with a scale per token and head.

    Returns:
        Logits of the next token, float32 ``[B, vocab]``, and the state to continue from.
    """
    hidden, state = _fresh(model, batch, slots, int8_cache)
    return model.language.logits(hidden), state


def extend(
    model: VLM, batch: Batch, state: DecodeState, visual: jax.Array | None = None
) -> tuple[jax.Array, DecodeState]:
    """Run further prompt tokens: a next turn, or the next chunk of a long prompt. Pure.

    Args:
        batch: tokens whose order and positions continue the state's
            (:func:`mquant_jax.runtime.tokens.follow`).
        state: donate it; its cache needs as many free slots as ``batch`` has columns.
        visual: features of the batch's pictures, if already computed.
    """
    logits, cache = model.prefill(batch, state.cache, fresh=False, visual=visual)
    order = jnp.maximum(state.order, batch.lengths)
    return logits, DecodeState(cache, order, jnp.maximum(state.position, batch.next_position))


def decode(model: VLM, tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Run one token per row, int32 ``[B]``. Pure; jit it and donate ``state``."""
    logits, cache = model.decode(tokens, state.order, state.position, state.cache)
    return logits, DecodeState(cache, state.order + 1, state.position + 1)


def _fresh(
    model: VLM, batch: Batch, slots: int, int8_cache: bool, visual: jax.Array | None = None
) -> tuple[jax.Array, DecodeState]:
    """The last hidden state of each row, ``[B, hidden]``, and the state to continue from."""
    cache = model.language.init_cache(batch.input_ids.shape[0], slots, int8_cache)
    hidden, cache = model.read(batch, cache, visual=visual)
    return hidden, DecodeState(cache, batch.lengths, batch.next_position)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "hidden", "tokens", "count", "done"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Answers:
    """A batch that is being answered.

    Attributes:
        state: cache and positions.
        hidden: ``[B, hidden]``, the last hidden state of each prompt, which gives its first token.
        tokens: int32 ``[B, slots]``, the answers so far.
        count: int32 ``[B]``, their lengths.
        done: bool ``[B]``: the answer has ended, or the row is empty.
    """

    state: DecodeState
    hidden: jax.Array
    tokens: jax.Array
    count: jax.Array
    done: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pieces", "hidden", "order", "position", "span"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Entry:
    """One prefilled prompt.

    Attributes:
        pieces: its cache entries in order, each the keys, values and order of ``PIECE`` slots.
        hidden: ``[hidden]``, hidden state of its last token.
        order, position, span: int32 scalars, as in :class:`DecodeState` and ``KVCache``.
    """

    pieces: tuple[tuple[Store, Store, jax.Array], ...]
    hidden: jax.Array
    order: jax.Array
    position: jax.Array
    span: jax.Array


def see(model: VLM, vision: VisionInput) -> tuple[tuple[jax.Array, ...], ...]:
    """Pictures -> for each row, its visual features in pieces ``[PIECE, feature_width]``."""
    x = model.vision(vision).astype(model.language.dtype)
    count = pieces(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, count * PIECE - x.shape[1]), (0, 0)))
    return tuple(tuple(row.reshape(count, PIECE, -1)) for row in x)


def read(
    model: VLM, batch: Batch, features: tuple[jax.Array, ...], int8_cache: bool
) -> tuple[Entry, ...]:
    """Prefill prompts.

    Args:
        batch: without pictures; ``visual_index`` counts the rows of all ``features``.
        features: pieces ``[PIECE, feature_width]``, any number that holds the batch's.
    """
    visual = jnp.concatenate(features) if features else None
    hidden, state = _fresh(model, batch, batch.input_ids.shape[1], int8_cache, visual)
    return tuple(_entry(hidden, state, row) for row in range(hidden.shape[0]))


def _entry(hidden: jax.Array, state: DecodeState, row: int) -> Entry:
    cache = state.cache
    count = pieces(cache.slots)
    missing = count * PIECE - cache.slots

    def padded(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, missing)
        return jnp.pad(x, widths, constant_values=fill)

    def cut(x: jax.Array, i: int, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, i * PIECE, (i + 1) * PIECE, axis=axis)

    k, v = (
        jax.tree.map(lambda x, axis=axis: padded(x[:, row : row + 1], axis), store)
        for store, axis in ((cache.k, -1), (cache.v, -2))
    )
    order = padded(cache.order[row : row + 1], -1, NEVER)
    parts = tuple(
        (
            jax.tree.map(lambda x, i=i: cut(x, i, -1), k),
            jax.tree.map(lambda x, i=i: cut(x, i, -2), v),
            cut(order, i, -1),
        )
        for i in range(count)
    )
    return Entry(parts, hidden[row], state.order[row], state.position[row], cache.span[row])


def empty(model: VLM, rows: int, slots: int, int8_cache: bool, cursors: bool) -> Answers:
    """An empty batch.

    Args:
        cursors: answers begin where their prompts end; else all of them where the longest does.
    """
    zero = jnp.zeros((rows,), jnp.int32)
    cfg = model.language.cfg
    cache = model.language.init_cache(rows, slots, int8_cache)
    cache = dataclasses.replace(cache, cursor=zero) if cursors else cache
    return Answers(
        DecodeState(cache, zero, zero),
        jnp.zeros((rows, cfg.hidden_size), model.language.dtype),
        jnp.zeros((rows, slots), jnp.int32),
        zero,
        jnp.ones((rows,), bool),
    )


def insert(answers: Answers, entry: Entry, row: jax.Array, slot: jax.Array) -> Answers:
    """Write one piece of a prompt into a row and reset the row's answer; donate ``answers``.

    Args:
        entry: an entry of one piece.
        row, slot: int32 scalars, where the piece goes.
    """
    ((k, v, order),) = entry.pieces
    cache = answers.state.cache

    keys = jax.tree.map(lambda old, new: put_at(old, new, (0, row, 0, 0, slot)), cache.k, k)
    values = jax.tree.map(lambda old, new: put_at(old, new, (0, row, 0, slot, 0)), cache.v, v)
    cache = KVCache(
        keys, values, put_at(cache.order, order, (row, slot)),
        _cursor_after(cache, order, row, slot), cache.span.at[row].set(entry.span),
    )  # fmt: skip
    state = DecodeState(
        cache,
        answers.state.order.at[row].set(entry.order),
        answers.state.position.at[row].set(entry.position),
    )
    return Answers(
        state,
        answers.hidden.at[row].set(entry.hidden.astype(answers.hidden.dtype)),
        answers.tokens,
        answers.count.at[row].set(0),
        answers.done.at[row].set(False),
    )


def _cursor_after(cache: KVCache, order: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
    """The cursor after a new piece, whose ``order`` is ``[1, PIECE]``."""
    if not cache.cursor.ndim:
        return jnp.maximum(cache.cursor, slot + PIECE)
    held = jnp.where(order[0] != NEVER, jnp.arange(1, PIECE + 1, dtype=jnp.int32), 0)
    return cache.cursor.at[row].max(slot + jnp.max(held))


def begin(
    model: VLM,
    batch: Batch,
    slots: int,
    int8_cache: bool = False,
    visual: jax.Array | None = None,
) -> Answers:
    """Prefill a whole batch in one program; rows without tokens are done.

    Args:
        visual: features of the batch's pictures, if already computed.
    """
    hidden, state = _fresh(model, batch, slots, int8_cache, visual)
    zero = jnp.zeros_like(state.order)
    tokens = jnp.zeros((len(zero), slots), jnp.int32)
    return Answers(state, hidden, tokens, zero, state.order == 0)


def run(
    model: VLM, answers: Answers, until: jax.Array, how: RowSampling, stop_ids: tuple[int, ...]
) -> Answers:
    """Decode until each row has stopped or has ``until`` tokens, int32 ``[B]``; donate ``answers``.

    Finished rows repeat their last token, in slots that are never read.
    """
    rows = jnp.arange(answers.tokens.shape[0], dtype=jnp.int32)

    def active(a: Answers) -> jax.Array:
        return ~a.done & (a.count < until)

    def draw(a: Answers, logits: jax.Array, on: jax.Array) -> tuple[jax.Array, ...]:
        token = sample(logits, how, a.count)
        column = jnp.where(on, a.count, a.tokens.shape[1])  # out of range: dropped
        tokens = a.tokens.at[rows, column].set(token, mode="drop")
        return tokens, a.count + on, a.done | (on & _stops(token, stop_ids))

    def with_drawn(a: Answers, drawn: tuple[jax.Array, ...]) -> Answers:
        tokens, count, done = drawn
        return dataclasses.replace(a, tokens=tokens, count=count, done=done)

    def body(a: Answers) -> Answers:
        last = a.tokens[rows, jnp.maximum(a.count - 1, 0)]
        logits, state = decode(model, last, a.state)
        drawn = draw(a, logits, active(a))
        return with_drawn(dataclasses.replace(a, state=state), drawn)

    new = active(answers) & (answers.count == 0)
    first = jax.lax.cond(
        jnp.any(new),
        lambda: draw(answers, model.language.logits(answers.hidden), new),
        lambda: (answers.tokens, answers.count, answers.done),
    )
    return jax.lax.while_loop(lambda a: jnp.any(active(a)), body, with_drawn(answers, first))


def force(
    model: VLM, answers: Answers, tokens: jax.Array, first: bool
) -> tuple[jax.Array, Answers]:
    """Continue with given tokens, int32 ``[B]``; donate ``answers``.

    Args:
        first: ignore ``tokens`` and score the first token after the prompts.

    Returns:
        Log-probabilities of the next token, float32 ``[B, vocab]``.
    """
    if first:
        logits, state = model.language.logits(answers.hidden), answers.state
    else:
        logits, state = decode(model, tokens, answers.state)
    expected = jax.nn.log_softmax(logits.astype(jnp.float32))
    return expected, dataclasses.replace(answers, state=state)


def _stops(tokens: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32))
