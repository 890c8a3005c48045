"""Choosing the next token."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.numerics import AnyArray
from mquant_jax.validate import count, number

LEAST = 1e-6  # smallest divisor or threshold in float32; smaller values underflow


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it, at least 1e-6.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose total probability reaches it, at least 1e-6;
            1 keeps all.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_p = number(self.temperature, "temperature"), number(self.top_p, "top_p")
        if temperature != 0 and not LEAST <= temperature <= 1 / LEAST:
            raise UserError(f"temperature is {temperature}; expected 0 (greedy) or "
                            f"{LEAST:g} to {1 / LEAST:g}")  # fmt: skip
        if not LEAST <= top_p <= 1:
            raise UserError(f"top_p is {top_p}; expected {LEAST:g} to 1 (all tokens)")
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_k", count(self.top_k, "top_k", least=0))
        object.__setattr__(self, "top_p", top_p)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "key", "stream"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """:class:`Sampling` of each row as arrays, so that a new value compiles nothing.

    Attributes:
        temperature, top_p: float32 ``[B]``.
        top_k: int32 ``[B]``.
        key: uint32 ``[B, 2]``, the words of a threefry key.
        stream: int32 ``[B]``, distinguishes rows that share a key. Draw ``i`` of a row depends only
            on its key, its stream and ``i``, not on the rest of the batch.
    """

    temperature: AnyArray
    top_k: AnyArray
    top_p: AnyArray
    key: AnyArray
    stream: AnyArray


def per_row(how: Sampling, key: jax.Array | None, rows: int) -> RowSampling:
    """Host arrays with the same options and key for every row; row ``i`` has stream ``i``.

    Args:
        key: any JAX key, typed or raw; default key 0.
    """
    ones = np.ones(rows, np.float32)
    # A k beyond any vocabulary keeps every token.
    top_k = np.full(rows, min(how.top_k, np.iinfo(np.int32).max), np.int32)
    return RowSampling(
        ones * np.float32(how.temperature), top_k, ones * np.float32(how.top_p),
        np.tile(key_words(key), (rows, 1)), np.arange(rows, dtype=np.int32),
    )  # fmt: skip


def key_words(key: jax.Array | None) -> np.ndarray:
    """uint32 ``[2]``: the words of a key; longer keys are folded."""
    if key is None:
        return np.zeros(2, np.uint32)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(key) if typed else key, np.uint32)
    return np.bitwise_xor.reduce(words.reshape(-1, 2), axis=0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["repetition", "presence", "frequency"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RowPenalties:
    """Penalties on tokens that already occur in a row, float32 ``[B]``, as vLLM defines them.

    Attributes:
        repetition: of tokens in the prompt or answer, divides positive logits and multiplies
            others; 1 changes nothing.
        presence: subtracted from the logits of tokens in the answer.
        frequency: subtracted once per occurrence in the answer.
    """

    repetition: AnyArray
    presence: AnyArray
    frequency: AnyArray


def penalised(
    logits: jax.Array, penalties: RowPenalties, prompt: jax.Array, counts: jax.Array, rows=None
) -> jax.Array:
    """Logits after the penalties, float32 ``[B, vocab]``; unchanged if no row has a penalty.

    Args:
        prompt: bool ``[B, vocab]``, whether the token occurs in the row's prompt.
        counts: int32 ``[B, vocab]``, how often it occurs in the row's answer.
        rows: int32 ``[B]``, the rows of ``prompt`` and ``counts`` that these are, if not all.
    """
    repetition, presence, frequency = (
        x[:, None] for x in (penalties.repetition, penalties.presence, penalties.frequency)
    )

    def changed() -> jax.Array:
        asked, given = (prompt, counts) if rows is None else (prompt[rows], counts[rows])
        factor = jnp.where(asked | (given > 0), repetition, 1.0)
        x = jnp.where(logits > 0, logits / factor, logits * factor)
        return x - frequency * given - presence * (given > 0)

    some = (repetition != 1) | (presence != 0) | (frequency != 0)
    return jax.lax.cond(jnp.any(some), changed, lambda: logits)


def sample(logits: jax.Array, how: RowSampling, draw: jax.Array) -> jax.Array:
    """Sample a token per row: logits, float32 ``[B, vocab]``, -> int32 ``[B]``.

    ``top_p`` applies to probabilities after temperature and ``top_k``; the most likely token is
    always kept. If all rows are greedy, nothing is sorted or drawn.

    Args:
        draw: int32 ``[B]``, index of the draw within its row.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
        filtered = jnp.any((how.top_k > 0) | (how.top_p < 1))
        scaled = jax.lax.cond(filtered, _filtered, lambda x, _: x, scaled, how)
        tokens = jax.vmap(_categorical)(how.key, how.stream, draw, scaled)
        return jnp.where(how.temperature > 0, tokens, greedy)

    return jax.lax.cond(jnp.any(how.temperature > 0), drawn, lambda: greedy)


def _categorical(words, stream, draw, logits) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, stream), draw)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _filtered(logits: jax.Array, how: RowSampling) -> jax.Array:
    """-inf for tokens that ``top_k`` or ``top_p`` exclude; ties with the last kept token stay."""
    vocab = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, vocab), vocab)[:, None]
    kth = jnp.take_along_axis(descending, k - 1, axis=-1)
    descending = jnp.where(descending < kth, -jnp.inf, descending)
    before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(before[:, :1]), before[:, :-1]], axis=-1)
    kept = (before < how.top_p[:, None]) & (descending > -jnp.inf)
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
    floor = jnp.take_along_axis(descending, last, axis=-1)
    # A top_p of 1 keeps all tokens, however the sum is rounded.
    floor = jnp.where(how.top_p[:, None] < 1, floor, kth)
    return jnp.where(logits < jnp.maximum(floor, kth), -jnp.inf, logits)
