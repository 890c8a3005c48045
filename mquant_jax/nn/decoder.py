"""The language model: one pre-norm decoder with grouped-query attention, configured per family."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import SINK, TEXT, ActQuant, Points, Tap
from mquant_jax.nn.cache import KVCache, empty_cache, key_order
from mquant_jax.nn.dense import FLOAT, Dense, empty_qweight, linear
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import Scaling, apply_rope, multi_axis_angles
from mquant_jax.nn.stack import SCAN, Runner, num_layers, stack_layers
from mquant_jax.numerics import QWeight
from mquant_jax.ops.attention import attend
from mquant_jax.recipe import Section


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a language model.

    ``rope_sections`` are the rotary slots that follow each position stream; they add up to
    ``head_dim / 2`` and a single entry is ordinary rope. ``qk_norm``: queries and keys pass an
    RMSNorm per head before the rotation. ``logn_length``: queries from this position on grow with
    the logarithm of their position; ``None``: they do not.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_sections: tuple[int, ...]
    max_positions: int
    qkv_bias: bool
    tied_head: bool
    o_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Scaling | None = None
    qk_norm: bool = False
    logn_length: int | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles", "mask", "token_class", "query_gain"],
    meta_fields=["visual_slots"],
)
@dataclasses.dataclass(frozen=True)
class DecoderContext:
    """What every block needs beside the residual stream.

    Attributes:
        angles: rotary angles float32 ``[B, T, head_dim/2]``.
        mask: bool ``[B, T, S]``, which keys a query may see.
        token_class: int32 ``[B, T]``, sinks marked.
        query_gain: float32 ``[B, T]``, factor on the rotated queries; ``None``: there is none.
        visual_slots: how many columns hold the visual tokens, and nothing but them and padding;
            ``None``: they stand anywhere.
    """

    angles: jax.Array
    mask: jax.Array
    token_class: jax.Array
    query_gain: jax.Array | None = None
    visual_slots: int | None = None


class DecoderBlock(nnx.Module):
    """Pre-norm attention, then a gated MLP, each added to the residual stream."""

    POINTS: ClassVar[Points] = {
        "attn_in": ("q_proj", "k_proj", "v_proj"),
        "attn_out": ("o_proj",),
        "mlp_in": ("gate_proj", "up_proj"),
        "mlp_hidden": ("down_proj",),
    }

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dense = partial(Dense, section=place.section, dtype=place.dtype, rngs=rngs)
        point = partial(ActQuant, section=place.section, n_classes=place.n_classes)
        d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.attn_norm = RMSNorm(d, cfg.norm_eps, place.dtype)
        self.attn_in = point("attn_in")
        self.q_proj = dense(d, q, bias=cfg.qkv_bias)
        self.k_proj = dense(d, kv, bias=cfg.qkv_bias)
        self.v_proj = dense(d, kv, bias=cfg.qkv_bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
        self.attn_out = point("attn_out")
        self.o_proj = dense(q, d, bias=cfg.o_bias)
        self.mlp_norm = RMSNorm(d, cfg.norm_eps, place.dtype)
        self.mlp_in = point("mlp_in")
        self.gate_proj = dense(d, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = dense(d, cfg.intermediate_size, bias=cfg.mlp_bias)
        # The signs of the rotation are folded into up_proj.
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = point("mlp_hidden", rotation=rotation and rotation.unsigned)
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.down_proj = dense(hidden, d, bias=cfg.mlp_bias, split=place.split)

    def qkv(self, x: jax.Array, ctx: DecoderContext, tap: Tap | None):
        """Normed, projected and rotated ``q [B, heads, T, d]``, ``k`` and ``v [B, kv, T, d]``."""
        h = self.attn_in(self.attn_norm(x), ctx.token_class, tap)
        q, k, v = (
            jnp.swapaxes(y.reshape(*y.shape[:-1], -1, self.cfg.head_dim), 1, 2)
            for y in (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        )
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, ctx.angles), apply_rope(k, ctx.angles)
        if ctx.query_gain is not None:
            q = q * ctx.query_gain[:, None, :, None].astype(q.dtype)
        return q, k, v

    def rest(self, x: jax.Array, attended: jax.Array, ctx: DecoderContext, tap: Tap | None):
        """Output projection and MLP, each added to the residual stream ``x``."""
        cls = ctx.token_class
        x = x + self.o_proj(self.attn_out(attended, cls, tap))
        h = self.mlp_in(self.mlp_norm(x), cls, tap)
        h = jax.nn.silu(self.gate_proj(h)) * self.up_proj(h)
        return x + self.down_proj(self.mlp_hidden(h, cls, tap))

    def __call__(self, x: jax.Array, ctx: DecoderContext, tap: Tap | None = None) -> jax.Array:
        """Without a cache: queries see the keys of the same call only."""
        q, k, v = self.qkv(x, ctx, tap)
        return self.rest(x, attend(q, k, v, ctx.mask), ctx, tap)

    def cached(self, x, ctx: DecoderContext, k_all, v_all, layer, cursor, fresh: bool):
        """With a cache: writes this call's keys and values at ``cursor`` of ``layer``.

        Args:
            fresh: the cache was empty; attend to this call's keys alone (``ctx.mask`` is square).

        Returns:
            The residual stream and the updated ``k_all``, ``v_all``.
        """
        q, k, v = self.qkv(x, ctx, None)
        at = (layer, 0, 0, cursor, 0)
        k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), at)
        v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), at)
        if not fresh:
            k = jax.lax.dynamic_index_in_dim(k_all, layer, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(v_all, layer, keepdims=False)
        return self.rest(x, attend(q, k, v, ctx.mask), ctx, None), k_all, v_all


class SinkRule(nnx.Module):
    """Which tokens of a prompt are sinks: places in the sequence, and token ids.

    Unused entries are -1.
    """

    POSITIONS, IDS = 4, 8

    def __init__(self):
        self.positions = nnx.Param(jnp.full((self.POSITIONS,), -1, jnp.int32))
        self.ids = nnx.Param(jnp.full((self.IDS,), -1, jnp.int32))

    def __call__(self, input_ids: jax.Array, order: jax.Array, token_class: jax.Array) -> jax.Array:
        """int32 ``[B, T]`` each -> token classes with sinks marked; padding stays -1."""
        sink = jnp.isin(order, self.positions.get_value())
        sink |= (token_class == TEXT) & jnp.isin(input_ids, self.ids.get_value())
        return jnp.where(sink & (token_class >= 0), SINK, token_class)


class Decoder(nnx.Module):
    """Token embedding, a stack of blocks, final norm and head (own or tied)."""

    def __init__(
        self, cfg: DecoderConfig, place: Placement, head: Section = FLOAT, *, rngs: nnx.Rngs
    ):
        self.cfg, self.dtype = cfg, place.dtype
        table = jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.hidden_size)) * 0.02
        table = table.astype(place.dtype)
        if cfg.tied_head and head.quantised:
            table = empty_qweight(cfg.vocab_size, cfg.hidden_size, head)
        self.embedding = nnx.Param(table)
        self.layers = stack_layers(lambda r: DecoderBlock(cfg, place, rngs=r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        if place.sink_class:
            self.sinks = SinkRule()
        self.head_in = ActQuant("head_in", head)  # one scale: only text is ever predicted
        if not cfg.tied_head:
            self.head = Dense(
                cfg.hidden_size, cfg.vocab_size, bias=False, section=head, dtype=place.dtype,
                rngs=rngs,
            )  # fmt: skip

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32 ``[B, T]`` -> ``[B, T, hidden]``."""
        table = self.embedding.get_value()
        if isinstance(table, QWeight):
            rows = QWeight(table.values[ids], table.scale[ids], table.in_features, table.bits,
                           table.storage)  # fmt: skip
            return rows.dequantize().astype(self.dtype)
        return table[ids]

    def classes(self, input_ids, order, token_class) -> jax.Array:
        """Classes of a prompt's tokens, int32 ``[B, T]``, with sinks marked."""
        if not hasattr(self, "sinks"):
            return token_class
        return self.sinks(input_ids, order, token_class)

    def logits(self, x: jax.Array, classes=None, runner: Runner = SCAN) -> jax.Array:
        """Residual stream ``[..., hidden]`` -> float32 ``[..., vocab]``.

        A tied table that is quantised is quantised once, for lookup and head alike.
        """
        h = runner.module("language", self.head_in, self.norm(x), classes)
        kernel = (self.embedding if self.cfg.tied_head else self.head.kernel).get_value()
        return linear(h, kernel, self.dtype).astype(jnp.float32)

    def context(
        self,
        positions,
        order,
        token_class,
        keys=None,
        visual_slots: int | None = None,
        span: jax.Array | None = None,
    ) -> DecoderContext:
        """Angles and mask for tokens at ``positions [streams, B, T]`` and ``order [B, T]``.

        ``keys``: order of the keys, int32 ``[B, S]``; by default those of the same tokens.
        ``span``: as in the cache; by default, of the same tokens.
        """
        cfg, gain = self.cfg, None
        angles = multi_axis_angles(
            positions, cfg.head_dim, cfg.rope_theta, cfg.rope_sections, cfg.rope_scaling, span
        )
        if cfg.logn_length is not None:
            length = jnp.max(positions, axis=0).astype(jnp.float32) + 1
            gain = jnp.maximum(jnp.log(length) / math.log(cfg.logn_length), 1.0)
        keys = key_order(order, token_class) if keys is None else keys
        mask = keys[:, None, :] <= order[:, :, None]
        return DecoderContext(angles, mask, token_class, gain, visual_slots)

    def __call__(
        self, x, positions, order, token_class, runner: Runner = SCAN, *, visual_slots=None
    ) -> jax.Array:
        """Embeddings ``[B, T, hidden]`` -> residual stream before the final norm; no cache."""
        ctx = self.context(positions, order, token_class, visual_slots=visual_slots)
        return runner.layers("language/layers", self.layers, x, ctx)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        cfg = self.cfg
        return empty_cache(
            num_layers(self.layers), batch, cfg.num_kv_heads, slots, cfg.head_dim, self.dtype
        )

    def step(
        self, x, positions, order, token_class, cache: KVCache, *, fresh=False, visual_slots=None
    ):
        """Run ``T`` new tokens against the cache.

        Args:
            x: ``[B, T, hidden]``.
            fresh: the cache holds nothing yet (a first prefill).
            visual_slots: see :class:`DecoderContext`.

        Returns:
            Residual stream before the final norm, and the cache with the tokens in it.
        """
        at = (0, cache.cursor)
        slots = jax.lax.dynamic_update_slice(cache.order, key_order(order, token_class), at)
        keys = None if fresh else slots
        span = jnp.max(positions, axis=(0, 2)) + 1
        span = jnp.where(cache.cursor == 0, span, cache.span)
        ctx = self.context(positions, order, token_class, keys, visual_slots, span)
        graphdef, state = nnx.split(self.layers)

        # The cache is part of the carry and written one slot at a time, so XLA updates it in
        # place; as a scanned input and output it would be copied whole at every step.
        def body(carry, layer):
            x, k, v, i = carry
            block = nnx.merge(graphdef, layer)
            x, k, v = block.cached(x, ctx, k, v, i, cache.cursor, fresh)
            return (x, k, v, i + 1), None

        (x, k, v, _), _ = jax.lax.scan(body, (x, cache.k, cache.v, jnp.int32(0)), state)
        return x, KVCache(k, v, slots, cache.cursor + x.shape[1], span)
