"""MiniCPM-V's config.json -> the shapes of our generic parts.

The language model's keys stand at the top level, those of the tower under ``vision_config``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.language_config import decoder_config

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.resampler import ResamplerConfig
from mquant_jax.nn.vit import ACTIVATIONS, ViTConfig

HEAD_DIM = 128  # of the resampler, which has ``hidden_size // 128`` heads
# What the published config class takes for a tower that config.json does not describe.
_TOWER = {
    "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MiniCPMVConfig:
    """Vision tower, decoder, and the resampler between them.

    Attributes:
        patch_size: side of a patch in pixels.
        queries: visual tokens of a slice.
        heads: of the resampler's attention.
        scale_size: slices have about the area of a square of this side, in pixels; the
            preprocessor's own setting goes first.
        max_slices: of a picture, beside the whole; likewise.
        use_image_id: pictures are numbered in the prompt; likewise.
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
            UserError: a key is missing, another version, or something 2.6 does not do.
        """
        version = hf.get("version")
        if str(version) != "2.6":
            raise UserError(
                f"config.json: version {version!r} of MiniCPM-V is not supported; known: 2.6 (the "
                "others have another language model, tower or resampler)"
            )
        if hf.get("scale_emb", 1) != 1:
            raise UserError(f"config.json: scale_emb {hf['scale_emb']} is not supported; "
                            "MiniCPM-V 2.6 does not scale its embeddings")  # fmt: skip
        try:
            language = decoder_config(hf | {"model_type": "qwen2"})
            vision = hf.get("vision_config") or _TOWER
            slicing = hf.get("slice_config") or {}
            return cls(
                vision=_tower(vision, bool(hf.get("drop_vision_last_layer", True))),
                language=language,
                patch_size=vision["patch_size"],
                queries=hf.get("query_num", 64),
                heads=_heads(language.hidden_size),
                scale_size=slicing.get("scale_resolution", hf.get("image_size", 448)),
                max_slices=slicing.get("max_slice_nums", 9),
                use_image_id=bool(hf.get("use_image_id", True)),
            )
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing (minicpmv)") from e


def _tower(vision: dict[str, Any], drop_last: bool) -> ViTConfig:
    kind, act = vision.get("model_type", "siglip"), vision.get("hidden_act", "gelu_pytorch_tanh")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(f"config.json: vision_config.model_type {kind!r} is not supported "
                        "(MiniCPM-V 2.6); known: siglip")  # fmt: skip
    if act not in ACTIVATIONS:
        raise UserError(f"config.json: vision_config.hidden_act {act!r} is not supported; "
                        f"known: {', '.join(ACTIVATIONS)}")  # fmt: skip
    width, heads, patch = (vision[k] for k in ("hidden_size", "num_attention_heads", "patch_size"))
    if width % heads:
        raise UserError(f"config.json: vision width {width} is no multiple of {heads} heads")
    return ViTConfig(
        hidden_size=width,
        num_layers=vision["num_hidden_layers"] - drop_last,
        num_heads=heads,
        intermediate_size=vision["intermediate_size"],
        patch_dim=vision.get("num_channels", 3) * patch * patch,
        activation=act,
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        position_grid=vision["image_size"] // patch,
        patch_bias=True,
        final_norm=True,
    )


def _heads(width: int) -> int:
    heads = width // HEAD_DIM
    if heads == 0 or width % heads or width % 4:
        raise UserError(
            f"config.json: hidden_size {width} does not fit the resampler: it has hidden_size // "
            f"{HEAD_DIM} equal heads, and positions of four parts"
        )
    return heads
