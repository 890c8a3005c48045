"""The language model: one pre-norm decoder with grouped-query attention, configured per family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import SINK, TEXT, ActQuant, Points, Tap
from mquant_jax.nn.cache import KVCache, empty_cache, key_order
from mquant_jax.nn.dense import FLOAT, Dense, empty_qweight, linear
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import Scaling, apply_rope, multi_axis_angles, slot_positions
from mquant_jax.nn.stack import SCAN, Runner, num_layers, stack_layers
from mquant_jax.numerics import QWeight
from mquant_jax.ops.attention import attend
from mquant_jax.recipe import Section

Phase = Callable[["Projections", jax.Array, jax.Array, Tap | None], Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a language model.

    ``rope_sections`` are the rotary slots that follow each position stream; a single entry is
    ordinary rope. They add up to ``head_dim / 2``, or less: the other channels do not turn.
    ``stored_rope``: the checkpoint holds the frequencies of each layer, and they are not computed.
    ``qk_norm``: queries and keys pass an RMSNorm per head before the rotation. ``logn_length``:
    queries from this position on grow with the logarithm of their position; ``None``: they do not.
    ``visual_expert``: visual tokens have dense layers of their own, with biases on queries, keys
    and values.
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
    stored_rope: bool = False
    visual_expert: bool = False

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return 2 * sum(self.rope_sections)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles", "mask", "token_class", "query_gain", "visual"],
    meta_fields=["visual_slots"],
)
@dataclasses.dataclass(frozen=True)
class DecoderContext:
    """What every block needs beside the residual stream.

    Attributes:
        angles: rotary angles float32 ``[B, T, rotary slots]``; positions where each layer has
            frequencies of its own.
        mask: bool ``[B, T, S]``, which keys a query may see.
        token_class: int32 ``[B, T]``, sinks marked.
        query_gain: float32 ``[B, T]``, factor on the rotated queries; ``None``: there is none.
        visual_slots: how many columns hold the visual tokens, and nothing but them and padding;
            ``None``: they stand anywhere.
        visual: bool ``[B, T]``, which tokens are the visual expert's (sinks among them are no
            exception); ``None`` where there is no such expert, or nothing for it to do.
    """

    angles: jax.Array
    mask: jax.Array
    token_class: jax.Array
    query_gain: jax.Array | None = None
    visual: jax.Array | None = None
    visual_slots: int | None = None


class Projections(nnx.Module):
    """The dense layers of a block and the points in front of them."""

    POINTS: ClassVar[Points] = {
        "attn_in": ("q_proj", "k_proj", "v_proj"),
        "attn_out": ("o_proj",),
        "mlp_in": ("gate_proj", "up_proj"),
        "mlp_hidden": ("down_proj",),
    }

    def __init__(
        self,
        cfg: DecoderConfig,
        place: Placement,
        qkv_bias: bool,
        prefix: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        """``prefix`` stands in front of the points' names."""
        dense = partial(Dense, section=place.section, dtype=place.dtype, rngs=rngs)

        def point(name: str, rotation=None) -> ActQuant:
            return ActQuant(prefix + name, place.section, place.n_classes, rotation)

        d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.attn_in = point("attn_in")
        self.q_proj = dense(d, q, bias=qkv_bias)
        self.k_proj = dense(d, kv, bias=qkv_bias)
        self.v_proj = dense(d, kv, bias=qkv_bias)
        self.attn_out = point("attn_out")
        self.o_proj = dense(q, d, bias=cfg.o_bias)
        self.mlp_in = point("mlp_in")
        self.gate_proj = dense(d, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = dense(d, cfg.intermediate_size, bias=cfg.mlp_bias)
        # The signs of the rotation are folded into up_proj.
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = point("mlp_hidden", rotation and rotation.unsigned)
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.down_proj = dense(hidden, d, bias=cfg.mlp_bias, split=place.split)

    def project(self, h: jax.Array, cls: jax.Array, tap: Tap | None) -> tuple[jax.Array, ...]:
        """Queries, keys and values ``[B, T, heads * d]`` of the normed stream."""
        h = self.attn_in(h, cls, tap)
        return self.q_proj(h), self.k_proj(h), self.v_proj(h)

    def output(self, h: jax.Array, cls: jax.Array, tap: Tap | None) -> jax.Array:
        """What attention adds to the stream."""
        return self.o_proj(self.attn_out(h, cls, tap))

    def mlp(self, h: jax.Array, cls: jax.Array, tap: Tap | None) -> jax.Array:
        """What the MLP adds to the stream."""
        h = self.mlp_in(h, cls, tap)
        h = jax.nn.silu(self.gate_proj(h)) * self.up_proj(h)
        return self.down_proj(self.mlp_hidden(h, cls, tap))


class DecoderBlock(Projections):
    """Pre-norm attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        super().__init__(cfg, place, cfg.qkv_bias, rngs=rngs)
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
        if cfg.stored_rope:  # positions times these are too large for a narrower type
            self.frequencies = nnx.Param(jnp.zeros((cfg.rotary_dim // 2,), jnp.float32))

    def run(self, phase: Phase, h: jax.Array, ctx: DecoderContext, tap: Tap | None) -> Any:
        """One of the :class:`Projections`' methods, on all tokens."""
        return phase(self, h, ctx.token_class, tap)

    def qkv(self, x: jax.Array, ctx: DecoderContext, tap: Tap | None):
        """Normed, projected and rotated ``q [B, heads, T, d]``, ``k`` and ``v [B, kv, T, d]``."""
        q, k, v = (
            jnp.swapaxes(y.reshape(*y.shape[:-1], -1, self.cfg.head_dim), 1, 2)
            for y in self.run(Projections.project, self.attn_norm(x), ctx, tap)
        )
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        angles = ctx.angles
        if self.cfg.stored_rope:
            angles = angles * self.frequencies.get_value()
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if ctx.query_gain is not None:
            q = q * ctx.query_gain[:, None, :, None].astype(q.dtype)
        return q, k, v

    def rest(self, x: jax.Array, attended: jax.Array, ctx: DecoderContext, tap: Tap | None):
        """Output projection and MLP, each added to the residual stream ``x``."""
        x = x + self.run(Projections.output, attended, ctx, tap)
        return x + self.run(Projections.mlp, self.mlp_norm(x), ctx, tap)

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


class ExpertBlock(DecoderBlock):
    """A block whose visual tokens have dense layers of their own; all tokens share the attention.

    Where the visual tokens stand in one slice (``ctx.visual_slots``), each expert runs on its own
    slice, and where there are none, one alone. Otherwise both run on everything.
    """

    POINTS: ClassVar[Points] = {
        f"{expert}{point}": tuple(f"{expert}{reader}" for reader in readers)
        for point, readers in Projections.POINTS.items()
        for expert in ("", "visual/")
    }

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        super().__init__(cfg, place, rngs=rngs)
        self.visual = Projections(cfg, place, True, "visual/", rngs=rngs)

    def classes_at(self, point: str, ctx: DecoderContext) -> jax.Array:
        """int32 ``[B, T]``: token classes, -1 for tokens that are not of the point's expert."""
        own = ctx.visual if point.startswith("visual/") else ~ctx.visual
        return jnp.where(own, ctx.token_class, -1)

    def run(self, phase: Phase, h: jax.Array, ctx: DecoderContext, tap: Tap | None) -> Any:
        """A phase of each token's own expert; with a ``tap``, both experts see everything."""
        at, cls = ctx.visual_slots, ctx.token_class
        if at == 0:
            return phase(self, h, cls, tap)
        if at is None or tap is not None:
            text, visual = phase(self, h, cls, tap), phase(self.visual, h, cls, tap)
            own = ctx.visual[..., None]
            return jax.tree.map(lambda v, t: jnp.where(own, v, t), visual, text)
        front = phase(self.visual, h[:, :at], cls[:, :at], None)
        back = phase(self, h[:, at:], cls[:, at:], None)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), front, back)


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
        block = ExpertBlock if cfg.visual_expert else DecoderBlock
        self.layers = stack_layers(lambda r: block(cfg, place, rngs=r), cfg.num_layers, rngs)
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
        visual: jax.Array | None = None,
        span: jax.Array | None = None,
    ) -> DecoderContext:
        """Angles and mask for tokens at ``positions [streams, B, T]`` and ``order [B, T]``.

        Args:
            keys: order of the keys, int32 ``[B, S]``; by default those of the same tokens.
            visual_slots, visual: see :class:`DecoderContext`.
            span: as in the cache; by default, of the same tokens.
        """
        cfg, gain = self.cfg, None
        if cfg.stored_rope:
            angles = slot_positions(positions, cfg.rope_sections)
        else:
            angles = multi_axis_angles(
                positions, cfg.rotary_dim, cfg.rope_theta, cfg.rope_sections, cfg.rope_scaling, span
            )
        if cfg.logn_length is not None:
            length = jnp.max(positions, axis=0).astype(jnp.float32) + 1
            gain = jnp.maximum(jnp.log(length) / math.log(cfg.logn_length), 1.0)
        keys = key_order(order, token_class) if keys is None else keys
        mask = keys[:, None, :] <= order[:, :, None]
        visual = visual if cfg.visual_expert else None
        return DecoderContext(angles, mask, token_class, gain, visual, visual_slots)

    def __call__(
        self,
        x,
        positions,
        order,
        token_class,
        runner: Runner = SCAN,
        *,
        visual_slots: int | None = None,
        visual: jax.Array | None = None,
    ) -> jax.Array:
        """Embeddings ``[B, T, hidden]`` -> residual stream before the final norm; no cache."""
        ctx = self.context(positions, order, token_class, None, visual_slots, visual)
        return runner.layers("language/layers", self.layers, x, ctx)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        cfg = self.cfg
        return empty_cache(
            num_layers(self.layers), batch, cfg.num_kv_heads, slots, cfg.head_dim, self.dtype
        )

    def step(
        self,
        x,
        positions,
        order,
        token_class,
        cache: KVCache,
        *,
        fresh: bool = False,
        visual_slots: int | None = None,
        visual: jax.Array | None = None,
    ):
        """Run ``T`` new tokens against the cache.

        Args:
            x: ``[B, T, hidden]``.
            fresh: the cache holds nothing yet (a first prefill).
            visual_slots, visual: see :class:`DecoderContext`.

        Returns:
            Residual stream before the final norm, and the cache with the tokens in it.
        """
        at = (0, cache.cursor)
        slots = jax.lax.dynamic_update_slice(cache.order, key_order(order, token_class), at)
        keys = None if fresh else slots
        span = jnp.max(positions, axis=(0, 2)) + 1
        span = jnp.where(cache.cursor == 0, span, cache.span)
        ctx = self.context(positions, order, token_class, keys, visual_slots, visual, span)
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
