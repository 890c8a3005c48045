"""The decoder's blocks, with or without a visual expert: shape, context, layers, attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.cache import Store, write
from mquant_jax.nn.deepstack import DeepFeatures
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import Scaling, YarnScaling, apply_rope
from mquant_jax.nn.stack import LayeredContext
from mquant_jax.numerics import QTensor, along_last
from mquant_jax.ops.attention import (
    Rows,
    attend,
    attend_cache,
    attend_rows,
    fused,
    split_heads,
)

Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys and values
# One of the methods of Projections; its second argument is one or several arrays ``[B, T, ...]``.
Phase = Callable[["Projections", Any, jax.Array, Tap | None], Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a language model.

    ``rope_streams`` is the position stream that each rotary slot follows: of ordinary rope, 0
    everywhere. There are ``head_dim / 2`` slots or fewer; the other channels are not rotated.
    ``stored_rope``: the checkpoint holds each layer's frequencies. ``qk_norm``: queries and keys
    pass an RMSNorm per head before rope. ``logn_length``: from this position on, queries are scaled
    by the logarithm of their position; ``None``: they are not. ``visual_expert``: visual tokens
    have their own dense layers, with biases on queries, keys and values.
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
    rope_streams: tuple[int, ...]
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
        """Channels of a head that rope rotates."""
        return 2 * len(self.rope_streams)

    @property
    def position_streams(self) -> int:
        """Positions that a token has."""
        return max(self.rope_streams) + 1

    @property
    def score_gain(self) -> float:
        """Factor on the attention scores beside that of the head's width.

        YaRN scales rotated queries and keys; where the whole head turns, that scales their product.
        """
        return self.rope_scaling.attention**2 if isinstance(self.rope_scaling, YarnScaling) else 1.0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "angles", "order", "keys", "mask", "token_class", "query_gain", "visual", "used", "rows",
        "added",
    ],
    meta_fields=["visual_slots", "in_order"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class DecoderContext(LayeredContext):
    """What every block needs beside the residual stream.

    Attributes:
        angles: rotary angles float32 ``[B, T, rotary slots]``; positions where each layer has
            frequencies of its own.
        order: of the queries, int32 ``[B, T]``.
        keys: order of the keys, int32 ``[B, S]``.
        mask: bool ``[B, T, S]``, which keys a query may see: those not above its own order.
        token_class: int32 ``[B, T]``, sinks marked.
        query_gain: float32 ``[B, T]``, factor on the rotated queries; ``None``: there is none.
        visual_slots: how many columns hold the visual tokens, and nothing but them and padding;
            ``None``: they may be anywhere.
        visual: bool ``[B, T]``, which tokens are the visual expert's (sinks among them are no
            exception); ``None`` where there is no such expert, or nothing for it to do.
        in_order: keys belong to the same tokens, and columns are in sequence order.
        used: int32 ``[B]``, how many keys may be seen, where rows differ in it.
        rows: as in :class:`~mquant_jax.nn.cache.KVCache`.
        added: what is added to the stream after each layer, or as :meth:`DeepFeatures.stacked`
            gives it; for a single layer ``[B, T, hidden]``. ``None``: nothing.
    """

    angles: jax.Array
    order: jax.Array
    keys: jax.Array
    mask: jax.Array
    token_class: jax.Array
    query_gain: jax.Array | None = None
    visual: jax.Array | None = None
    visual_slots: int | None = None
    in_order: bool = False
    used: jax.Array | None = None
    rows: jax.Array | None = None
    added: DeepFeatures | jax.Array | None = None

    @property
    def layered(self) -> bool:
        return self.added is not None

    def scanned(self) -> DecoderContext:
        if not isinstance(self.added, DeepFeatures):
            return self
        return dataclasses.replace(self, added=self.added.stacked())

    def at_layer(self, layer: Any) -> DecoderContext:
        if self.added is None:
            return self
        if isinstance(self.added, DeepFeatures):
            return dataclasses.replace(self, added=self.added.at_layer(layer))
        own = self.added[jnp.minimum(layer, len(self.added) - 1)]
        return dataclasses.replace(self, added=own)


class Projections(nnx.Module):
    """The dense layers of a block and their quantisation points."""

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
        """``prefix``: of the points' names."""
        dense = partial(place.dense, rngs=rngs)

        def point(name: str, rotation=None) -> ActQuant:
            return place.point(name, Projections.POINTS, rotation, prefix)

        d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.attn_in = point("attn_in")
        self.q_proj = dense("q_proj", d, q, bias=qkv_bias)
        self.k_proj = dense("k_proj", d, kv, bias=qkv_bias)
        self.v_proj = dense("v_proj", d, kv, bias=qkv_bias)
        self.attn_out = point("attn_out")
        self.o_proj = dense("o_proj", q, d, bias=cfg.o_bias)
        self.mlp_in = point("mlp_in")
        self.gate_proj = dense("gate_proj", d, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = dense("up_proj", d, cfg.intermediate_size, bias=cfg.mlp_bias)
        # The signs of the rotation are folded into up_proj.
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = point("mlp_hidden", rotation and rotation.without_signs())
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.down_proj = dense("down_proj", hidden, d, bias=cfg.mlp_bias, split=place.split)

    def project(self, h: jax.Array, cls: jax.Array, tap: Tap | None) -> Heads:
        """Queries, keys and values ``[B, T, heads * d]`` of the normed stream."""
        x = self.attn_in(h, cls, tap)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def output(self, parts: tuple[jax.Array, jax.Array], cls: jax.Array, tap: Tap | None):
        """The stream with what attention adds to it; ``parts`` are the heads' results and the
        stream."""
        attended, x = parts
        return self.o_proj(self.attn_out(attended, cls, tap), x)

    def mlp(self, parts: tuple[jax.Array, jax.Array], cls: jax.Array, tap: Tap | None):
        """The stream with what the MLP adds to it; ``parts`` are the normed stream and the
        stream."""
        normed, x = parts
        h = self.mlp_in(normed, cls, tap)
        hidden = self.up_proj(h, gate=self.gate_proj(h))
        return self.down_proj(self.mlp_hidden(hidden, cls, tap), x)


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
        self.prefixed = place.prefix > 0
        if self.prefixed:  # rotated to the positions before a prompt's first
            shape = (cfg.num_kv_heads, place.prefix, cfg.head_dim)
            self.prefix_k = nnx.Param(jnp.zeros(shape, place.dtype))
            self.prefix_v = nnx.Param(jnp.zeros(shape, place.dtype))
        if cfg.stored_rope:  # positions times these are too large for a narrower type
            self.frequencies = nnx.Param(jnp.zeros((cfg.rotary_dim // 2,), jnp.float32))

    def run(self, phase: Phase, h: Any, ctx: DecoderContext, tap: Tap | None) -> Any:
        """One of the :class:`Projections`' methods, on all tokens."""
        return phase(self, h, ctx.token_class, tap)

    def qkv(self, x: jax.Array, ctx: DecoderContext, tap: Tap | None) -> Heads:
        """Queries, keys and values ``[B, T, heads * d]``, not turned yet."""
        h = self.into(self.attn_norm, self.attn_in, x, ctx, tap)
        return self.run(Projections.project, h, ctx, tap)

    def into(self, norm: RMSNorm, point: ActQuant, x: jax.Array, ctx: DecoderContext, tap):
        """The normed stream, quantised if one scale per token is known for all experts."""
        return norm(x) if self.cfg.visual_expert else norm.into(point, x, ctx.token_class, tap)

    def normed(self, x: jax.Array, norm: str) -> jax.Array:
        """Queries or keys ``[..., heads, d]`` after their norm, if there is one."""
        return getattr(self, norm)(x) if self.cfg.qk_norm else x

    def angles(self, ctx: DecoderContext) -> jax.Array:
        """Rotary angles float32 ``[B, T, rotary slots]``."""
        if not self.cfg.stored_rope:
            return ctx.angles
        return ctx.angles * along_last(self.frequencies.get_value(), ctx.angles)

    def heads(self, q: jax.Array, k: jax.Array, v: jax.Array, ctx: DecoderContext) -> Heads:
        """Normed and rotated ``q [B, heads, T, d]``, ``k [B, kv, d, T]``; and ``v [B, kv, T, d]``,
        of what :meth:`qkv` gives."""
        q, k, v = (split_heads(y, self.cfg.head_dim) for y in (q, k, v))
        q, k = self.normed(q, "q_norm"), self.normed(k, "k_norm")
        angles = self.angles(ctx)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if ctx.query_gain is not None:
            q = q * ctx.query_gain[:, None, :, None].astype(q.dtype)
        return q, jnp.swapaxes(k, 2, 3), v

    def fuses(self, q: jax.Array, ctx: DecoderContext) -> bool:
        """Whether :meth:`attend_rows` runs for queries ``[B, T, heads * d]``."""
        heads = self.cfg.num_heads, self.cfg.num_kv_heads, self.cfg.head_dim
        gradient = self.attn_out.simulated
        rows = Rows(q.shape[1], *heads, q.dtype, ctx.in_order, gradient)
        return not self.prefixed and fused(rows)  # none of the forms knows of a prefix

    def attend_rows(self, q, k, v, ctx: DecoderContext, tap: Tap | None) -> jax.Array | QTensor:
        """Attention of one call's tokens among each other, of what :meth:`qkv` gives; quantised if
        one scale per token is known for all of them."""
        if self.cfg.qk_norm:
            q, k = (
                self.normed(y.reshape(*y.shape[:-1], -1, self.cfg.head_dim), name).reshape(y.shape)
                for y, name in ((q, "q_norm"), (k, "k_norm"))
            )
        scale = None
        if not self.cfg.visual_expert:
            scale = self.attn_out.known_scale(ctx.token_class, tap)
        order = ctx.order, ctx.keys
        return attend_rows(
            q, k, v, self.cfg.head_dim, order, self.angles(ctx), ctx.query_gain, scale, ctx.in_order
        )

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, ctx: DecoderContext) -> jax.Array:
        """Attention to the keys given and to the prefix, if there is one."""
        return attend(q, k, v, ctx.mask, self.prefix(), ctx.in_order)

    def prefix(self) -> tuple[jax.Array, jax.Array] | None:
        """Keys and values ``[kv_heads, P, d]`` that every token sees."""
        return (self.prefix_k.get_value(), self.prefix_v.get_value()) if self.prefixed else None

    def rest(
        self, x: jax.Array, attended: jax.Array | QTensor, ctx: DecoderContext, tap: Tap | None
    ):
        """Output projection and MLP, each added to the residual stream ``x``, and what the context
        adds."""
        x = self.run(Projections.output, (attended, x), ctx, tap)
        h = self.into(self.mlp_norm, self.mlp_in, x, ctx, tap)
        x = self.run(Projections.mlp, (h, x), ctx, tap)
        if ctx.added is None:
            return x
        assert not isinstance(ctx.added, DeepFeatures), "a block is given the context of its layer"
        return x + ctx.added.astype(x.dtype)

    def __call__(self, x: jax.Array, ctx: DecoderContext, tap: Tap | None = None) -> jax.Array:
        """Without a cache: queries see the keys of the same call only."""
        q, k, v = self.qkv(x, ctx, tap)
        if self.fuses(q, ctx):
            return self.rest(x, self.attend_rows(q, k, v, ctx, tap), ctx, tap)
        q, k, v = self.heads(q, k, v, ctx)
        return self.rest(x, self.attend(q, k, v, ctx), ctx, tap)

    def cached(
        self, x, ctx: DecoderContext, cache: tuple[Store, Store], layer, cursor, fresh: bool
    ):
        """With a cache: writes this call's keys and values at ``cursor`` of ``layer``.

        Args:
            cache: keys and values of all layers, as a :class:`KVCache` holds them.
            fresh: the cache was empty; attend to this call's keys alone (``ctx.mask`` is square).

        Returns:
            The residual stream and the updated ``cache``.
        """
        rows_q, rows_k, rows_v = self.qkv(x, ctx, None)
        q, k, v = self.heads(rows_q, rows_k, rows_v, ctx)
        cache = write(cache, k, v, layer, cursor, ctx.rows)
        if fresh and self.fuses(rows_q, ctx):
            attended = self.attend_rows(rows_q, rows_k, rows_v, ctx, None)
            return self.rest(x, attended, ctx, None), cache
        if fresh:
            attended = self.attend(q, k, v, ctx)
        else:
            attended = attend_cache(q, cache, layer, ctx.mask, self.prefix(), ctx.used, ctx.rows)
        return self.rest(x, attended, ctx, None), cache


class ExpertBlock(DecoderBlock):
    """A block whose visual tokens have dense layers of their own; all tokens share the attention.

    Where the visual tokens form one slice (``ctx.visual_slots``), each expert runs on its own
    slice; without visual tokens only the text expert runs. Otherwise both run on all tokens.
    """

    POINTS: ClassVar[Points] = {
        f"{expert}{point}": tuple(f"{expert}{reader}" for reader in readers)
        for point, readers in Projections.POINTS.items()
        for expert in ("", "visual/")
    }

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        super().__init__(cfg, place, rngs=rngs)
        self.visual = Projections(cfg, place.within("visual"), True, "visual/", rngs=rngs)

    @staticmethod
    def _visual(ctx: DecoderContext) -> jax.Array:
        assert ctx.visual is not None, "a decoder with experts is told which tokens are visual"
        return ctx.visual

    def classes_at(self, point: str, ctx: DecoderContext) -> jax.Array:
        """int32 ``[B, T]``: token classes, -1 for tokens that are not of the point's expert."""
        visual = self._visual(ctx)
        own = visual if point.startswith("visual/") else ~visual
        return jnp.where(own, ctx.token_class, -1)

    def run(self, phase: Phase, h: Any, ctx: DecoderContext, tap: Tap | None) -> Any:
        """A phase of each token's own expert; with a ``tap``, both experts see everything."""
        at, cls = ctx.visual_slots, ctx.token_class
        if at == 0:
            return phase(self, h, cls, tap)
        if at is None or tap is not None:
            text, visual = phase(self, h, cls, tap), phase(self.visual, h, cls, tap)
            own = self._visual(ctx)[..., None]
            return jax.tree.map(lambda v, t: jnp.where(own, v, t), visual, text)
        front = phase(self.visual, jax.tree.map(lambda y: y[:, :at], h), cls[:, :at], None)
        back = phase(self, jax.tree.map(lambda y: y[:, at:], h), cls[:, at:], None)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), front, back)
