"""MiniCPM-V's config.json -> the shapes of our generic parts.

The language model's keys are at the top level, those of the tower under ``vision_config``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import (
    FILE,
    Tables,
    check_grid,
    check_heads,
    common,
    heads,
    layers,
    norm_eps,
    read_tables,
    width,
)
from mquant_jax.models.language_config import SCHEMAS, decoder_config
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.positions import ChosenRows
from mquant_jax.nn.resampler import ResamplerConfig
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.schema import Field, Refused, choice, flag, square, table, whole
from mquant_jax.validate import shown

HEAD_DIM = 128  # width of the resampler's heads: it has ``hidden_size // 128``


def _version(value: Any, where: str) -> Any:
    if value not in ("2.6", 2.6):
        raise UserError(
            f"{where} {shown(value)} of MiniCPM-V is not supported; known: 2.6 (others have "
            "a different language model, tower or resampler)"
        )
    return value


_TOP = SCHEMAS["qwen2"] | common(
    {
        "version": Field("2.6", _version),
        "query_num": whole(64, 1, 4096),
        "image_size": whole(448, 1, 2**16),
        "drop_vision_last_layer": flag(True),
        "use_image_id": flag(True),
        "vision_config": table(None, null=True),
        "slice_config": table(None, null=True),
    },
    "batch_3d_resampler batch_vision_input patch_size vision_batch_size vision_encoder",
    slice_mode=Refused((True,), "pictures of any size would not be sliced; set it to true"),
)
_VISION = common(
    {
        "hidden_size": width(768),
        "intermediate_size": width(3072),
        "num_hidden_layers": layers(12),
        "num_attention_heads": heads(12),
        "image_size": square(224),
        "patch_size": square(16),
        "num_channels": whole(3, 3, 3),
        "hidden_act": choice("gelu_pytorch_tanh", ACTIVATIONS),
        "layer_norm_eps": norm_eps(1e-6),
        "model_type": choice("siglip", ("siglip", "siglip_vision_model")),
    },
    "vision_use_head",
)
_SLICES = common(
    {
        "scale_resolution": whole(None, 1, 2**16, null=True),
        "max_slice_nums": whole(9, 1, 1024),
    },
    "patch_size",
)
# Defaults of the published code for a missing vision_config or slice_config.
_TOWER = {
    "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "siglip",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip
_ONE_SLICE = {"max_slice_nums": 1}


@dataclasses.dataclass(frozen=True)
class MiniCPMVConfig:
    """Vision tower, decoder, and the resampler between them.

    Attributes:
        patch_size: side of a patch in pixels.
        queries: visual tokens per slice.
        heads: heads of the resampler's attention.
        scale_size: side in pixels of a square with about the area of a slice. The preprocessor's
            setting takes precedence over this and the following.
        max_slices: maximum number of slices of a picture, besides the overview.
        use_image_id: whether pictures are numbered in the prompt.
    """

    vision: ViTConfig
    language: DecoderConfig
    patch_size: int
    queries: int
    heads: int
    scale_size: int
    max_slices: int
    use_image_id: bool

    @property
    def resampler(self) -> ResamplerConfig:
        """The resampler's shape."""
        return ResamplerConfig(
            self.vision.hidden_size,
            self.language.hidden_size,
            self.heads,
            self.queries,
            kv_bias=True,
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> MiniCPMVConfig:
        """Read a config.json.

        Raises:
            UserError: another version, or a key with an invalid or unsupported value.
        """
        tables = read_tables(config_tables(hf))
        top, vision, slices = tables[""], tables["vision_config"], tables["slice_config"]
        language = decoder_config(top, "qwen2", FILE)
        return cls(
            vision=_tower(vision, top["drop_vision_last_layer"]),
            language=language,
            patch_size=vision["patch_size"],
            queries=top["query_num"],
            heads=_heads(language.hidden_size),
            scale_size=slices["scale_resolution"] or top["image_size"],
            max_slices=slices["max_slice_nums"],
            use_image_id=top["use_image_id"],
        )


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json."""
    return {
        "": (_TOP, hf),
        "vision_config": (_VISION, hf.get("vision_config") or _TOWER),
        "slice_config": (_SLICES, hf.get("slice_config") or _ONE_SLICE),
    }


def _tower(vision: Mapping[str, Any], drop_last: bool) -> ViTConfig:
    where, size, patch = f"{FILE}: vision_config", vision["hidden_size"], vision["patch_size"]
    check_heads(where, size, vision["num_attention_heads"])
    if vision["num_hidden_layers"] <= drop_last:
        raise UserError(f"{where}: drop_vision_last_layer leaves no layers")
    return ViTConfig(
        hidden_size=size,
        num_layers=vision["num_hidden_layers"] - drop_last,
        num_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        patch_dim=vision["num_channels"] * patch * patch,
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        positions=ChosenRows(check_grid(where, vision["image_size"], patch)),
        patch_bias=True,
        final_norm=True,
    )


def _heads(width: int) -> int:
    heads = width // HEAD_DIM
    if heads == 0 or width % heads or width % 4:
        raise UserError(
            f"config.json: hidden_size {width} does not fit the resampler, which has "
            f"hidden_size // {HEAD_DIM} equal heads and positions of four parts"
        )
    return heads
