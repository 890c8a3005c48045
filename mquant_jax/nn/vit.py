"""The vision transformer: blocks over patches, configured per family."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.flow import Flow, ModuleCall, StackCall, run
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.rope import grid_angles
from mquant_jax.nn.stack import SCAN, Runner
from mquant_jax.nn.vit_block import (
    VisionContext,
    ViTConfig,
    tower_norm,
)
from mquant_jax.nn.windows import Windows
from mquant_jax.numerics import AnyArray, along_last
from mquant_jax.shapes import Array, Float, Int32, Shaped

STREAM = "vision"  # the name under which families declare a tower's residual stream
Features = Float[Array, "N M hidden"] | tuple[Any, ...]


def parts_of(features: Features) -> tuple[Any, ...]:
    """What a tower's flow gives, as a tuple."""
    return features if isinstance(features, tuple) else (features,)


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
    def token_class(self) -> Int32[Array, "N P"]:
        """0, or -1 for padding."""
        return jnp.where(self.valid, 0, -1)


class PatchEmbed(nnx.Module):
    """Patch embedding as a matrix product (kernel and stride of the convolution are equal)."""

    POINTS: ClassVar[Points] = {"patch_in": ("proj",)}

    def __init__(self, cfg: ViTConfig, place: Placement, *, rngs: nnx.Rngs):
        self.patch_in = place.point("patch_in", self.POINTS)
        self.proj = place.dense(
            "proj", cfg.patch_dim, cfg.hidden_size, bias=cfg.patch_bias, rngs=rngs
        )

    def __call__(
        self, patches: Float[AnyArray, "N P patch_dim"], tap: Tap | None = None
    ) -> Float[Array, "N P hidden"]:
        return self.proj(self.patch_in(jnp.asarray(patches), None, tap))


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

    def __call__(
        self, x: Float[Array, "N P hidden"], tap: Tap | None = None
    ) -> Float[Array, "N P hidden"]:
        x = self.norm(x)
        return x if self.rotation is None else self.rotation(x)


class FinalNorm(nnx.Module):
    """The norm after the last block."""

    POINTS: ClassVar[Points] = {}

    def __init__(self, cfg: ViTConfig, place: Placement):
        self.norm = tower_norm(cfg.hidden_size, cfg.norm_eps, place, cfg.rms_norm, cfg.keeps_mean)

    def __call__(
        self, x: Float[Array, "N P hidden"], tap: Tap | None = None
    ) -> Float[Array, "N P hidden"]:
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
        if cfg.positions is not None:
            rows = cfg.positions.side**2 + cfg.class_token
            self.positions = nnx.Param(jnp.zeros((rows, cfg.hidden_size), place.dtype))
        self.layers = place.stack(
            "layers", cfg.num_layers, lambda where, r: cfg.block(cfg, where, rngs=r), rngs
        )
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
        return self.cfg.positions is None or self.cfg.positions.any_size

    def __call__(self, vision: VisionInput, runner: Runner = SCAN) -> Float[Array, "N M width"]:
        """What the vision module hands to the decoder: all parts of its :meth:`flow`, next to each
        other."""
        return jnp.concatenate(parts_of(run(self.flow(vision), runner)), axis=-1)

    def flow(self, vision: VisionInput) -> Flow[Features]:
        """Patches -> visual tokens ``[N, M, hidden]``. Families add their connector here.

        A tower with taps gives a tuple: what takes the place of embeddings, and of each tap what
        the decoder adds after its layers 0, 1, ... (which may be handles, see ``passed_on`` of
        :class:`ModuleCall`).
        """
        return self.features(vision)

    def features(self, vision: VisionInput) -> Flow[Float[Array, "N P hidden"]]:
        """:meth:`tapped` without the taps."""
        return (yield from self.tapped(vision))[0]

    def tapped(
        self, vision: VisionInput
    ) -> Flow[tuple[Float[Array, "N P hidden"], tuple[Any, ...]]]:
        """Patches -> features; the class token, if there is one, is the first
        (:attr:`ViTConfig.drops_first`). And a tuple of what the layers ``taps`` give.

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
        if cfg.positions is not None:
            shape = vision.patches.shape[1], vision.coords, vision.position_rows
            x = x + along_last(cfg.positions.at(self.positions.get_value(), *shape), x)
        if cfg.input_norm:
            x = yield ModuleCall("vision/input", self.input, x, classes)
        context = VisionContext(angles, classes)
        windows = Windows.of(vision.coords, classes, cfg.window) if cfg.window else None
        if windows is not None:
            full = jnp.asarray([i in cfg.full_layers for i in range(cfg.num_layers)])
            x, turn, own = jax.tree.map(windows.sort, (x, angles, classes))
            context = VisionContext(turn, own, windows.inside, full)
        x, tapped = yield StackCall("vision/layers", self.layers, x, context, cfg.taps)
        if windows is not None:
            x, *tapped = map(windows.restore, (x, *tapped))
        if cfg.final_norm:
            x = yield ModuleCall("vision/final", self.final, x, classes)
        return self.selected(x), tuple(tapped)

    def selected(self, x: Shaped[Any, "N P *rest"]) -> Shaped[Any, "N _ *rest"]:
        """Of each row's tokens those that are features."""
        return x[:, int(self.cfg.drops_first) :]
