"""Prefill and decode as compiled programs over pytrees.

The low-level interface for JAX programs is :func:`prefill` and :func:`decode`, pure functions of
``(model, ...)``; :class:`Generator` compiles them together with sampling into one decode loop.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch, bucket
from mquant_jax.nn.cache import KVCache
from mquant_jax.runtime.sampling import Sampling, sample
from mquant_jax.runtime.tokens import arrange, uses_aifs

KV_CACHES = ("float", "int8")


@partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "order", "position"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that one decode step needs beside the token.

    Attributes:
        cache: the KV cache.
        order: int32 ``[B]``, place of the next token in its sequence.
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
        slots: cache length: padded prompt plus the tokens to be generated.
        int8_cache: keep keys and values in int8, with a scale per token and head.

    Returns:
        Logits of the next token, float32 ``[B, vocab]``, and the state to go on from.
    """
    cache = model.language.init_cache(batch.input_ids.shape[0], slots, int8_cache)
    logits, cache = model.prefill(batch, cache)
    return logits, DecodeState(cache, batch.lengths, batch.next_position)


def extend(
    model: VLM, batch: Batch, state: DecodeState, visual: jax.Array | None = None
) -> tuple[jax.Array, DecodeState]:
    """Run further prompt tokens: a next turn, or the next chunk of a long prompt. Pure.

    Args:
        batch: tokens whose order and positions go on from the state's
            (:func:`mquant_jax.runtime.tokens.follow`).
        state: donate it; its cache needs as many free slots as ``batch`` has columns.
        visual: features of the batch's pictures, when they are known already.
    """
    logits, cache = model.prefill(batch, state.cache, fresh=False, visual=visual)
    order = jnp.maximum(state.order, batch.lengths)
    return logits, DecodeState(cache, order, jnp.maximum(state.position, batch.next_position))


def decode(model: VLM, tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Run one token per row, int32 ``[B]``. Pure; jit it and donate ``state``."""
    logits, cache = model.decode(tokens, state.order, state.position, state.cache)
    return logits, DecodeState(cache, state.order + 1, state.position + 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "tokens", "done", "key", "state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Loop:
    """Carry of the decode loop: ``tokens [B, limit]`` holds the first ``step`` tokens."""

    step: jax.Array
    tokens: jax.Array
    done: jax.Array
    key: jax.Array
    state: DecodeState


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out, and how long it took.

    Attributes:
        tokens: per row, the generated ids without the stop token.
        stopped: per row, whether a stop token ended it (else the limit did).
        prefill_seconds: vision, prompt and first token.
        decode_seconds: the other tokens.
        steps: decode steps run.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prefill_seconds: float
    decode_seconds: float
    steps: int


class Generator:
    """A model with its compiled programs, one per bucket of prompt, pictures and cache.

    ``layout``: ``masked`` leaves tokens where they stand, ``aifs`` puts the visual ones in front,
    ``auto`` takes what is faster (:func:`mquant_jax.runtime.tokens.uses_aifs`).
    ``kv_cache``: ``float`` (the model's type), or ``int8``: half or a quarter of the memory.

    ``start(params, batch, key, slots=, limit=, how=) -> Loop`` runs the prompts and draws the first
    token; ``run(params, loop, until, how=) -> Loop`` goes on to token ``until``.
    """

    def __init__(
        self,
        model: VLM,
        stop_ids: tuple[int, ...],
        layout: str = "auto",
        kv_cache: str = "float",
    ):
        if kv_cache not in KV_CACHES:
            raise UserError(f"kv_cache is {kv_cache!r}; known: {', '.join(KV_CACHES)}")
        self.stop_ids, self.aifs = stop_ids, uses_aifs(model, layout)
        self.int8_cache = kv_cache == "int8"
        self.graphdef, self.params = nnx.split(model)
        self.start = jax.jit(self._start_loop, static_argnames=("slots", "limit", "how"))
        self.run = jax.jit(self._run_loop, static_argnames=("how",), donate_argnames=("loop",))

    def _stopped(self, tokens: jax.Array) -> jax.Array:
        return jnp.isin(tokens, jnp.asarray(self.stop_ids, jnp.int32))

    def _start_loop(self, params, batch, key, slots: int, limit: int, how: Sampling) -> Loop:
        model = nnx.merge(self.graphdef, params)
        logits, state = prefill(model, batch, slots, self.int8_cache)
        key, sub = jax.random.split(key)
        first = sample(logits, sub, how)
        tokens = jnp.zeros((first.shape[0], limit), jnp.int32).at[:, 0].set(first)
        return Loop(jnp.int32(1), tokens, self._stopped(first), key, state)

    def _run_loop(self, params, loop: Loop, until: jax.Array, how: Sampling) -> Loop:
        model = nnx.merge(self.graphdef, params)

        def body(c: Loop) -> Loop:
            last = jax.lax.dynamic_index_in_dim(c.tokens, c.step - 1, axis=1, keepdims=False)
            logits, state = decode(model, last, c.state)
            key, sub = jax.random.split(c.key)
            token = jnp.where(c.done, last, sample(logits, sub, how))
            tokens = jax.lax.dynamic_update_index_in_dim(c.tokens, token, c.step, axis=1)
            return Loop(c.step + 1, tokens, c.done | self._stopped(token), key, state)

        return jax.lax.while_loop(lambda c: (c.step < until) & ~jnp.all(c.done), body, loop)

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        how: Sampling = Sampling(),
        key: jax.Array | None = None,
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> Generation:
        """Generate until every row has stopped or has ``max_new_tokens``.

        Args:
            batch: prompts, padded on the left.
            key: sampling key; default ``jax.random.key(0)``.
            on_tokens: called after every step with the new ids, int32 ``[B]`` (this brings one
                host round trip per token; without it the whole loop is one program). Rows that
                have stopped repeat their stop token.
        """
        if self.aifs and batch.visual_slots is None:
            batch = arrange(batch)[0]
        limit = bucket(max_new_tokens, 16)
        slots = bucket(batch.input_ids.shape[1] + limit, 32)
        key = jax.random.key(0) if key is None else key
        t0 = time.perf_counter()
        loop = self.start(self.params, batch, key, slots=slots, limit=limit, how=how)
        loop.step.block_until_ready()
        t1 = time.perf_counter()
        if on_tokens is None:
            loop = self.run(self.params, loop, jnp.int32(max_new_tokens), how=how)
        else:
            loop = self._stream(loop, max_new_tokens, how, on_tokens)
        steps = int(loop.step)
        t2 = time.perf_counter()
        tokens, stopped = self._cut(np.asarray(loop.tokens)[:, :steps])
        return Generation(tokens, stopped, t1 - t0, t2 - t1, steps - 1)

    def _stream(self, loop: Loop, limit: int, how: Sampling, on_tokens) -> Loop:
        on_tokens(np.asarray(loop.tokens)[:, 0])
        step = 1
        while step < limit and not bool(loop.done.all()):
            loop = self.run(self.params, loop, jnp.int32(step + 1), how=how)
            on_tokens(np.asarray(loop.tokens)[:, step])
            step += 1
        return loop

    def _cut(self, tokens: np.ndarray) -> tuple[list[list[int]], list[bool]]:
        stop = np.isin(tokens, self.stop_ids)
        ends = [int(row.argmax()) if row.any() else None for row in stop]
        cut = [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]
        return cut, [end is not None for end in ends]
