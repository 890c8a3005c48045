"""The attention half of a block: dense layers, quantisation points, attention among tokens."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.hadamard import Rotation
from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import apply_rope
from mquant_jax.numerics import QTensor, Scale
from mquant_jax.ops.attention import Rows, attend, attend_rows, fused, split_heads
from mquant_jax.ops.attention_xla import Keys, Prefix, Values
from mquant_jax.ops.visibility import Visibility
from mquant_jax.shapes import Array, Float, Float32, Int32

QRows = Float[Array, "B T q_width"]  # queries as projections give them
KVRows = Float[Array, "B T kv_width"]  # keys or values as projections give them
# Queries, keys and values, as rows and as heads.
Projected = tuple[QRows, KVRows, KVRows]
Heads = tuple[
    Float[Array, "B heads T d"], Float[Array, "B kv_heads d T"], Float[Array, "B kv_heads T d"]
]


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """Heads of queries, heads of keys and values, and their width."""

    count: int
    kv_count: int
    width: int


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What attention needs beside queries, keys and values.

    Attributes:
        angles: rotary angles float32 ``[B, T, rotary slots]``; positions where each layer has
            frequencies of its own; ``None``: there are no such positions.
        seen: which keys each token sees.
        token_class: int32 ``[B, T]``, -1 for padding.
        query_gain: float32 ``[B, T]``, factor on the rotated queries; ``None``: there is none.
    """

    angles: jax.Array | None
    seen: Visibility
    token_class: jax.Array
    query_gain: jax.Array | None = None


class Attention(nnx.Module):
    """Attention of a call's tokens among each other, grouped queries included.

    Rows are what :meth:`project` gives, heads what :meth:`heads` makes of them.

    Attributes:
        POINTS: the layers that read the stream and, alone, the one that writes to it.
        norms_heads: the heads of queries and of keys pass ``q_norm`` and ``k_norm`` before rope.
    """

    POINTS: ClassVar[Points] = {"attn_in": ("q_proj", "k_proj", "v_proj"), "attn_out": ("o_proj",)}
    norms_heads: bool = False

    def init_attention(
        self,
        width: int,
        heads: HeadShape,
        place: Placement,
        *,
        qkv_bias: bool,
        o_bias: bool,
        reading: Rotation | None = None,
        prefix: str = "",
        rngs: nnx.Rngs,
    ) -> None:
        """
        Args:
            width: channels of the stream.
            reading: online rotation of the stream.
            prefix: of the points' names.
        """
        dense, q, kv = partial(place.dense, rngs=rngs), heads.count, heads.kv_count
        into = reading.n if reading else width
        self.head_dim = heads.width
        self.attn_in = place.point("attn_in", Attention.POINTS, reading, prefix)
        self.q_proj = dense("q_proj", into, q * heads.width, bias=qkv_bias)
        self.k_proj = dense("k_proj", into, kv * heads.width, bias=qkv_bias)
        self.v_proj = dense("v_proj", into, kv * heads.width, bias=qkv_bias)
        self.attn_out = place.point("attn_out", Attention.POINTS, None, prefix)
        self.o_proj = dense("o_proj", q * heads.width, width, bias=o_bias)

    def project(
        self,
        h: Float[Array, "B T width"] | QTensor,
        token_class: Int32[Array, "B T"],
        tap: Tap | None,
    ) -> Projected:
        """Queries, keys and values of the stream as the half reads it."""
        x = self.attn_in(h, token_class, tap)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def normed(self, x: Float[Array, "*heads d"], norm: str) -> Float[Array, "*heads d"]:
        """Queries or keys after their norm, if each head has one."""
        return getattr(self, norm)(x) if self.norms_heads else x

    def angles(self, ctx: AttentionContext) -> Float32[Array, "B T slots"] | None:
        """Rotary angles."""
        return ctx.angles

    def prefix(self) -> Prefix | None:
        """Keys and values that every token sees."""
        return None

    def known_scale(self, ctx: AttentionContext, tap: Tap | None) -> Scale | None:
        """See :meth:`~mquant_jax.nn.act_quant.ActQuant.known_scale` of ``attn_out``."""
        return self.attn_out.known_scale(ctx.token_class, tap)

    def heads(self, q: QRows, k: KVRows, v: KVRows, ctx: AttentionContext) -> Heads:
        """Heads of rows, queries and keys normed and rotated."""
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))
        q, k = self.normed(q, "q_norm"), self.normed(k, "k_norm")
        angles = self.angles(ctx)
        if angles is not None:
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        if ctx.query_gain is not None:
            q = q * ctx.query_gain[:, None, :, None].astype(q.dtype)
        return q, jnp.swapaxes(k, 2, 3), v

    def fuses(self, q: QRows, k: KVRows, ctx: AttentionContext) -> bool:
        """Whether :meth:`attend_rows` runs for such rows."""
        return fused(Rows.of(q, k, self.head_dim, ctx.seen, self.attn_out.simulated))

    def attend_rows(
        self, q: QRows, k: KVRows, v: KVRows, ctx: AttentionContext, tap: Tap | None
    ) -> QRows | QTensor:
        """Attention of rows; quantised if one scale per token is known for all of them."""
        if self.norms_heads:
            q, k = (
                self.normed(y.reshape(*y.shape[:-1], -1, self.head_dim), name).reshape(y.shape)
                for y, name in ((q, "q_norm"), (k, "k_norm"))
            )
        scale = self.known_scale(ctx, tap)
        return attend_rows(
            q, k, v, self.head_dim, ctx.seen, self.angles(ctx), ctx.query_gain, scale
        )

    def attend(
        self, q: Float[Array, "B heads T d"], k: Keys, v: Values, ctx: AttentionContext
    ) -> Float[Array, "B T heads*d"]:
        """Attention of heads to the keys given and to the prefix, if there is one."""
        return attend(q, k, v, ctx.seen, self.prefix())

    def among(
        self, q: QRows, k: KVRows, v: KVRows, ctx: AttentionContext, tap: Tap | None
    ) -> QRows | QTensor:
        """Attention of rows in whichever form runs: the input of ``attn_out``."""
        if self.fuses(q, k, ctx):
            return self.attend_rows(q, k, v, ctx, tap)
        return self.attend(*self.heads(q, k, v, ctx), ctx)
