"""The blocks of a vision transformer: an attention half and an MLP half, configured per family."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.attention import Attention, AttentionContext, HeadShape, Projected
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.mlp import MLP, GatedMLP, PlainMLP
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm, RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.positions import PositionTable
from mquant_jax.nn.stack import LayeredContext
from mquant_jax.numerics import QTensor, along_last
from mquant_jax.ops.visibility import Visibility
from mquant_jax.shapes import Array, Float, Int32

Stream = Float[Array, "N P hidden"]
Classes = Int32[Array, "N P"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision tower.

    Attributes:
        patch_dim: values per patch.
        activation: of a plain MLP, a key of :data:`~mquant_jax.nn.mlp.ACTIVATIONS`.
        rope_theta: base of the 2-D rotary positions; ``None``: the tower has none.
        positions: table of learned positions; ``None``: there is none.
        class_token: a learned token, with its own position, precedes the patches.
        layer_scale: a learned vector multiplies what a sub-layer adds to the stream.
        rms_norm: RMSNorms in place of LayerNorms.
        qk_norm_eps: epsilon of an RMSNorm over all heads' queries, and one over their keys;
            ``None``: there are none.
        input_norm: a LayerNorm after the positions produces the input of the first block.
        final_norm: a norm follows the last block; in a rotated tower its reader in the connector
            absorbs its weight and bias.
        keeps_mean: the connector uses the mean of the stream, which a rotation must therefore
            keep.
        drops_first: the features leave the first token out, whatever it is: the class token, or in
            a tower without one the first patch.
        window: side, in patches, of the square windows that a picture is cut into from its first
            patch; attention stays inside a window. 0: patches see their whole picture.
        full_layers: layers whose patches see their whole picture all the same.
        taps: layers, in rising order, whose whole outputs the connector gets as well.
        block: the kind of its blocks.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_dim: int
    activation: str
    norm_eps: float
    rope_theta: float | None = None
    positions: PositionTable | None = None
    class_token: bool = False
    layer_scale: bool = False
    rms_norm: bool = False
    qk_norm_eps: float | None = None
    patch_bias: bool = False
    qkv_bias: bool = True
    input_norm: bool = False
    final_norm: bool = False
    keeps_mean: bool = False
    drops_first: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    block: type[ViTBlock] = dataclasses.field(default_factory=lambda: ViTBlock)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_grid(self) -> int:
        """Side of the table of learned positions, in patches; 0: there is none."""
        return 0 if self.positions is None else self.positions.side


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles", "token_class", "inside", "full"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class VisionContext(LayeredContext):
    """What every block needs beside the residual stream; ``P`` counts the class token.

    Attributes:
        angles: rotary angles ``[N, P, head_dim/2]``; ``None``: the tower has no such positions.
        token_class: int32 ``[N, P]``, 0, or -1 for padding.
        inside: what patches see in layers with windows; ``None``: there are none.
        full: bool ``[layers]``, or for a single layer ``[N, 1]``: patches see their whole picture;
            ``None`` without windows.
    """

    angles: jax.Array | None
    token_class: jax.Array
    inside: Visibility | None = None
    full: jax.Array | None = None

    @property
    def layered(self) -> bool:
        return self.full is not None

    def at_layer(self, layer: Any) -> VisionContext:
        if self.full is None:
            return self
        one = jnp.broadcast_to(self.full[layer], (len(self.token_class), 1))
        return dataclasses.replace(self, full=one)

    @property
    def seen(self) -> Visibility:
        """Which patches of its picture or window each sees."""
        if self.inside is None or self.full is None:
            return Visibility.of_keys(self.token_class >= 0, self.token_class.shape[1])
        windows = self.inside.top
        top = jnp.where(self.full, jnp.max(windows, axis=1, keepdims=True), windows)
        low = jnp.where(self.full, 0, windows)
        return dataclasses.replace(self.inside, top=top, low=low, lifted=self.full)


TowerNorm = LayerNorm | RMSNorm | ProjectedNorm


def tower_norm(
    width: int, eps: float, place: Placement, rms: bool = False, keeps_mean: bool = False
) -> TowerNorm:
    """LayerNorm; in a rotated tower, whose stream has no mean left, the RMSNorm that equals it.

    Args:
        rms: RMSNorm in both.
        keeps_mean: the rotated stream has its mean still, and the norm must take it out.
    """
    rotated = ProjectedNorm if keeps_mean else RMSNorm
    kind = RMSNorm if rms else rotated if place.rotated else LayerNorm
    return kind(width, eps, place.dtype)


class _Wiring(Attention, MLP):
    """Norms, layer scale and residual stream around an attention and an MLP half.

    ``x += attention(norm(x))``, then ``x += mlp(norm(x))``. With layer scale, what is added is
    multiplied by ``attn_gain`` and ``mlp_gain [hidden]``; in a rotated tower the layers that write
    have absorbed them.

    Attributes:
        FUSES_NORMS: the norms commute with a rotation once their readers have absorbed their
            weights, so that a rotated tower has a rotated stream. Else the stream takes none, and
            is rotated online where it is read.
    """

    FUSES_NORMS: ClassVar[bool] = True

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        assert self.FUSES_NORMS or not cfg.layer_scale, "a norm comes between layer and gain"
        d = cfg.hidden_size
        reading = None if self.FUSES_NORMS else place.read_rotation(d)
        self.attn_norm, self.mlp_norm = self.norm(cfg, place), self.norm(cfg, place)
        # A norm that lost its bias to a rotation has left it in the layers that read it.
        moved = not cfg.rms_norm and not isinstance(self.attn_norm, LayerNorm)
        self.init_attention(
            d, HeadShape(cfg.num_heads, cfg.num_heads, cfg.head_dim), place,
            qkv_bias=cfg.qkv_bias or moved, o_bias=True, reading=reading, rngs=rngs,
        )  # fmt: skip
        self.norms_rows = cfg.qk_norm_eps is not None
        if cfg.qk_norm_eps is not None:
            self.q_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
            self.k_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
        self.has_gains = cfg.layer_scale and not place.rotated
        if self.has_gains:
            self.attn_gain = nnx.Param(jnp.ones((d,), place.dtype))
            self.mlp_gain = nnx.Param(jnp.ones((d,), place.dtype))
        self.activation = cfg.activation
        self.init_mlp(d, cfg.intermediate_size, place, reading=reading, rngs=rngs)

    @staticmethod
    def norm(cfg: ViTConfig, place: Placement) -> TowerNorm:
        """A norm of the block."""
        return tower_norm(cfg.hidden_size, cfg.norm_eps, place, cfg.rms_norm, cfg.keeps_mean)

    def project(self, h: Stream | QTensor, token_class: Classes, tap: Tap | None) -> Projected:
        q, k, v = super().project(h, token_class, tap)
        return (self.q_norm(q), self.k_norm(k), v) if self.norms_rows else (q, k, v)

    def __call__(self, x: Stream, ctx: VisionContext, tap: Tap | None = None) -> Stream:
        cls = ctx.token_class
        rows = self.project(self.read(self.attn_norm, self.attn_in, x, cls, tap), cls, tap)
        seen = AttentionContext(ctx.angles, ctx.seen, cls)
        h = self.attn_out(self.among(*rows, seen, tap), cls, tap)
        x = self.add(x, self.o_proj, h, "attn")
        h = self.hidden(self.read(self.mlp_norm, self.mlp_in, x, cls, tap), cls, tap)
        return self.add(x, self.mlp_last, h, "mlp")

    def read(
        self, norm: TowerNorm, point: ActQuant, x: Stream, cls: Classes, tap: Tap | None
    ) -> Stream | QTensor:
        """The stream as a half reads it."""
        return norm.into(point, x, cls, tap) if isinstance(norm, RMSNorm) else norm(x)

    def add(self, x: Stream, dense: Dense, h: Float[Array, "N P K"] | QTensor, half: str) -> Stream:
        """The stream with what a half adds to it."""
        if not self.has_gains:
            return dense(h, x)
        y = dense(h)
        return x + y * along_last(getattr(self, f"{half}_gain").get_value(), y)


class ViTBlock(_Wiring, PlainMLP):
    """A pre-norm block with a plain MLP."""

    POINTS: ClassVar[Points] = {**Attention.POINTS, **PlainMLP.POINTS}


class GatedViTBlock(_Wiring, GatedMLP):
    """A pre-norm block with a gated MLP."""

    POINTS: ClassVar[Points] = {**Attention.POINTS, **GatedMLP.POINTS}


class PostNormViTBlock(ViTBlock):
    """``x += norm(attention(x))``, then ``x += norm(mlp(x))``."""

    FUSES_NORMS = False

    @staticmethod
    def norm(cfg: ViTConfig, place: Placement) -> TowerNorm:
        return (RMSNorm if cfg.rms_norm else LayerNorm)(cfg.hidden_size, cfg.norm_eps, place.dtype)

    def read(
        self, norm: TowerNorm, point: ActQuant, x: Stream, cls: Classes, tap: Tap | None
    ) -> Stream:
        return x

    def add(self, x: Stream, dense: Dense, h: Float[Array, "N P K"] | QTensor, half: str) -> Stream:
        return x + getattr(self, f"{half}_norm")(dense(h))
