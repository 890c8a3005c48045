"""LLaVA's config.json, as transformers writes it -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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
    token,
    width,
)
from mquant_jax.models.language_config import SCHEMAS, decoder_config
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.positions import PositionTable
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.schema import (
    Field,
    Refused,
    choice,
    flag,
    items,
    real,
    square,
    table,
    whole,
)
from mquant_jax.validate import shown

CLIP, SIGLIP, DINOV2 = "clip_vision_model", "siglip_vision_model", "dinov2"
_LANGUAGES = ("llama", "qwen2")
_LAYER = whole(-2, -1024, 1024)


def _one_layer() -> Field:
    """Return a field for a layer index, or a list of one; several would widen the projector's
    input."""
    one = items(_LAYER, length=1)

    def convert(value: Any, where: str) -> Any:
        return one.read(value, where)[0] if isinstance(value, list) else _LAYER.read(value, where)

    return Field(_LAYER.expected, convert, _LAYER.default)


_TOP = common(
    {
        "text_config": table(None, null=True),
        "vision_config": table(None, null=True),
        "image_token_index": token(),
        "image_token_id": token(),
        "projector_hidden_act": choice("gelu", ACTIVATIONS),
        "multimodal_projector_bias": flag(True),
        "vision_feature_layer": _one_layer(),
        "vision_feature_select_strategy": choice("default", ("default", "full")),
        "tie_word_embeddings": flag(False),
    },
    "ignore_index image_seq_length vocab_size",
)
_IMAGE_TOKEN = 32000


def _tower_fields(
    hidden: int, depth: int, image: int, patch: int, act: str, eps: float
) -> dict[str, Field]:
    """The fields that all towers have, with these defaults; a head is 64 channels wide."""
    return {
        "hidden_size": width(hidden),
        "num_hidden_layers": layers(depth),
        "num_attention_heads": heads(hidden // 64),
        "num_channels": whole(3, 3, 3),
        "image_size": square(image),
        "patch_size": square(patch),
        "hidden_act": choice(act, ACTIVATIONS),
        "layer_norm_eps": norm_eps(eps),
    }


# model_type of the tower -> the table of its config, with the defaults of its published class.
_TOWERS = {
    CLIP: common(
        _tower_fields(768, 12, 224, 32, "quick_gelu", 1e-5) | {"intermediate_size": width(3072)},
        "projection_dim vocab_size",
    ),
    SIGLIP: common(
        _tower_fields(768, 12, 224, 16, "gelu_pytorch_tanh", 1e-6)
        | {"intermediate_size": width(3072)},
        "num_image_tokens projection_dim vision_use_head",
    ),
    DINOV2: common(
        _tower_fields(768, 12, 224, 14, "gelu", 1e-6)
        | {"mlp_ratio": real(4.0, 1.0, 64.0), "qkv_bias": flag(True)},
        "_out_features _out_indices apply_layernorm layerscale_value out_features out_indices "
        "reshape_hidden_states stage_names use_mask_token",
        use_swiglu_ffn=Refused((False,), "a tower with a gated MLP is not supported"),
    ),
}
# The default of a missing ``vision_config``: CLIP-L/14 for 336 pixels.
_PUBLISHED_TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Vision tower, decoder, and the features that connect them.

    Attributes:
        vision: the tower up to the layer whose output the projector reads.
        tower: its model_type: ``clip_vision_model``, ``siglip_vision_model`` or ``dinov2``.
        tower_layers: layers of the checkpoint's tower; those after the feature layer are unused.
        image_size: side in pixels of the square that a picture is resized to.
        projector_act: a key of :data:`~mquant_jax.nn.mlp.ACTIVATIONS`.
        image_token_id: the placeholder.
    """

    vision: ViTConfig
    language: DecoderConfig
    tower: str
    tower_layers: int
    patch_size: int
    image_size: int
    projector_act: str
    projector_bias: bool
    image_token_id: int

    @property
    def image_tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.tokens_of(self.vision.position_grid**2)

    def tokens_of(self, patches: int) -> int:
        """Visual tokens of ``patches`` patches."""
        return patches + self.vision.class_token - self.vision.drops_first

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlavaConfig:
        """Read a config.json.

        Raises:
            UserError: a key has an invalid value, or is not supported.
        """
        tables_of = config_tables(hf)
        tables = read_tables(tables_of)
        top, vision, text = tables[""], tables["vision_config"], tables["text_config"]
        text["tie_word_embeddings"] |= top["tie_word_embeddings"]
        kind, tower = _kind(hf, "text_config", _LANGUAGES), _kind(hf, "vision_config", _TOWERS)
        made = cls(
            vision=_vision(vision, tower, top),
            language=decoder_config(text, kind, f"{FILE}: text_config"),
            tower=tower,
            tower_layers=vision["num_hidden_layers"],
            patch_size=vision["patch_size"],
            image_size=vision["image_size"],
            projector_act=top["projector_hidden_act"],
            projector_bias=top["multimodal_projector_bias"],
            image_token_id=_image_token(top),
        )
        if made.image_tokens < 1:
            raise UserError(f"{FILE}: vision_feature_select_strategy 'default' leaves no token for "
                            f"pictures of {made.image_size} pixels")  # fmt: skip
        return made


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json."""
    vision = hf.get("vision_config")
    return {
        "": (_TOP, hf),
        "vision_config": (
            _TOWERS[_kind(hf, "vision_config", _TOWERS)],
            _PUBLISHED_TOWER if vision is None else vision,
        ),
        "text_config": (SCHEMAS[_kind(hf, "text_config", _LANGUAGES)], hf.get("text_config") or {}),
    }


def _kind(hf: Mapping[str, Any], key: str, known: Iterable[str]) -> str:
    """Return the model_type of a part; by default the first of the known ones.

    Raises:
        UserError: an unknown type, or the part is not an object.
    """
    part, names = hf.get(key), tuple(known)
    if part is None:
        return names[0]
    if not isinstance(part, Mapping):
        raise UserError(f"{FILE}: {key} {shown(part)}: expected an object")
    found = part.get("model_type", names[0])
    if found not in names:
        raise UserError(f"{FILE}: {key}.model_type {shown(found)} is not supported (LLaVA); "
                        f"known: {', '.join(names)}")  # fmt: skip
    return found


def _image_token(top: Mapping[str, Any]) -> int:
    """Return the placeholder's id, which transformers writes under either of two names."""
    index, other = top["image_token_index"], top["image_token_id"]
    if None not in (index, other) and index != other:
        raise UserError(f"{FILE}: image_token_index is {index}, image_token_id {other}; "
                        "make them agree")  # fmt: skip
    return next((i for i in (index, other) if i is not None), _IMAGE_TOKEN)


def _vision(vision: Mapping[str, Any], tower: str, top: Mapping[str, Any]) -> ViTConfig:
    where, size, patch = f"{FILE}: vision_config", vision["hidden_size"], vision["patch_size"]
    check_heads(where, size, vision["num_attention_heads"])
    ratio = vision.get("mlp_ratio")
    return ViTConfig(
        hidden_size=size,
        num_layers=_depth(top["vision_feature_layer"], vision["num_hidden_layers"]),
        num_heads=vision["num_attention_heads"],
        intermediate_size=int(size * ratio) if ratio else vision["intermediate_size"],
        patch_dim=vision["num_channels"] * patch * patch,
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        positions=PositionTable(check_grid(where, vision["image_size"], patch)),
        class_token=tower != SIGLIP,
        layer_scale=tower == DINOV2,
        patch_bias=tower != CLIP,
        qkv_bias=vision.get("qkv_bias", True),
        input_norm=tower == CLIP,
        keeps_mean=True,
        drops_first=top["vision_feature_select_strategy"] == "default",
    )


def _depth(layer: int, count: int) -> int:
    """Return the number of layers up to the named one: 1 is the first, -1 the last.

    Raises:
        UserError: there is no such layer; 0 would be the embeddings, before any layer.
    """
    depth = layer + count + 1 if layer < 0 else layer
    if not 1 <= depth <= count:
        raise UserError(f"{FILE}: vision_feature_layer {layer} is not supported; expected 1 to "
                        f"{count}, or -{count} to -1")  # fmt: skip
    return depth
