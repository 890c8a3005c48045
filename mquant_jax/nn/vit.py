"""The vision transformer: blocks over patches, configured per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.hadamard import Rotation
from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.cache import key_order
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.flow import Flow, ModuleCall, StackCall, run
from mquant_jax.nn.norm import LayerNorm, ProjectedNorm, RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.resample import resample_grid
from mquant_jax.nn.rope import apply_rope, grid_angles
from mquant_jax.nn.stack import SCAN, Runner, stack_layers
from mquant_jax.numerics import AnyArray, QTensor, along_last
from mquant_jax.ops.attention import attend, attend_rows, select_path, split_heads


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


STREAM = "vision"  # the name under which families declare a tower's residual stream
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
        activation: a key of :data:`ACTIVATIONS`.
        rope_theta: base of the 2-D rotary positions; ``None``: the tower has none.
        position_grid: side of the square table of learned positions, in patches; 0: no table.
            Pictures name the rows of their patches; otherwise a picture is a square of patches in
            row-major order, and one of another side uses the resampled table.
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
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_dim: int
    activation: str
    norm_eps: float
    rope_theta: float | None = None
    position_grid: int = 0
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["patches", "coords", "valid", "position_rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class VisionInput:
    """Pictures as rows of patches; attention stays inside a row.

    A row is one image, or one temporal slice of a video, padded to a common number of patches.

    Attributes:
        patches: float32 ``[N, P, patch_dim]``.
        coords: int32 ``[N, P, 2]``, row and column of each patch in its picture.
        valid: bool ``[N, P]``.
        position_rows: int32 ``[N, P]``, the row of the table of learned positions that each patch
            takes, for families that choose them; only in towers without a class token.
    """

    patches: AnyArray
    coords: AnyArray
    valid: AnyArray
    position_rows: AnyArray | None = None

    @property
    def token_class(self) -> jax.Array:
        """int32 ``[N, P]``: 0, or -1 for padding."""
        return jnp.where(self.valid, 0, -1)


@partial(jax.tree_util.register_dataclass, data_fields=["angles", "token_class"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class VisionContext:
    """Rotary angles ``[N, P, head_dim/2]``, if the tower has such positions, and token classes
    ``[N, P]`` (0, or -1 for padding); ``P`` counts the class token."""

    angles: jax.Array | None
    token_class: jax.Array

    @property
    def mask(self) -> jax.Array:
        """bool ``[N, 1, P]``: padding is never a key."""
        return (self.token_class >= 0)[:, None, :]

    @property
    def order(self) -> tuple[jax.Array, jax.Array]:
        """The same as orders of queries and keys, int32 ``[N, P]``."""
        return jnp.zeros_like(self.token_class), key_order(self.token_class * 0, self.token_class)


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


class PatchEmbed(nnx.Module):
    """Patch embedding as a matrix product (kernel and stride of the convolution are equal)."""

    POINTS: ClassVar[Points] = {"patch_in": ("proj",)}

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.patch_in = place.point("patch_in", self.POINTS)
        self.proj = place.dense(
            "proj", cfg.patch_dim, cfg.hidden_size, bias=cfg.patch_bias, rngs=rngs
        )

    def __call__(self, patches: jax.Array, tap: Tap | None = None) -> jax.Array:
        return self.proj(self.patch_in(patches, None, tap))


class ViTBlock(nnx.Module):
    """``x += o_proj(attention(norm(x)))``, then ``x += fc2(act(fc1(norm(x))))``.

    Post-norm, ``x += norm(o_proj(attention(x)))`` and ``x += norm(fc2(act(fc1(x))))``; a rotated
    tower then rotates ``x`` online where it is read. With layer scale, what is added is multiplied
    by ``attn_gain`` and ``mlp_gain [hidden]``; in a rotated tower the output projections have
    absorbed them.
    """

    POINTS: ClassVar[Points] = {
        "attn_in": ("q_proj", "k_proj", "v_proj"),
        "attn_out": ("o_proj",),
        "mlp_in": ("fc1",),
        "mlp_hidden": ("fc2",),
    }

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dense = partial(place.dense, rngs=rngs)

        def point(name: str, rotation: Rotation | None = None) -> ActQuant:
            return place.point(name, self.POINTS, rotation)

        d = cfg.hidden_size
        self.attn_norm = self._norm(place)
        reading = place.read_rotation(d) if cfg.post_norm else None
        into = reading.n if reading else d
        self.attn_in = point("attn_in", rotation=reading)
        # A rotated LayerNorm has left its bias in the layers that read it.
        bias = cfg.qkv_bias or (place.rotated and not cfg.rms_norm and not cfg.post_norm)
        self.q_proj = dense("q_proj", into, d, bias=bias)
        self.k_proj = dense("k_proj", into, d, bias=bias)
        self.v_proj = dense("v_proj", into, d, bias=bias)
        if cfg.qk_norm_eps is not None:
            self.q_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
            self.k_norm = RMSNorm(d, cfg.qk_norm_eps, place.dtype)
        self.attn_out = point("attn_out")
        self.o_proj = dense("o_proj", d, d)
        self.has_gains = cfg.layer_scale and not place.rotated
        if self.has_gains:
            self.attn_gain = nnx.Param(jnp.ones((d,), place.dtype))
            self.mlp_gain = nnx.Param(jnp.ones((d,), place.dtype))
        self.mlp_norm = self._norm(place)
        self.mlp_in = point("mlp_in", rotation=reading)
        self.fc1 = dense("fc1", into, cfg.intermediate_size)
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = point("mlp_hidden", rotation=rotation)
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.fc2 = dense("fc2", hidden, d, split=place.split)

    def _norm(self, place: Placement) -> TowerNorm:
        cfg = self.cfg
        if cfg.post_norm:
            return (RMSNorm if cfg.rms_norm else LayerNorm)(
                cfg.hidden_size, cfg.norm_eps, place.dtype
            )
        return tower_norm(cfg.hidden_size, cfg.norm_eps, place, cfg.rms_norm, cfg.keeps_mean)

    def __call__(self, x: jax.Array, ctx: VisionContext, tap: Tap | None = None) -> jax.Array:
        post = self.cfg.post_norm
        h = self.attn_in(x if post else self._into(self.attn_norm, self.attn_in, x, tap), None, tap)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if self.cfg.qk_norm_eps is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        h = self._attend(q, k, v, ctx, tap)
        x = self._add(x, self.o_proj, self.attn_out(h, None, tap), "attn")
        h = x if post else self._into(self.mlp_norm, self.mlp_in, x, tap)
        h = self.fc1(self.mlp_in(h, None, tap))
        h = self.mlp_hidden(ACTIVATIONS[self.cfg.activation](h), None, tap)
        return self._add(x, self.fc2, h, "mlp")

    def _into(self, norm: TowerNorm, point: ActQuant, x: jax.Array, tap: Tap | None):
        return norm.into(point, x, None, tap) if isinstance(norm, RMSNorm) else norm(x)

    def _attend(self, q, k, v, ctx: VisionContext, tap: Tap | None) -> jax.Array | QTensor:
        """Attention inside each picture: ``[N, P, hidden]`` each -> the same."""
        heads, d = self.cfg.num_heads, self.cfg.head_dim
        gradient = self.attn_out.simulated
        if select_path(q.shape[1], heads, heads, d, q.dtype, gradient=gradient) != "xla":
            scale = self.attn_out.known_scale(None, tap)
            return attend_rows(q, k, v, d, ctx.order, ctx.angles, scale=scale)
        q, k, v = (split_heads(y, d) for y in (q, k, v))
        if ctx.angles is not None:
            q, k = apply_rope(q, ctx.angles), apply_rope(k, ctx.angles)
        return attend(q, jnp.swapaxes(k, 2, 3), v, ctx.mask)

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


class InputNorm(nnx.Module):
    """The LayerNorm before the first block.

    No dense layer writes its output, which has its own weight, bias and mean. A rotated tower
    therefore rotates the output online and leaves patches and positions alone. (The weight would
    turn a rotation of its inputs into a full matrix.)
    """

    POINTS: ClassVar[Points] = {}

    def __init__(self, cfg: ViTConfig, place: Placement):
        self.norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, place.dtype)
        self.rotation = place.entry_rotation(STREAM, cfg.hidden_size)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        x = self.norm(x)
        return x if self.rotation is None else self.rotation(x)


class FinalNorm(nnx.Module):
    """The norm after the last block."""

    POINTS: ClassVar[Points] = {}

    def __init__(self, cfg: ViTConfig, place: Placement):
        self.norm = tower_norm(cfg.hidden_size, cfg.norm_eps, place, cfg.rms_norm, cfg.keeps_mean)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        return self.norm(x)


class ViT(nnx.Module):
    """Patch embedding and blocks. A family's vision module adds its connector and
    ``tokens(patches) -> int``, the visual tokens that it makes of a row of patches. It is the
    model's ``vision``: the names passed to the runner are parameter paths.
    """

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg, place.within("patch_embed"), rngs=rngs)
        if cfg.class_token:
            self.class_token = nnx.Param(jnp.zeros((1, cfg.hidden_size), place.dtype))
        if cfg.position_grid:
            rows = cfg.position_grid**2 + cfg.class_token
            self.positions = nnx.Param(jnp.zeros((rows, cfg.hidden_size), place.dtype))
        layer = place.layer("layers")
        self.layers = stack_layers(lambda r: ViTBlock(cfg, layer, rngs=r), cfg.num_layers, rngs)
        if cfg.input_norm:
            self.input = InputNorm(cfg, place)
        if cfg.final_norm:
            self.final = FinalNorm(cfg, place)

    @property
    def patches_per_token(self) -> int:
        """Rows of patches are padded to a multiple of this."""
        return 1

    @property
    def takes_any_size(self) -> bool:
        """Whether a row may be padded with patches; else its number of patches is its size."""
        return self.cfg.position_grid == 0

    def __call__(self, vision: VisionInput, runner: Runner = SCAN) -> jax.Array:
        """What the vision module hands to the decoder: its whole :meth:`flow`."""
        return run(self.flow(vision), runner)

    def flow(self, vision: VisionInput) -> Flow[jax.Array]:
        """Patches -> visual tokens ``[N, M, hidden]``. Families add their connector here."""
        return self.features(vision)

    def features(self, vision: VisionInput) -> Flow[jax.Array]:
        """Patches -> features ``[N, P, hidden]``; the class token, if there is one, is the first
        (:attr:`ViTConfig.drops_first`).

        Raises:
            ValueError: pictures that are not square, in a tower with learned positions.
        """
        cfg, classes, angles = self.cfg, vision.token_class, None
        x = yield ModuleCall("vision/patch_embed", self.patch_embed, vision.patches, classes)
        if cfg.rope_theta is not None:
            angles = grid_angles(vision.coords, cfg.head_dim, cfg.rope_theta)
        if cfg.class_token:
            token = self.class_token.get_value()
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape)), x], axis=1)
            classes = jnp.concatenate([jnp.max(classes, axis=1, keepdims=True), classes], axis=1)
        if cfg.position_grid:
            x = x + along_last(self._positions(vision), x)
        if cfg.input_norm:
            x = yield ModuleCall("vision/input", self.input, x, classes)
        x = yield StackCall("vision/layers", self.layers, x, VisionContext(angles, classes))
        if cfg.final_norm:
            x = yield ModuleCall("vision/final", self.final, x, classes)
        return self.selected(x)

    def selected(self, x: jax.Array) -> jax.Array:
        """Of each row's tokens ``[N, P, ...]`` those that are features."""
        return x[:, int(self.cfg.drops_first) :]

    def _positions(self, vision: VisionInput) -> jax.Array:
        """Positions ``[N, P, hidden]`` as the pictures choose them, or the table for squares: the
        class token's row, then ``[P, hidden]``."""
        table, grid, patches = (
            self.positions.get_value(), self.cfg.position_grid, vision.patches.shape[1]
        )  # fmt: skip
        if vision.position_rows is not None:
            return table[vision.position_rows]
        side = isqrt(patches)
        if side * side != patches:
            raise ValueError(f"a picture of {patches} patches is not square")
        if side == grid:
            return table
        front = table.shape[0] - grid * grid
        squares = resample_grid(table[front:].astype(jnp.float32), grid, side)
        return jnp.concatenate([table[:front], squares.astype(table.dtype)])
