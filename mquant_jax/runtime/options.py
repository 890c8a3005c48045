"""Options of loading, generation and evaluation, shared by the API and the command lines."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.errors import UserError
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.runtime.tokens import LAYOUTS
from mquant_jax.validate import choice, count, shortened

DTYPES = ("float32", "bfloat16", "float16")
SEEDS = 1 << 32  # without 64-bit integers JAX drops the high bits of a seed


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated on construction; numbers are converted to Python's.

    Attributes:
        max_new_tokens: maximum length of an answer, in tokens.
        sampling: how tokens are drawn.
        batch_size: prompts that run together in an evaluation.
        limit: number of samples to use; ``None``: all.
        seed: seed of the sampling key.
        dtype: float dtype of a loaded model, one of :data:`DTYPES`, as a name or type; ``None``:
            the platform's default.
        layout: one of :data:`mquant_jax.runtime.tokens.LAYOUTS`.
        kv_cache: one of :data:`mquant_jax.runtime.generate.KV_CACHES`.

    Raises:
        UserError: a value of the wrong type or out of range; the message names the option.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    batch_size: int = 50
    limit: int | None = None
    seed: int = 0
    dtype: Any = None
    layout: str = "auto"
    kv_cache: str = "float"

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            found = type(self.sampling).__name__
            raise UserError(f"sampling is of type {found}; expected Sampling(temperature=...)")
        checked = {
            "max_new_tokens": count(self.max_new_tokens, "max_new_tokens"),
            "batch_size": count(self.batch_size, "batch_size"),
            "limit": None if self.limit is None else count(self.limit, "limit"),
            "seed": count(self.seed, "seed", 0, SEEDS - 1),
            "dtype": None if self.dtype is None else _dtype(self.dtype),
            "layout": choice(self.layout, "layout", LAYOUTS),
            "kv_cache": choice(self.kv_cache, "kv_cache", KV_CACHES),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def sampling_key(key: Any) -> jax.Array:
    """A ``jax.random`` key, typed or raw; ``None`` gives that of seed 0.

    Raises:
        UserError: anything else, for example an integer seed.
    """
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array) and key.shape == () and _is_key(key):
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "ndim", 0) == 1:
        return jnp.asarray(key)
    raise UserError(f"key is {shortened(repr(key), 60)}; expected jax.random.key(seed)")


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _dtype(value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise UserError(
            f"dtype is {shortened(repr(value), 60)}; expected one of {', '.join(DTYPES)}"
        )
    return dtype
