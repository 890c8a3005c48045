"""The perceiver resampler: learned queries attend to a picture's features, once."""

from __future__ import annotations

import dataclasses
from math import isqrt
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.resample import resample_grid
from mquant_jax.nn.vit import VisionInput, ViT
from mquant_jax.nn.vit_block import TowerNorm, ViTConfig, tower_norm
from mquant_jax.numerics import AnyArray, along_last
from mquant_jax.ops.attention import attend
from mquant_jax.ops.visibility import Visibility
from mquant_jax.recipe import Recipe
from mquant_jax.shapes import Array, Bool, Float, Float32, Int32

# Queries; keys and values, concatenated; which of these are real.
Pooled = tuple[Float[Array, "N Q width"], Float[Array, "N P 2*width"], Bool[AnyArray, "N P"]]


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Shape of a resampler.

    Attributes:
        features: width of the tower's features.
        width: of the queries, of everything inside and of what comes out.
        heads: of the attention.
        queries: visual tokens of a picture.
        norm_eps: of its LayerNorms.
        stored_positions: keys and queries add a learned table, ``[queries, width]`` of a square of
            queries, resampled to the square of patches for the keys. Without it keys alone have
            positions, fixed sines and cosines.
        kv_bias: a rotated ``kv_proj`` has a bias, absorbed from the tower's final norm.
    """

    features: int
    width: int
    heads: int
    queries: int
    norm_eps: float = 1e-6
    stored_positions: bool = False
    kv_bias: bool = False

    @property
    def projects(self) -> bool:
        """Whether features are projected to the resampler's width first."""
        return self.features != self.width


def sincos(coords: Int32[AnyArray, "N P 2"], width: int) -> Float32[Array, "N P {width}"]:
    """Fixed positions of patches by row and column.

    The first half encodes the column, the second the row; each holds sines, then cosines.
    """
    rates = 10000.0 ** -(jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    places = coords[..., ::-1, None].astype(jnp.float32)
    angles = places * along_last(rates, places)  # [N, P, 2, width / 4]
    halves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return halves.reshape(*coords.shape[:-1], width)


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """``[N, T, heads * d]`` -> ``[N, heads, T, d]``."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, -1), 1, 2)


class Keys(nnx.Module):
    """Features and their positions -> keys and values, concatenated.

    Positions are added to keys only, after the norm. A rotated model therefore keeps this
    LayerNorm: folding its weight into ``k_proj`` would divide the positions by it, and small
    weights would make them huge. Keys and values are rotated online instead.

    Features as wide as the queries are not projected; such a model stays float.
    """

    POINTS: ClassVar[Points] = {"kv_in": ("kv_proj",), "k_in": ("k_proj",), "v_in": ("v_proj",)}

    def __init__(self, cfg: ResamplerConfig, place: Placement, *, rngs: nnx.Rngs):
        self.cfg, out = cfg, cfg.width
        if cfg.projects:
            self.kv_in = place.point("kv_in", self.POINTS)
            bias = cfg.kv_bias and place.rotated
            self.kv_proj = place.dense("kv_proj", cfg.features, out, bias=bias, rngs=rngs)
        self.norm = LayerNorm(out, cfg.norm_eps, place.dtype)
        if cfg.stored_positions:
            self.positions = nnx.Param(jnp.zeros((cfg.queries, out), place.dtype))
        rotation = place.online_rotation(out)
        self.k_in = place.point("k_in", self.POINTS, rotation)
        self.v_in = place.point("v_in", self.POINTS, rotation)
        inner = rotation.n if rotation else out
        self.k_proj = place.dense("k_proj", inner, out, rngs=rngs)
        self.v_proj = place.dense("v_proj", inner, out, rngs=rngs)

    def __call__(
        self,
        x: tuple[Float[Array, "N P features"], Int32[AnyArray, "N P 2"]],
        tap: Tap | None = None,
    ) -> Float[Array, "N P {2*self.cfg.width}"]:
        """Features and their rows and columns -> keys and values."""
        features, coords = x
        if self.cfg.projects:
            features = self.kv_proj(self.kv_in(features, None, tap))
        h = self.norm(features)
        placed = h + along_last(self._places(coords).astype(h.dtype), h)
        k = self.k_proj(self.k_in(placed, None, tap))
        return jnp.concatenate([k, self.v_proj(self.v_in(h, None, tap))], axis=-1)

    def _places(self, coords: AnyArray) -> jax.Array:
        """float32 ``[N, P, width]``; or ``[P, width]``, of a square of patches row by row."""
        if not self.cfg.stored_positions:
            return sincos(coords, self.cfg.width)
        table = self.positions.get_value().astype(jnp.float32)
        side, old = isqrt(coords.shape[1]), isqrt(self.cfg.queries)
        return table if side == old else resample_grid(table, old, side)


class Queries(nnx.Module):
    """The learned queries, normed, placed and projected; with positions as in :class:`Keys`."""

    POINTS: ClassVar[Points] = {"q_in": ("q_proj",)}

    def __init__(self, cfg: ResamplerConfig, place: Placement, *, rngs: nnx.Rngs):
        width = cfg.width
        self.placed = cfg.stored_positions
        rotation = None
        if self.placed:
            self.norm: TowerNorm = LayerNorm(width, cfg.norm_eps, place.dtype)
            self.positions = nnx.Param(jnp.zeros((cfg.queries, width), place.dtype))
            rotation = place.online_rotation(width)
        else:
            self.norm = tower_norm(width, cfg.norm_eps, place)
        self.q_in = place.point("q_in", self.POINTS, rotation)
        inner = rotation.n if rotation else width
        self.q_proj = place.dense("q_proj", inner, width, rngs=rngs)

    def __call__(
        self, query: Float[Array, "1 Q width"], tap: Tap | None = None
    ) -> Float[Array, "1 Q width"]:
        h = self.norm(query)
        if self.placed:
            h = h + self.positions.get_value()[None]
        return self.q_proj(self.q_in(h, None, tap))


class Resampler(nnx.Module):
    """Queries attend to a picture's keys; output projection, norm and a last projection."""

    POINTS: ClassVar[Points] = {"attn_out": ("out_proj",), "proj_in": ("proj",)}

    def __init__(self, cfg: ResamplerConfig, place: Placement, *, rngs: nnx.Rngs):
        width = cfg.width
        self.heads = cfg.heads
        self.attn_out = place.point("attn_out", self.POINTS)
        self.out_proj = place.dense("out_proj", width, width, rngs=rngs)
        self.norm = tower_norm(width, cfg.norm_eps, place)
        self.proj_in = place.point("proj_in", self.POINTS)
        # Published without a bias; a rotated model's comes from the folded norm.
        self.proj = place.dense("proj", width, width, bias=place.rotated, rngs=rngs)

    def pool(self, x: Pooled, tap: Tap | None = None) -> Float[Array, "N Q width"]:
        """The attention output for each picture, before the norm."""
        q, kv, valid = x
        k, v = jnp.split(kv, 2, axis=-1)
        q, k, v = (_heads(y, self.heads) for y in (q, k, v))
        h = attend(q, jnp.swapaxes(k, 2, 3), v, Visibility.of_keys(valid, q.shape[2]))
        return self.out_proj(self.attn_out(h, None, tap))

    def __call__(self, x: Pooled, tap: Tap | None = None) -> Float[Array, "N Q width"]:
        """Visual tokens of each picture."""
        return self.proj(self.proj_in(self.norm(self.pool(x, tap)), None, tap))


class ResampledViT(ViT):
    """Vision tower and resampler.

    The resampler is three modules, as a module's points all see the same rows: patches, the
    queries, or the queries of every picture.
    """

    def __init__(
        self, tower: ViTConfig, cfg: ResamplerConfig, recipe: Recipe, dtype: Any, *, rngs: nnx.Rngs
    ):
        super().__init__(tower, Placement.of(recipe, "vision", dtype), rngs=rngs)

        def place(name: str) -> Placement:
            return Placement.of(recipe, f"vision/{name}", dtype)

        self.query = nnx.Param(jnp.zeros((cfg.queries, cfg.width), dtype))
        self.keys = Keys(cfg, place("keys"), rngs=rngs)
        self.queries = Queries(cfg, place("queries"), rngs=rngs)
        self.merger = Resampler(cfg, place("merger"), rngs=rngs)

    def tokens(self, patches: int) -> int:
        return self.query.get_value().shape[0]

    def flow(self, vision: VisionInput) -> Flow[Float[Array, "N Q width"]]:
        """Pictures -> visual tokens of the decoder."""
        x = yield from self.features(vision)
        kv = yield ModuleCall("vision/keys", self.keys, (x, vision.coords), vision.token_class)
        query = self.query.get_value()[None]
        q = yield ModuleCall(
            "vision/queries", self.queries, query, jnp.zeros(query.shape[:2], jnp.int32)
        )
        q = jnp.broadcast_to(q, (len(x), *q.shape[1:]))
        pictures = jnp.max(vision.token_class, axis=1, keepdims=True)  # -1: all of it is padding
        classes = jnp.broadcast_to(pictures, q.shape[:2])
        return (yield ModuleCall("vision/merger", self.merger, (q, kv, vision.valid), classes))
