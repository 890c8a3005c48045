"""The vision transformer: pre-norm blocks over patches, configured per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.norm import LayerNorm, RMSNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import apply_rope, grid_angles
from mquant_jax.nn.stack import SCAN, Runner, stack_layers
from mquant_jax.ops.attention import attend


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision tower with 2-D rotary positions."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_dim: int
    activation: str
    norm_eps: float
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@partial(
    jax.tree_util.register_dataclass, data_fields=["patches", "coords", "valid"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class VisionInput:
    """Pictures as rows of patches; attention stays inside a row.

    A row is one image, or one temporal slice of a video, padded to a common number of patches.

    Attributes:
        patches: float32 ``[N, P, patch_dim]``.
        coords: int32 ``[N, P, 2]``, row and column of each patch in its picture.
        valid: bool ``[N, P]``.
    """

    patches: jax.Array
    coords: jax.Array
    valid: jax.Array

    @property
    def token_class(self) -> jax.Array:
        """int32 ``[N, P]``: 0, or -1 for padding."""
        return jnp.where(self.valid, 0, -1)


@partial(
    jax.tree_util.register_dataclass, data_fields=["angles", "token_class"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class VisionContext:
    """Rotary angles ``[N, P, head_dim/2]`` and token classes ``[N, P]`` (0, or -1 for padding)."""

    angles: jax.Array
    token_class: jax.Array

    @property
    def mask(self) -> jax.Array:
        """bool ``[N, 1, P]``: padding is never a key."""
        return (self.token_class >= 0)[:, None, :]


def tower_norm(width: int, eps: float, place: Placement) -> LayerNorm | RMSNorm:
    """LayerNorm; in a rotated tower, whose stream has no mean left, the RMSNorm that equals it."""
    return (RMSNorm if place.rotated else LayerNorm)(width, eps, place.dtype)


class PatchEmbed(nnx.Module):
    """Patch embedding as a matrix product (kernel and stride of the convolution are equal)."""

    POINTS: ClassVar[Points] = {"patch_in": ("proj",)}

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.patch_in = ActQuant("patch_in", place.section)
        self.proj = Dense(
            cfg.patch_dim, cfg.hidden_size, bias=False, section=place.section, dtype=place.dtype,
            rngs=rngs,
        )  # fmt: skip

    def __call__(self, patches: jax.Array, tap: Tap | None = None) -> jax.Array:
        return self.proj(self.patch_in(patches, None, tap))


class ViTBlock(nnx.Module):
    """``x += o_proj(attention(norm(x)))``, then ``x += fc2(act(fc1(norm(x))))``."""

    POINTS: ClassVar[Points] = {
        "attn_in": ("q_proj", "k_proj", "v_proj"),
        "attn_out": ("o_proj",),
        "mlp_in": ("fc1",),
        "mlp_hidden": ("fc2",),
    }

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dense = partial(Dense, section=place.section, dtype=place.dtype, rngs=rngs)
        point = partial(ActQuant, section=place.section)
        d = cfg.hidden_size
        self.attn_norm = tower_norm(d, cfg.norm_eps, place)
        self.attn_in = point("attn_in")
        self.q_proj, self.k_proj, self.v_proj = dense(d, d), dense(d, d), dense(d, d)
        self.attn_out = point("attn_out")
        self.o_proj = dense(d, d)
        self.mlp_norm = tower_norm(d, cfg.norm_eps, place)
        self.mlp_in = point("mlp_in")
        self.fc1 = dense(d, cfg.intermediate_size)
        rotation = place.online_rotation(cfg.intermediate_size)
        self.mlp_hidden = point("mlp_hidden", rotation=rotation)
        hidden = rotation.n if rotation else cfg.intermediate_size
        self.fc2 = dense(hidden, d, split=place.split)

    def __call__(self, x: jax.Array, ctx: VisionContext, tap: Tap | None = None) -> jax.Array:
        h = self.attn_in(self.attn_norm(x), None, tap)
        q, k, v = (
            jnp.swapaxes(y.reshape(*y.shape[:-1], -1, self.cfg.head_dim), 1, 2)
            for y in (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        )
        h = attend(apply_rope(q, ctx.angles), apply_rope(k, ctx.angles), v, ctx.mask)
        x = x + self.o_proj(self.attn_out(h, None, tap))
        h = self.fc1(self.mlp_in(self.mlp_norm(x), None, tap))
        h = ACTIVATIONS[self.cfg.activation](h)
        return x + self.fc2(self.mlp_hidden(h, None, tap))


class ViT(nnx.Module):
    """Patch embedding and blocks. A family's vision module extends it with its connector, and
    stands as ``vision`` in the model: the names given to the runner are those of the parameters.
    """

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg, place, rngs=rngs)
        self.layers = stack_layers(lambda r: ViTBlock(cfg, place, rngs=r), cfg.num_layers, rngs)

    def features(self, vision: VisionInput, runner: Runner = SCAN) -> jax.Array:
        """Patches -> features ``[N, P, hidden]``."""
        angles = grid_angles(vision.coords, self.cfg.head_dim, self.cfg.rope_theta)
        ctx = VisionContext(angles, vision.token_class)
        x = runner.module("vision/patch_embed", self.patch_embed, vision.patches, ctx.token_class)
        return runner.layers("vision/layers", self.layers, x, ctx)
