"""Choosing the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mquant_jax.errors import UserError
from mquant_jax.validate import count, number

LEAST = 1e-6  # of what is divided by or compared with in float32: smaller values underflow


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy; otherwise (from 1e-6) logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches it, from 1e-6; 1 keeps
            all.

    Raises:
        UserError: a value of another type or range.
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


def sample(logits: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """float32 ``[B, vocab]`` -> int32 ``[B]``.

    ``top_p`` counts probabilities after temperature and ``top_k``; the likeliest token always
    stays.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k:
        k = min(how.top_k, logits.shape[-1])
        kth = jax.lax.top_k(logits, k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        before = jnp.concatenate([jnp.zeros_like(before[:, :1]), before[:, :-1]], axis=-1)
        last = jnp.sum(before < how.top_p, axis=-1, keepdims=True) - 1
        floor = jnp.take_along_axis(descending, last, axis=-1)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
