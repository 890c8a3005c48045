"""The language model: one pre-norm decoder with grouped-query attention, configured per family."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import SINK, TEXT, ActQuant
from mquant_jax.nn.cache import KVCache, empty_cache, key_order, write_order
from mquant_jax.nn.decoder_block import DecoderConfig, DecoderContext, ExpertBlock
from mquant_jax.nn.deepstack import DeepFeatures
from mquant_jax.nn.dense import empty_qweight, linear
from mquant_jax.nn.flow import Flow, ModuleCall, StackCall, run
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import multi_axis_angles
from mquant_jax.nn.stack import (
    SCAN,
    Runner,
    context_at,
    num_layers,
    scan_layers,
    scanned,
)
from mquant_jax.numerics import AnyArray, QWeight
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.visibility import Visibility
from mquant_jax.shapes import Array, Bool, Float, Float32, Int32

Stream = Float[Array, "B T hidden"]
Tokens = Int32[AnyArray, "B T"]  # what there is one of per token
Positions = Int32[AnyArray, "streams B T"]


class SinkRule(nnx.Module):
    """Which tokens of a prompt are sinks: places in the sequence, and token ids.

    Unused entries are -1.
    """

    POSITIONS, IDS = 4, 8

    def __init__(self):
        self.positions = nnx.Param(jnp.full((self.POSITIONS,), -1, jnp.int32))
        self.ids = nnx.Param(jnp.full((self.IDS,), -1, jnp.int32))

    def __call__(
        self, input_ids: Tokens, order: Tokens, token_class: Tokens
    ) -> Int32[Array, "B T"]:
        """Token classes with sinks marked; padding stays -1."""
        sink = jnp.isin(order, self.positions.get_value())
        sink |= (token_class == TEXT) & jnp.isin(input_ids, self.ids.get_value())
        return jnp.where(sink & (token_class >= 0), SINK, token_class)


class Decoder(nnx.Module):
    """Token embedding, a stack of blocks, final norm and head (own or tied)."""

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, place.dtype
        table = jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.hidden_size), jnp.float32)
        own: Any = (0.02 * table).astype(place.dtype)
        rows = place.section("head" if cfg.tied_head else "embedding")
        if rows.quantised:
            own = empty_qweight(cfg.vocab_size, cfg.hidden_size, rows)
        self.embedding = nnx.Param(own)
        self.layers = place.stack(
            "layers", cfg.num_layers, lambda where, r: cfg.block(cfg, where, rngs=r), rngs
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        if place.sink_class:
            self.sinks = SinkRule()
        # One scale: only text is ever predicted.
        self.head_in = ActQuant("head_in", place.section("head"))
        if not cfg.tied_head:
            self.head = place.dense("head", cfg.hidden_size, cfg.vocab_size, bias=False, rngs=rngs)

    @property
    def has_experts(self) -> bool:
        """Whether visual tokens have dense layers of their own."""
        return issubclass(self.cfg.block, ExpertBlock)

    def embed(self, ids: Tokens) -> Stream:
        """The rows of tokens."""
        table = self.embedding.get_value()
        if isinstance(table, QWeight):
            rows = table.rows(ids.ravel()).dequantize()
            return rows.reshape(*ids.shape, -1).astype(self.dtype)
        return table[ids]

    def classes(self, input_ids: Tokens, order: Tokens, token_class: Tokens) -> Tokens:
        """Classes of a prompt's tokens, with sinks marked."""
        if not hasattr(self, "sinks"):
            return token_class
        return self.sinks(input_ids, order, token_class)

    def logits(self, x: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens vocab"]:
        """Of the residual stream."""
        return run(self.logits_flow(x))

    def logits_flow(
        self, x: Float[Array, "*tokens hidden"], classes: Int32[AnyArray, "*tokens"] | None = None
    ) -> Flow[Float32[Array, "*tokens vocab"]]:
        """The same as a flow.

        A quantised tied table is one array, used for lookup and head.
        """
        h = yield ModuleCall("language/head_in", self.head_in, self.norm(x), classes)
        kernel = (self.embedding if self.cfg.tied_head else self.head.kernel).get_value()
        dtype = jnp.float32 if isinstance(kernel, QWeight) else self.dtype
        return linear(h, kernel, Epilogue(dtype=dtype)).astype(jnp.float32)

    def context(
        self,
        positions: Positions,
        order: Tokens,
        token_class: Tokens,
        keys: Int32[Array, "B S"] | None = None,
        visual_slots: int | None = None,
        visual: Bool[AnyArray, "B T"] | None = None,
        span: Int32[Array, " B"] | None = None,
        added: DeepFeatures | Float[Array, "layers B T hidden"] | None = None,
    ) -> DecoderContext:
        """Angles and visibility of tokens.

        Args:
            keys: order of the keys; by default those of the same tokens.
            visual_slots, visual, added: see :class:`DecoderContext`.
            span: as in the cache; by default, of the same tokens.
        """
        cfg = self.cfg
        order, token_class = jnp.asarray(order), jnp.asarray(token_class)
        angles = multi_axis_angles(
            positions, cfg.rotary_dim, cfg.rope_theta, cfg.rope_streams, cfg.rope_scaling, span
        )
        # Only visual tokens are ever moved.
        if keys is None:
            own = key_order(order, token_class)
            seen = Visibility(order, own, after=None if visual_slots else 0)
        else:
            seen = Visibility(order, keys).bounded()
        visual = jnp.asarray(visual) if self.has_experts and visual is not None else None
        gain = self._query_gain(positions, order)
        return DecoderContext(angles, seen, token_class, gain, visual, visual_slots, added=added)

    def _query_gain(self, positions, order) -> jax.Array | None:
        """Factor on the queries, see :class:`DecoderContext`."""
        cfg, gain = self.cfg, None
        if cfg.query_gain is not None:
            gain = cfg.query_gain(positions)
        if cfg.score_gain != 1:
            gain = jnp.ones(order.shape, jnp.float32) if gain is None else gain
            gain = gain * cfg.score_gain
        return gain

    def __call__(
        self,
        x: Stream,
        positions: Positions,
        order: Tokens,
        token_class: Tokens,
        runner: Runner = SCAN,
        **layout: Any,
    ) -> Stream:
        """Embeddings -> residual stream before the final norm; no cache.

        ``layout``: as in :meth:`flow`.
        """
        return run(self.flow(x, positions, order, token_class, **layout), runner)

    def flow(
        self, x: Stream, positions: Positions, order: Tokens, token_class: Tokens, **layout: Any
    ) -> Flow[Stream]:
        """The same as a flow.

        ``layout``: ``visual_slots``, ``visual`` and ``added`` of :class:`DecoderContext`.
        """
        ctx = self.context(positions, order, token_class, **layout)
        x, _ = yield StackCall("language/layers", self.layers, x, ctx)
        return x

    def init_cache(self, batch: int, slots: int, int8: bool = False) -> KVCache:
        """An empty cache, in the model's float type or quantised."""
        cfg, dtype = self.cfg, jnp.int8 if int8 else self.dtype
        return empty_cache(
            num_layers(self.layers), batch, cfg.num_kv_heads, slots, cfg.head_dim, dtype
        )

    def step(
        self,
        x: Stream,
        positions: Positions,
        order: Tokens,
        token_class: Tokens,
        cache: KVCache,
        *,
        fresh: bool = False,
        **layout: Any,
    ) -> tuple[Stream, KVCache]:
        """Run ``T`` new tokens against the cache.

        Args:
            fresh: the cache holds nothing yet (a first prefill).
            layout: as in :meth:`flow`.

        Returns:
            Residual stream before the final norm, and the cache with the tokens in it.
        """
        rows, new = cache.rows, key_order(order, token_class)
        slots = write_order(cache.order, new, cache.cursor, rows)
        keys = None if fresh else slots if rows is None else slots[rows]
        span = jnp.max(positions, axis=(0, 2)) + 1
        span = jnp.maximum(cache.span, jnp.where(cache.cursor == 0, span, 0))
        ctx = self.context(positions, order, token_class, keys, span=span, **layout)
        if cache.cursor.ndim:
            used = jnp.where(order[:, 0] < 0, 0, cache.cursor + 1)
            ctx = dataclasses.replace(ctx, used=used, rows=rows)
        ctx = scanned(ctx)

        # The cache is part of the carry and written one slot at a time, so XLA updates it in
        # place; as a scanned input and output it would be copied whole at every step.
        def body(block, carry):
            x, store, i = carry
            x, store = block.cached(x, context_at(ctx, i), store, i, cache.cursor, fresh)
            return x, store, i + 1

        start = x, (cache.k, cache.v), jnp.int32(0)
        x, (k, v), _ = scan_layers(body, self.layers, start)
        return x, KVCache(k, v, slots, cache.cursor + x.shape[1], span, rows)
