"""MiniCPM-V: a SigLIP tower over slices, a resampler of learned queries and the generic decoder."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.base import VLM
from models.minicpmv.config import MiniCPMVConfig
from mquant_jax.nn.act_quant import ActQuant, Points, Tap
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.stack import SCAN, Runner
from mquant_jax.nn.vit import VisionInput, ViT, tower_norm
from mquant_jax.ops.attention import attend
from mquant_jax.recipe import Recipe

NORM_EPS = 1e-6  # of the resampler's norms; in no config


def sincos(coords: jax.Array, width: int) -> jax.Array:
    """Fixed positions: int32 ``[N, P, 2]`` (row, column) -> float32 ``[N, P, width]``.

    The first half tells the column, the second the row; each is its sines, then its cosines.
    """
    rates = 10000.0 ** -(jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    angles = coords[..., ::-1, None].astype(jnp.float32) * rates  # [N, P, 2, width / 4]
    halves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return halves.reshape(*coords.shape[:-1], width)


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """``[N, T, heads * d]`` -> ``[N, heads, T, d]``."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, -1), 1, 2)


class Keys(nnx.Module):
    """Features and where they stand -> keys and values, side by side.

    Positions enter keys alone, behind the norm. That is why a rotated model keeps this LayerNorm:
    had its weight gone into ``k_proj``, the positions would have to be divided by it, and small
    weights would make them huge. Keys and values are rotated online instead.

    Features as wide as the decoder are not projected; such a model stays float (see ``streams``).
    """

    POINTS: ClassVar[Points] = {"kv_in": ("kv_proj",), "k_in": ("k_proj",), "v_in": ("v_proj",)}

    def __init__(self, config: MiniCPMVConfig, place: Placement, *, rngs: nnx.Rngs):
        into, out = config.vision.hidden_size, config.language.hidden_size
        section, dtype = place.section, place.dtype
        self.width = out
        self.projected = config.has_kv_proj
        if self.projected:
            self.kv_in = ActQuant("kv_in", section)
            # The bias is what the tower's last norm leaves behind.
            self.kv_proj = Dense(
                into, out, bias=place.rotated, section=section, dtype=dtype, rngs=rngs
            )
        self.norm = LayerNorm(out, NORM_EPS, dtype)
        rotation = place.online_rotation(out)
        self.k_in = ActQuant("k_in", section, rotation=rotation)
        self.v_in = ActQuant("v_in", section, rotation=rotation)
        inner = rotation.n if rotation else out
        self.k_proj = Dense(inner, out, section=section, dtype=dtype, rngs=rngs)
        self.v_proj = Dense(inner, out, section=section, dtype=dtype, rngs=rngs)

    def __call__(self, x: tuple[jax.Array, jax.Array], tap: Tap | None = None) -> jax.Array:
        """Features ``[N, P, width]`` and int32 ``[N, P, 2]`` -> ``[N, P, 2 * hidden]``."""
        features, coords = x
        if self.projected:
            features = self.kv_proj(self.kv_in(features, None, tap))
        h = self.norm(features)
        placed = h + sincos(coords, self.width).astype(h.dtype)
        k = self.k_proj(self.k_in(placed, None, tap))
        return jnp.concatenate([k, self.v_proj(self.v_in(h, None, tap))], axis=-1)


class Queries(nnx.Module):
    """The learned queries, normed and projected."""

    POINTS: ClassVar[Points] = {"q_in": ("q_proj",)}

    def __init__(self, width: int, place: Placement, *, rngs: nnx.Rngs):
        self.norm = tower_norm(width, NORM_EPS, place)
        self.q_in = ActQuant("q_in", place.section)
        self.q_proj = Dense(width, width, section=place.section, dtype=place.dtype, rngs=rngs)

    def __call__(self, query: jax.Array, tap: Tap | None = None) -> jax.Array:
        """``[1, Q, hidden]``, and so is what comes out."""
        return self.q_proj(self.q_in(self.norm(query), None, tap))


class Resampler(nnx.Module):
    """Queries attend to a slice's keys; output projection, norm and a last projection."""

    POINTS: ClassVar[Points] = {"attn_out": ("out_proj",), "proj_in": ("proj",)}

    def __init__(self, config: MiniCPMVConfig, place: Placement, *, rngs: nnx.Rngs):
        width, section, dtype = config.language.hidden_size, place.section, place.dtype
        self.heads = config.heads
        self.attn_out = ActQuant("attn_out", section)
        self.out_proj = Dense(width, width, section=section, dtype=dtype, rngs=rngs)
        self.norm = tower_norm(width, NORM_EPS, place)
        self.proj_in = ActQuant("proj_in", section)
        # Published without a bias; the one of the rotated model is what the norm leaves behind.
        self.proj = Dense(width, width, bias=place.rotated, section=section, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: tuple[jax.Array, jax.Array, jax.Array], tap: Tap | None = None
    ) -> jax.Array:
        """Visual tokens of each slice.

        Args:
            x: queries ``[N, Q, hidden]``; keys and values ``[N, P, 2 * hidden]``; bool ``[N, P]``,
                which keys are real.

        Returns:
            ``[N, Q, hidden]``.
        """
        q, kv, valid = x
        k, v = jnp.split(kv, 2, axis=-1)
        h = attend(*(_heads(y, self.heads) for y in (q, k, v)), valid[:, None])
        h = self.out_proj(self.attn_out(h, None, tap))
        return self.proj(self.proj_in(self.norm(h), None, tap))


class MiniCPMVVision(ViT):
    """Vision tower and resampler.

    The resampler is three modules, as a module's points all see the same rows: patches, the
    queries, or the queries of every slice.
    """

    def __init__(self, config: MiniCPMVConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, Placement.of(recipe, "vision", dtype), rngs=rngs)
        place, width = Placement.of(recipe, "connector", dtype), config.language.hidden_size
        self.query = nnx.Param(jnp.zeros((config.queries, width), dtype))
        self.keys = Keys(config, place, rngs=rngs)
        self.queries = Queries(width, place, rngs=rngs)
        self.merger = Resampler(config, place, rngs=rngs)

    def __call__(self, vision: VisionInput, runner: Runner = SCAN) -> jax.Array:
        """Slices -> visual tokens ``[N, Q, hidden]`` of the decoder."""
        x = self.features(vision, runner)
        kv = runner.module("vision/keys", self.keys, (x, vision.coords), vision.token_class)
        query = self.query.get_value()[None]
        q = runner.module("vision/queries", self.queries, query, jnp.zeros(query.shape[:2], int))
        q = jnp.broadcast_to(q, (len(x), *q.shape[1:]))
        slices = jnp.max(vision.token_class, axis=1, keepdims=True)  # -1: all of it is padding
        classes = jnp.broadcast_to(slices, q.shape[:2])
        return runner.module("vision/merger", self.merger, (q, kv, vision.valid), classes)


class MiniCPMV(VLM):
    """MiniCPM-V of any size, float or quantised as ``recipe`` says."""

    VISION = MiniCPMVVision
