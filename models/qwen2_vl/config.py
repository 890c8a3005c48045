"""Qwen2-VL's published config.json -> the shapes of our generic parts.

Qwen2.5-VL shares everything but the table of its tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import (
    FILE,
    Tables,
    check_heads,
    common,
    heads,
    layers,
    norm_eps,
    read_tables,
    theta,
    token,
    width,
)
from mquant_jax.models.language_config import SCHEMAS, decoder_config, decoder_fields
from mquant_jax.models.rope_config import FIELDS as ROPE_FIELDS
from mquant_jax.models.rope_config import MRope, read_rope
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.schema import Refused, Schema, choice, real, table, whole
from mquant_jax.validate import shown

TEXT = SCHEMAS["qwen2"] | common(
    decoder_fields(152064, 8192, 29568, 80, 64, 8, 32768) | {"rms_norm_eps": norm_eps(1e-5)},
    "image_token_id video_token_id vision_end_token_id vision_start_token_id vision_token_id",
)
TOP = common(
    {
        "image_token_id": token(151655),
        "video_token_id": token(151656),
        "vision_start_token_id": token(151652),
        "text_config": table(None, null=True),
        "vision_config": table(None, null=True),
    },
    "vision_end_token_id vision_token_id",
)
_VISION = common(
    {
        "depth": layers(32),
        "embed_dim": width(1280),
        "hidden_size": width(3584),
        "hidden_act": choice("quick_gelu", ACTIVATIONS),
        "mlp_ratio": real(4.0, 1.0, 64.0),
        "num_heads": heads(16),
        "patch_size": whole(14, 1, 256),
        "spatial_merge_size": whole(2, 1, 16),
        "temporal_patch_size": whole(2, 1, 16),
        "rope_parameters": table(None, null=True),
    },
    "spatial_patch_size",
    fullatt_block_indexes=Refused(reason="the tower would be that of Qwen2.5-VL"),
    in_channels=Refused((3,), "pictures have three channels"),
    in_chans=Refused((3,), "pictures have three channels"),
    window_size=Refused(reason="the tower would be that of Qwen2.5-VL"),
)
AXIAL = Schema(
    {"rope_theta": theta(10000.0), "rope_type": choice("axial", ("axial", "default"))},
    frozenset({"type"}),
)
_MROPE, _THETA = MRope((16, 24, 24)), 1e6


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """Vision tower, decoder and the special token ids, of Qwen2-VL and Qwen2.5-VL.

    Attributes:
        tokens_per_second: temporal positions per second of a clip; ``None``: one per temporal
            patch.
    """

    vision: ViTConfig
    language: DecoderConfig
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    tokens_per_second: float | None = None

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Qwen2VLConfig:
        """Read a config.json, in the hub's flat format or transformers 5's nested one.

        Raises:
            UserError: a key has an invalid value, or is not supported.
        """
        tables_of = config_tables(hf)
        tables = read_tables(tables_of)
        vision, rope = tables["vision_config"], tables["vision_config.rope_parameters"]
        shared = shared_fields(tables, language_of(hf, tables), tables_of, "hidden_size")
        size = vision["embed_dim"]
        tower = tower_shape(vision, rope, size, int(size * vision["mlp_ratio"]))
        return cls(vision=tower, **shared)


def language_of(hf: dict[str, Any], tables: Mapping[str, Any]) -> DecoderConfig:
    """The language model, from typed tables.

    Raises:
        UserError: see :meth:`Qwen2VLConfig.from_hf`.
    """
    top = tables[""]
    text = tables.get("text_config", top)
    if text is not top:
        _check_agreement(hf, top, text)
    text["tie_word_embeddings"] |= top.get("tie_word_embeddings", False)
    where = FILE if text is top else f"{FILE}: text_config"
    return decoder_config(text, "qwen2", where, _THETA, _MROPE)


def shared_fields(
    tables: Mapping[str, Any], language: DecoderConfig, given: Tables, width: str
) -> dict[str, Any]:
    """All fields of the config but the vision tower, from typed tables.

    Args:
        given: the tables with the file's contents.
        width: key of ``vision_config`` for the width of the merger's output.

    Raises:
        UserError: the merger does not end in the decoder's width.
    """
    top, vision = tables[""], tables["vision_config"]
    if vision[width] != language.hidden_size:
        how = "" if width in given["vision_config"][1] else "is missing, and its default "
        raise UserError(
            f"{FILE}: vision_config.{width} {how}{vision[width]} differs from "
            f"hidden_size {language.hidden_size}; the merger's output must have the decoder's width"
        )
    return {
        "language": language,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_token_id": top["image_token_id"],
        "video_token_id": top["video_token_id"],
        "vision_start_token_id": top["vision_start_token_id"],
    }


def config_tables(hf: dict[str, Any], tower: Schema = _VISION) -> Tables:
    """The tables of a config.json; flat ones have the text model's keys at the top.

    ``tower``: the table of ``vision_config``.
    """
    vision = hf.get("vision_config") or {}
    rope = vision.get("rope_parameters") if isinstance(vision, Mapping) else None
    tables = {
        "": (TEXT | TOP, hf),
        "vision_config": (tower, vision),
        "vision_config.rope_parameters": (AXIAL, rope or {}),
    }
    if hf.get("text_config"):
        tables["text_config"] = (TEXT, hf["text_config"])
    return tables


def _check_agreement(
    hf: Mapping[str, Any], top: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    """Check that text model keys repeated at the top level agree with ``text_config``.

    Raises:
        UserError: they do not.
    """
    where, head_dim = f"{FILE}: text_config", text["hidden_size"] // text["num_attention_heads"]
    rope = {key: top[key] for key in ROPE_FIELDS if key in hf}
    scaled = read_rope({**text, **rope}, FILE, _THETA, head_dim, _MROPE)
    if scaled != read_rope(text, where, _THETA, head_dim, _MROPE):
        raise UserError(f"{FILE}: {' and '.join(rope)} at the top differ from those in "
                        "text_config, which transformers reads; make them agree")  # fmt: skip
    for key in TEXT.fields:
        own = key in ROPE_FIELDS or key == "tie_word_embeddings"
        if key in hf and not own and top[key] != text[key]:
            raise UserError(
                f"{FILE}: {key} is {shown(top[key])}, but {shown(text[key])} in text_config, "
                "which is the one that transformers reads; make them agree"
            )


def tower_shape(
    vision: Mapping[str, Any], rope: Mapping[str, Any], size: int, inner: int, **more: Any
) -> ViTConfig:
    """A tower with rotary positions.

    Args:
        size, inner: widths of the stream and the MLPs.
        more: further fields of :class:`ViTConfig`.

    Raises:
        UserError: the heads do not fit the width.
    """
    patch = vision["patch_size"]
    check_heads(f"{FILE}: vision_config", size, vision["num_heads"])
    if size // vision["num_heads"] % 4:
        raise UserError(f"{FILE}: vision_config: heads of width {size // vision['num_heads']} do "
                        "not split into pairs for rows and columns")  # fmt: skip
    return ViTConfig(
        hidden_size=size,
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        intermediate_size=inner,
        patch_dim=3 * vision["temporal_patch_size"] * patch * patch,
        activation=vision["hidden_act"],
        norm_eps=1e-6,
        rope_theta=rope["rope_theta"],
        **more,
    )
