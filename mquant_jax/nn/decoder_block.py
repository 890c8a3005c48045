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
from mquant_jax.nn.attention import (
    Attention,
    AttentionContext,
    HeadShape,
    KVRows,
    Projected,
    QRows,
)
from mquant_jax.nn.cache import Cursor, Store, write
from mquant_jax.nn.deepstack import DeepFeatures
from mquant_jax.nn.mlp import GatedMLP
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import LogGain, Scaling, StoredFrequencies, YarnScaling
from mquant_jax.nn.stack import LayeredContext
from mquant_jax.numerics import QTensor, along_last
from mquant_jax.ops.attention import attend_cache
from mquant_jax.ops.attention_xla import Prefix
from mquant_jax.shapes import Array, Float, Float32, Int32

Stream = Float[Array, "B T hidden"]
Classes = Int32[Array, "B T"]
# One of the methods of Projections; its second argument is one or several arrays ``[B, T, ...]``.
Phase = Callable[["Projections", Any, jax.Array, Tap | None], Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a language model.

    ``rope_streams`` is the position stream that each rotary slot follows: of ordinary rope, 0
    everywhere. There are ``head_dim / 2`` slots or fewer; the other channels are not rotated.
    ``qk_norm``: queries and keys pass an RMSNorm per head before rope. ``query_gain``: scales
    the rotated queries by their positions. ``block``: the kind of its blocks.
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
    query_gain: LogGain | None = None
    block: type[DecoderBlock] = dataclasses.field(default_factory=lambda: DecoderBlock)

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
        "angles", "seen", "token_class", "query_gain", "visual", "used", "rows", "added",
    ],
    meta_fields=["visual_slots"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class DecoderContext(AttentionContext, LayeredContext):
    """What every block needs beside the residual stream.

    Attributes:
        visual_slots: how many columns hold the visual tokens, and nothing but them and padding;
            ``None``: they may be anywhere.
        visual: bool ``[B, T]``, which tokens are the visual expert's (sinks among them are no
            exception); ``None`` where there is no such expert, or nothing for it to do.
        used: int32 ``[B]``, how many keys may be seen, where rows differ in it.
        rows: as in :class:`~mquant_jax.nn.cache.KVCache`.
        added: what is added to the stream after each layer, or as :meth:`DeepFeatures.stacked`
            gives it; for a single layer ``[B, T, hidden]``. ``None``: nothing.
    """

    visual: jax.Array | None = None
    visual_slots: int | None = None
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


class Projections(Attention, GatedMLP):
    """Both halves' dense layers and quantisation points."""

    POINTS: ClassVar[Points] = {**Attention.POINTS, **GatedMLP.POINTS}

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
        heads = HeadShape(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        self.init_attention(
            cfg.hidden_size, heads, place, qkv_bias=qkv_bias, o_bias=cfg.o_bias, prefix=prefix,
            rngs=rngs,
        )  # fmt: skip
        self.init_mlp(
            cfg.hidden_size, cfg.intermediate_size, place, bias=cfg.mlp_bias, prefix=prefix,
            rngs=rngs,
        )  # fmt: skip

    def output(
        self,
        parts: tuple[Float[Array, "B T attended"] | QTensor, Stream],
        cls: Classes,
        tap: Tap | None,
    ) -> Stream:
        """The stream with what attention adds to it; ``parts`` are the heads' results and the
        stream."""
        attended, x = parts
        return self.o_proj(self.attn_out(attended, cls, tap), x)

    def mlp(self, parts: tuple[Stream | QTensor, Stream], cls: Classes, tap: Tap | None) -> Stream:
        """The stream with what the MLP adds to it; ``parts`` are the normed stream and the
        stream."""
        normed, x = parts
        return self.mlp_last(self.hidden(normed, cls, tap), x)


class DecoderBlock(Projections):
    """Pre-norm attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        super().__init__(cfg, place, cfg.qkv_bias, rngs=rngs)
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        self.norms_heads = cfg.qk_norm
        if self.norms_heads:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place.dtype)
        self.prefixed = place.prefix > 0
        if self.prefixed:  # rotated to the positions before a prompt's first
            shape = (cfg.num_kv_heads, place.prefix, cfg.head_dim)
            self.prefix_k = nnx.Param(jnp.zeros(shape, place.dtype))
            self.prefix_v = nnx.Param(jnp.zeros(shape, place.dtype))
        self.stores_rope = isinstance(cfg.rope_scaling, StoredFrequencies)
        if self.stores_rope:  # positions times these are too large for a narrower type
            self.frequencies = nnx.Param(jnp.zeros((cfg.rotary_dim // 2,), jnp.float32))

    def run(self, phase: Phase, h: Any, ctx: DecoderContext, tap: Tap | None) -> Any:
        """One of the :class:`Projections`' methods, on all tokens."""
        return phase(self, h, ctx.token_class, tap)

    def qkv(self, x: Stream, ctx: DecoderContext, tap: Tap | None) -> Projected:
        """Queries, keys and values, not turned yet."""
        h = self.into(self.attn_norm, self.attn_in, x, ctx, tap)
        return self.run(Projections.project, h, ctx, tap)

    def into(
        self, norm: RMSNorm, point: ActQuant, x: Stream, ctx: DecoderContext, tap: Tap | None
    ) -> Stream | QTensor:
        """The normed stream, quantised if one scale per token is known."""
        return norm.into(point, x, ctx.token_class, tap)

    def angles(self, ctx: AttentionContext) -> Float32[Array, "B T slots"] | None:
        if ctx.angles is None or not self.stores_rope:
            return ctx.angles
        return ctx.angles * along_last(self.frequencies.get_value(), ctx.angles)

    def fuses(self, q: QRows, k: KVRows, ctx: AttentionContext) -> bool:
        return not self.prefixed and super().fuses(q, k, ctx)  # no such form knows of a prefix

    def prefix(self) -> Prefix | None:
        return (self.prefix_k.get_value(), self.prefix_v.get_value()) if self.prefixed else None

    def rest(
        self,
        x: Stream,
        attended: Float[Array, "B T attended"] | QTensor,
        ctx: DecoderContext,
        tap: Tap | None,
    ) -> Stream:
        """Output projection and MLP, each added to the residual stream ``x``, and what the context
        adds."""
        x = self.run(Projections.output, (attended, x), ctx, tap)
        h = self.into(self.mlp_norm, self.mlp_in, x, ctx, tap)
        x = self.run(Projections.mlp, (h, x), ctx, tap)
        if ctx.added is None:
            return x
        assert not isinstance(ctx.added, DeepFeatures), "a block is given the context of its layer"
        return x + ctx.added.astype(x.dtype)

    def __call__(self, x: Stream, ctx: DecoderContext, tap: Tap | None = None) -> Stream:
        """Without a cache: queries see the keys of the same call only."""
        return self.rest(x, self.among(*self.qkv(x, ctx, tap), ctx, tap), ctx, tap)

    def cached(
        self,
        x: Stream,
        ctx: DecoderContext,
        cache: tuple[Store, Store],
        layer: Int32[Array, ""],
        cursor: Cursor,
        fresh: bool,
    ) -> tuple[Stream, tuple[Store, Store]]:
        """With a cache: writes this call's keys and values at ``cursor`` of ``layer``.

        Args:
            cache: keys and values of all layers, as a :class:`KVCache` holds them.
            fresh: the cache was empty; attend to this call's keys alone (and ``ctx.seen`` is about
                those).

        Returns:
            The residual stream and the updated ``cache``.
        """
        rows_q, rows_k, rows_v = self.qkv(x, ctx, None)
        q, k, v = self.heads(rows_q, rows_k, rows_v, ctx)
        cache = write(cache, k, v, layer, cursor, ctx.rows)
        if fresh and self.fuses(rows_q, rows_k, ctx):
            attended = self.attend_rows(rows_q, rows_k, rows_v, ctx, None)
            return self.rest(x, attended, ctx, None), cache
        if fresh:
            attended = self.attend(q, k, v, ctx)
        else:
            attended = attend_cache(q, cache, layer, ctx.seen, self.prefix(), ctx.used, ctx.rows)
        return self.rest(x, attended, ctx, None), cache


class ExpertBlock(DecoderBlock):
    """A block whose visual tokens have dense layers of their own; all tokens share the attention.

    Where the visual tokens form one slice (``ctx.visual_slots``), each expert runs on its own
    slice; without visual tokens only the text expert runs. Otherwise both run on all tokens. The
    visual expert's queries, keys and values have biases.
    """

    POINTS: ClassVar[Points] = {
        f"{expert}{point}": tuple(f"{expert}{reader}" for reader in readers)
        for point, readers in Projections.POINTS.items()
        for expert in ("", "visual/")
    }

    def __init__(self, cfg: DecoderConfig, place: Placement, *, rngs: nnx.Rngs):
        super().__init__(cfg, place, rngs=rngs)
        self.visual = Projections(cfg, place.within("visual"), True, "visual/", rngs=rngs)

    def into(
        self, norm: RMSNorm, point: ActQuant, x: Stream, ctx: DecoderContext, tap: Tap | None
    ) -> Stream:
        return norm(x)  # the experts' scales differ

    def known_scale(self, ctx: AttentionContext, tap: Tap | None) -> None:
        return None

    @staticmethod
    def _visual(ctx: DecoderContext) -> jax.Array:
        assert ctx.visual is not None, "a decoder with experts is told which tokens are visual"
        return ctx.visual

    def classes_at(self, point: str, ctx: DecoderContext) -> Classes:
        """Token classes, -1 for tokens that are not of the point's expert."""
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
