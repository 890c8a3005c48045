"""EVA2-CLIP with a gated connector, shared by GLM-4V and CogVLM2.

A post-norm tower over pictures of one fixed size, a 2x2 convolution, a projection with a gated MLP,
and a learned vector at both ends of each picture's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from math import isqrt
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.language import dense_rules, direct, norm_rules
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.models.squares import pack_vision
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Hidden, Streams
from mquant_jax.models.text import collate as collate_text
from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.mlp import gelu
from mquant_jax.nn.norm import LayerNorm
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import VisionInput, ViT
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.recipe import Recipe

VISUAL = -1  # placeholder in a prompt for each vector of a picture, including its ends
NORM_EPS = (
    1e-5  # of the connector's norm; not in the config: the default of the reference's LayerNorm
)
MERGE = 2  # side of the convolution
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class EVA2Config:
    """Shape of the tower and its connector.

    Attributes:
        tower: the transformer.
        patch_size: side of a patch in pixels.
        conv_width: output channels of the convolution.
        hidden_size: width of the decoder.
        inner: width of the connector's gated MLP.
        scaling: divisor of the features that enter the decoder.
    """

    tower: ViTConfig
    patch_size: int
    conv_width: int
    hidden_size: int
    inner: int
    scaling: float = 1.0

    @property
    def side(self) -> int:
        """Patches along a picture's side."""
        return self.tower.position_grid

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.side * self.patch_size

    @property
    def tokens(self) -> int:
        """Vectors of a picture, including the two ends."""
        return (self.side // MERGE) ** 2 + 2


def squares_of(x: jax.Array) -> jax.Array:
    """Group 2x2 patches into the layout of a convolution kernel.

    ``[N, P, d]``, patches of a square picture in row-major order, -> ``[N, P/4, 4 d]``: channel by
    channel, and within a channel row by row.
    """
    n, p, d = x.shape
    side = isqrt(p) // MERGE
    x = x.reshape(n, side, MERGE, side, MERGE, d).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, side * side, d * MERGE * MERGE)


class Convolution(nnx.Module):
    """Merges 2x2 patches into one token; reads the tower's stream without a norm."""

    POINTS: ClassVar[Points] = {"conv_in": ("proj",)}

    def __init__(self, c: EVA2Config, place: Placement, *, rngs: nnx.Rngs):
        width = MERGE * MERGE * c.tower.hidden_size
        rotation = place.read_rotation(width)
        self.conv_in = place.point("conv_in", self.POINTS, rotation)
        inputs = rotation.n if rotation else width
        self.proj = place.dense("proj", inputs, c.conv_width, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """``[N, P, width]`` -> ``[N, P/4, conv_width]``."""
        return self.proj(self.conv_in(squares_of(x), None, tap))


class Adapter(nnx.Module):
    """``y = gelu(norm(linear_proj(x)))``, then a gated MLP; no biases but the norm's.

    An activation follows the norm, so its weight and bias cannot be folded into another layer.
    """

    POINTS: ClassVar[Points] = {
        "merger_in": ("linear_proj",),
        "mlp_in": ("gate_proj", "up_proj"),
        "merger_hidden": ("down_proj",),
    }

    def __init__(self, c: EVA2Config, place: Placement, *, rngs: nnx.Rngs):
        d, dense = c.hidden_size, partial(place.dense, bias=False, rngs=rngs)
        rotation = place.online_rotation(c.conv_width)
        self.merger_in = place.point("merger_in", self.POINTS, rotation)
        self.linear_proj = dense("linear_proj", rotation.n if rotation else c.conv_width, d)
        self.norm = LayerNorm(d, NORM_EPS, place.dtype)
        rotation = place.online_rotation(d)
        self.mlp_in = place.point("mlp_in", self.POINTS, rotation)
        into = rotation.n if rotation else d
        self.gate_proj = dense("gate_proj", into, c.inner)
        self.up_proj = dense("up_proj", into, c.inner)
        rotation = place.online_rotation(c.inner)  # up_proj carries its signs
        hidden = rotation and rotation.without_signs()
        self.merger_hidden = place.point("merger_hidden", self.POINTS, hidden)
        self.down_proj = dense("down_proj", rotation.n if rotation else c.inner, d)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """``[N, T, conv_width]`` -> ``[N, T, hidden]``."""
        y = gelu(self.norm(self.linear_proj(self.merger_in(x, None, tap))))
        h = self.mlp_in(y, None, tap)
        hidden = jax.nn.silu(self.gate_proj(h)) * self.up_proj(h)
        return self.down_proj(self.merger_hidden(hidden, None, tap))


class Ends(nnx.Module):
    """A learned vector before and after each picture's tokens; then all are scaled."""

    POINTS: ClassVar[Points] = {}

    def __init__(self, c: EVA2Config, dtype):
        self.scaling = c.scaling
        self.boi = nnx.Param(jnp.zeros((1, c.hidden_size), dtype))
        self.eoi = nnx.Param(jnp.zeros((1, c.hidden_size), dtype))

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """``[N, T, hidden]`` -> ``[N, T + 2, hidden]``."""
        boi, eoi = (
            jnp.broadcast_to(v.get_value(), (len(x), 1, x.shape[-1])) for v in (self.boi, self.eoi)
        )
        return jnp.concatenate([boi, x, eoi], axis=1) / self.scaling


class EVA2Vision(ViT):
    """Tower and connector of a family whose config has an :class:`EVA2Config` as ``vision``."""

    def __init__(self, config: Any, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        c = config.vision
        super().__init__(c.tower, Placement.of(recipe, "vision", dtype), rngs=rngs)
        conv, merger = (Placement.of(recipe, f"vision/{n}", dtype) for n in ("conv", "merger"))
        self.conv = Convolution(c, conv, rngs=rngs)
        self.merger = Adapter(c, merger, rngs=rngs)
        self.ends = Ends(c, dtype)

    def tokens(self, patches: int) -> int:
        return patches // MERGE**2 + 2

    def flow(self, vision: VisionInput) -> Flow[jax.Array]:
        """Pictures -> visual tokens ``[N, P/4 + 2, hidden]``; the class token is dropped."""
        x = (yield from self.features(vision))[:, 1:]
        classes = vision.token_class[:, :: MERGE * MERGE]  # a picture is valid as a whole
        x = yield ModuleCall("vision/conv", self.conv, x, classes)
        x = yield ModuleCall("vision/merger", self.merger, x, classes)
        classes = jnp.pad(classes, ((0, 0), (1, 1)), mode="edge")
        return (yield ModuleCall("vision/ends", self.ends, x, classes))


def eva2_rules(c: EVA2Config, prefix: str) -> Iterator[WeightRule]:
    """The rules for the published names, which begin with ``prefix``."""
    v, p = c.tower, c.patch_size
    d, inner, out = v.hidden_size, v.intermediate_size, c.hidden_size
    patch, src = "vision/patch_embed/proj", f"{prefix}patch_embedding"
    kernel = (d, v.patch_dim // p**2, p, p)
    yield WeightRule(f"{patch}/kernel", f"{src}.proj.weight", (d, v.patch_dim), kernel)
    yield direct(f"{patch}/bias", f"{src}.proj.bias", d)
    yield direct("vision/class_token", f"{src}.cls_embedding", 1, d)
    rows = v.position_grid**2 + 1
    yield direct("vision/positions", f"{src}.position_embedding.weight", rows, d)
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"{prefix}transformer.layers.{i}"
        # The published names suggest pre-norm blocks, but these norms come after.
        yield from norm_rules(f"{dst}/attn_norm", f"{src}.input_layernorm", d)
        yield from norm_rules(f"{dst}/mlp_norm", f"{src}.post_attention_layernorm", d)
        for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
            for k, name in enumerate(_QKV):
                yield WeightRule(f"{dst}/{name}/{leaf}", f"{src}.attention.query_key_value.{hf}",
                                 (d, *tail), (3 * d, *tail), Rows(k, k + 1, 3))  # fmt: skip
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attention.dense", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.fc2", d, inner)
    conv = (c.conv_width, d, MERGE, MERGE)
    yield WeightRule("vision/conv/proj/kernel", f"{prefix}conv.weight",
                     (c.conv_width, d * MERGE * MERGE), conv)  # fmt: skip
    yield direct("vision/conv/proj/bias", f"{prefix}conv.bias", c.conv_width)
    dst, src = "vision/merger", f"{prefix}linear_proj"
    for name, hf, rows, columns in (
        ("linear_proj", "linear_proj", out, c.conv_width),
        ("gate_proj", "gate_proj", c.inner, out),
        ("up_proj", "dense_h_to_4h", c.inner, out),
        ("down_proj", "dense_4h_to_h", out, c.inner),
    ):
        yield from dense_rules(f"{dst}/{name}", f"{src}.{hf}", rows, columns, bias=False)
    yield from norm_rules(f"{dst}/norm", f"{src}.norm1", out)
    for end in ("boi", "eoi"):
        yield WeightRule(f"vision/ends/{end}", f"{prefix}{end}", (1, out), (1, 1, out))


def eva2_streams(c: EVA2Config, language: DecoderConfig) -> Streams:
    """Return the decoder's stream, and what is rotated online.

    That is MLPs before their last layers, and the tower's stream wherever it is read: its norms are
    inside the stream, which therefore takes no rotation itself.

    A rotation between the convolution and the projection would cost nothing at run time. But
    outlier channels would then determine the scales of all rows of the convolution: with a few
    channels 30 times larger, the error was twice that of an online rotation.
    """
    merger = "vision/merger"
    connector = (
        Hidden("vision/conv/proj", MERGE * MERGE * c.tower.hidden_size, reads_stream=True),
        Hidden(f"{merger}/linear_proj", c.conv_width),
        Hidden(f"{merger}/gate_proj", c.hidden_size),
        Hidden(f"{merger}/up_proj", c.hidden_size),
        Hidden(f"{merger}/down_proj", c.inner, f"{merger}/up_proj"),
    )
    ends = ("vision/ends/boi", "vision/ends/eoi")
    return (
        tower_streams(c.tower)
        + Streams(hiddens=connector)
        + decoder_streams(language, f"{merger}/down_proj", tables=ends)
    )


def collate(
    config: Any, prompts: Sequence[Prompt], pad_id: int, pad_to: int | None = None
) -> Batch:
    """Left-pad prompts to one length and pack all their pictures, one grid each.

    All of a picture's vectors are visual tokens; positions count tokens.

    Args:
        config: the family's config, with ``language`` and ``vision`` (``None`` for text-only).

    Raises:
        PromptError: ids outside the vocabulary, placeholders that do not match the pictures, or a
            picture of another size.
    """
    check_prompts(prompts, config.language.vocab_size, VISUAL)
    c: EVA2Config | None = config.vision
    for i, p in enumerate(prompts):
        if p.grids and (c is None or set(p.grids) != {(1, c.side, c.side)}):
            raise PromptError(f"prompt {i}: pictures are not {c and c.side} patches square")
        wanted = len(p.grids) * c.tokens if c else 0
        if (found := p.input_ids.count(VISUAL)) != wanted:
            raise PromptError(f"prompt {i}: {found} placeholders, but {wanted} visual tokens")
    batch = collate_text(prompts, pad_id, pad_to)
    if c is None or not any(p.grids for p in prompts):
        return batch
    visual = batch.input_ids == VISUAL
    index = batch.visual_index.copy()
    index[visual] = np.arange(
        np.count_nonzero(visual)
    )  # pictures are in the order of their placeholders
    return dataclasses.replace(
        batch,
        input_ids=np.where(visual, pad_id, batch.input_ids).astype(np.int32),
        token_class=np.where(visual, 1, batch.token_class).astype(np.int32),
        visual_index=index,
        vision=pack_vision(np.concatenate([p.patches for p in prompts if p.grids]), c.side),
    )
