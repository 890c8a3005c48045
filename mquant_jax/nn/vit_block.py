"""The blocks of a vision transformer: an attention half and an MLP half, configured per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm, RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.positions import PositionTable
from mquant_jax.nn.rope import apply_rope
from mquant_jax.nn.stack import LayeredContext
from mquant_jax.numerics import QTensor, along_last
from mquant_jax.ops.attention import Rows, attend, attend_rows, fused, split_heads
from mquant_jax.ops.visibility import Visibility


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision tower.

    Attributes:
        patch_dim: values per patch.
        activation: a key of :data:`ACTIVATIONS`, or of a gated MLP ``silu``.
        rope_theta: base of the 2-D rotary positions; ``None``: the tower has none.
        positions: table of learned positions; ``None``: there is none.
        class_token: a learned token, with its own position, precedes the patches.
        post_norm: norms follow the sub-layers: each normalises what its sub-layer adds to the
            stream. No rotation commutes with their weights, so they stay unfused in a rotated
            tower.
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
        gated_mlp: ``down(act(gate(x)) * up(x))`` in place of ``fc2(act(fc1(x)))``.
        window: side, in patches, of the square windows that a picture is cut into from its first
            patch; attention stays inside a window. 0: patches see their whole picture.
        full_layers: layers whose patches see their whole picture all the same.
        taps: layers, in rising order, whose whole outputs the connector gets as well.
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
    post_norm: bool = False
    layer_scale: bool = False
    rms_norm: bool = False
    qk_norm_eps: float | None = None
    patch_bias: bool = False
    qkv_bias: bool = True
    input_norm: bool = False
    final_norm: bool = False
    keeps_mean: bool = False
    drops_first: bool = False
    gated_mlp: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()

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


def reading_point(
    name: str, points: Points, cfg: ViTConfig, place: Placement
) -> tuple[ActQuant, int]:
    """The point where half a block reads the stream, and the width of what its layers get.

    A post-norm tower reads the stream itself, which it rotates online.
    """
    rotation = place.read_rotation(cfg.hidden_size) if cfg.post_norm else None
    width = rotation.n if rotation else cfg.hidden_size
    return place.point(name, points, rotation), width


class AttentionPart(nnx.Module):
    """The attention half of a block: dense layers, quantisation points, attention itself."""

    POINTS: ClassVar[Points] = {"attn_in": ("q_proj", "k_proj", "v_proj"), "attn_out": ("o_proj",)}
    cfg: ViTConfig

    def init_attention(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs) -> None:
        dense, d = partial(place.dense, rngs=rngs), cfg.hidden_size
        self.attn_in, into = reading_point("attn_in", self.POINTS, cfg, place)
        # A rotated LayerNorm has left its bias in the layers that read it.
        bias = cfg.qkv_bias or (place.rotated and not cfg.rms_norm and not cfg.post_norm)
        self.q_proj = dense("q_proj", into, d, bias=bias)
        self.k_proj = dense("k_proj", into, d, bias=bias)
        self.v_proj = dense("v_proj", into, d, bias=bias)
        if cfg.qk_norm_eps is not None:
            self.q_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
            self.k_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
        self.attn_out = place.point("attn_out", self.POINTS)
        self.o_proj = dense("o_proj", d, d)

    def attended(
        self, h: jax.Array | QTensor, ctx: VisionContext, tap: Tap | None
    ) -> jax.Array | QTensor:
        """The stream as the block reads it ``[N, P, hidden]`` -> the input of ``o_proj``."""
        h = self.attn_in(h, None, tap)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if self.cfg.qk_norm_eps is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.attn_out(self._attend(q, k, v, ctx, tap), None, tap)

    def _attend(self, q, k, v, ctx: VisionContext, tap: Tap | None) -> jax.Array | QTensor:
        """Attention inside each picture or window: ``[N, P, hidden]`` each -> the same."""
        d, seen = self.cfg.head_dim, ctx.seen
        if fused(Rows.of(q, k, d, seen, self.attn_out.simulated)):
            scale = self.attn_out.known_scale(None, tap)
            return attend_rows(q, k, v, d, seen, ctx.angles, scale=scale)
        q, k, v = (split_heads(y, d) for y in (q, k, v))
        if ctx.angles is not None:
            q, k = apply_rope(q, ctx.angles), apply_rope(k, ctx.angles)
        return attend(q, jnp.swapaxes(k, 2, 3), v, seen)


class MLPPart(nnx.Module):
    """The MLP half of a block.

    Attributes:
        mlp_in: the point where the half reads the stream.
        mlp_last: its last layer, which writes to the stream.
    """

    cfg: ViTConfig
    mlp_in: ActQuant

    @property
    def mlp_last(self) -> Dense:
        raise NotImplementedError

    def init_mlp(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def hidden(self, h: jax.Array | QTensor, tap: Tap | None) -> jax.Array | QTensor:
        """The stream as the block reads it ``[N, P, hidden]`` -> the input of :attr:`mlp_last`."""
        raise NotImplementedError


class PlainMLP(MLPPart):
    """The MLP half of a block: ``fc2(act(fc1(x)))``."""

    POINTS: ClassVar[Points] = {"mlp_in": ("fc1",), "mlp_hidden": ("fc2",)}

    def init_mlp(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs) -> None:
        self.mlp_in, into = reading_point("mlp_in", self.POINTS, cfg, place)
        self.fc1 = place.dense("fc1", into, cfg.intermediate_size, rngs=rngs)
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = place.point("mlp_hidden", self.POINTS, rotation)
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.fc2 = place.dense("fc2", hidden, cfg.hidden_size, split=place.split, rngs=rngs)

    @property
    def mlp_last(self) -> Dense:
        return self.fc2

    def hidden(self, h: jax.Array | QTensor, tap: Tap | None) -> jax.Array | QTensor:
        h = self.fc1(self.mlp_in(h, None, tap))
        return self.mlp_hidden(ACTIVATIONS[self.cfg.activation](h), None, tap)


class GatedMLP(MLPPart):
    """The MLP half of a block: ``down_proj(silu(gate_proj(x)) * up_proj(x))``, all with biases."""

    POINTS: ClassVar[Points] = {"mlp_in": ("gate_proj", "up_proj"), "mlp_hidden": ("down_proj",)}

    def init_mlp(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs) -> None:
        dense, inner = partial(place.dense, rngs=rngs), cfg.intermediate_size
        self.mlp_in, into = reading_point("mlp_in", self.POINTS, cfg, place)
        self.gate_proj = dense("gate_proj", into, inner)
        self.up_proj = dense("up_proj", into, inner)
        # The signs of the rotation are folded into up_proj.
        rotation = place.online_rotation(inner)
        self.mlp_hidden = place.point(
            "mlp_hidden", self.POINTS, rotation and rotation.without_signs()
        )
        hidden = rotation.n if rotation else inner
        self.down_proj = dense("down_proj", hidden, cfg.hidden_size, split=place.split)

    @property
    def mlp_last(self) -> Dense:
        return self.down_proj

    def hidden(self, h: jax.Array | QTensor, tap: Tap | None) -> jax.Array | QTensor:
        h = self.mlp_in(h, None, tap)
        return self.mlp_hidden(self.up_proj(h, gate=self.gate_proj(h)), None, tap)


class _Wiring(AttentionPart, MLPPart):
    """Norms, layer scale and residual stream around an attention and an MLP half.

    ``x += attention(norm(x))``, then ``x += mlp(norm(x))``. Post-norm, ``x += norm(attention(x))``
    and ``x += norm(mlp(x))``; a rotated tower then rotates ``x`` online where it is read. With
    layer scale, what is added is multiplied by ``attn_gain`` and ``mlp_gain [hidden]``; in a
    rotated tower the output projections have absorbed them.
    """

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.hidden_size
        self.attn_norm = self._norm(place)
        self.init_attention(cfg, place, rngs=rngs)
        self.has_gains = cfg.layer_scale and not place.rotated
        if self.has_gains:
            self.attn_gain = nnx.Param(jnp.ones((d,), place.dtype))
            self.mlp_gain = nnx.Param(jnp.ones((d,), place.dtype))
        self.mlp_norm = self._norm(place)
        self.init_mlp(cfg, place, rngs=rngs)

    def _norm(self, place: Placement) -> TowerNorm:
        cfg = self.cfg
        if cfg.post_norm:
            return (RMSNorm if cfg.rms_norm else LayerNorm)(
                cfg.hidden_size, cfg.norm_eps, place.dtype
            )
        return tower_norm(cfg.hidden_size, cfg.norm_eps, place, cfg.rms_norm, cfg.keeps_mean)

    def __call__(self, x: jax.Array, ctx: VisionContext, tap: Tap | None = None) -> jax.Array:
        h = self.attended(self._read(self.attn_norm, self.attn_in, x, tap), ctx, tap)
        x = self._add(x, self.o_proj, h, "attn")
        h = self.hidden(self._read(self.mlp_norm, self.mlp_in, x, tap), tap)
        return self._add(x, self.mlp_last, h, "mlp")

    def _read(self, norm: TowerNorm, point: ActQuant, x: jax.Array, tap: Tap | None):
        """The stream as a half of the block reads it."""
        if self.cfg.post_norm:
            return x
        return norm.into(point, x, None, tap) if isinstance(norm, RMSNorm) else norm(x)

    def _add(self, x: jax.Array, dense: Dense, h: jax.Array | QTensor, half: str) -> jax.Array:
        """The stream with what one half of the block adds to it."""
        if not (self.cfg.post_norm or self.has_gains):
            return dense(h, x)
        y = dense(h)
        if self.cfg.post_norm:
            y = getattr(self, f"{half}_norm")(y)
        if self.has_gains:
            y = y * along_last(getattr(self, f"{half}_gain").get_value(), y)
        return x + y


class ViTBlock(_Wiring, PlainMLP):
    """A block with a plain MLP."""

    POINTS: ClassVar[Points] = {**AttentionPart.POINTS, **PlainMLP.POINTS}


class GatedViTBlock(_Wiring, GatedMLP):
    """A block with a gated MLP."""

    POINTS: ClassVar[Points] = {**AttentionPart.POINTS, **GatedMLP.POINTS}


def vit_block(cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs) -> ViTBlock | GatedViTBlock:
    """A block of the tower's kind."""
    return (GatedViTBlock if cfg.gated_mlp else ViTBlock)(cfg, place, rngs=rngs)
