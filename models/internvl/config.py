"""InternVL's two published config.json layouts -> the shapes of our generic parts.

``internvl_chat`` is the layout of the OpenGVLab repositories (InternVL2 to 3.5), ``internvl`` that
of transformers (their ``-hf`` and ``-HF`` twins). The models are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.language_config import decoder_config

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.vit import ACTIVATIONS, ViTConfig

CHAT, NATIVE = "internvl_chat", "internvl"
# Language models by the class that config.json names (chat) or by model_type (native).
_CHAT_LANGUAGE = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_NATIVE_LANGUAGE = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Vision tower, decoder, and how pictures get from one to the other.

    Attributes:
        layout: whose tensor names the checkpoint has: ``internvl_chat`` or ``internvl``.
        language_names: the decoder's names are those of ``internlm2``, or of ``llama`` and most.
        tile_size: side in pixels of the squares that a picture is cut into.
        merge: side of the square of patches that becomes one token (pixel shuffle).
        transposed: tokens run column by column (``ps_version`` v1).
        min_tiles, max_tiles: tiles of a picture, without the thumbnail.
        thumbnail: the whole picture follows the tiles, if there is more than one.
        template: name of the published prompt template; "" in the native layout.
        image_token_id: the placeholder; ``None`` where only the tokenizer knows it.
    """

    vision: ViTConfig
    language: DecoderConfig
    layout: str
    language_names: str
    patch_size: int
    tile_size: int
    merge: int
    transposed: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    template: str
    image_token_id: int | None

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.tile_size // self.patch_size // self.merge) ** 2

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> InternVLConfig:
        """Read a config.json in either layout.

        Raises:
            UserError: a key is missing, or asks for something the released models never use.
        """
        layout = hf.get("model_type")
        try:
            return cls(**(_chat if layout == CHAT else _native)(hf))
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing ({layout})") from e


def _chat(hf: dict[str, Any]) -> dict[str, Any]:
    text, vision = hf["llm_config"], hf["vision_config"]
    names = text.get("architectures") or [None]
    kind = _known("llm_config.architectures", names[0], _CHAT_LANGUAGE)
    _last_layer("select_layer", hf.get("select_layer", -1), vision["num_hidden_layers"])
    version = _known("ps_version", hf.get("ps_version", "v1"), ("v1", "v2"))
    patch, eps = vision.get("patch_size", 14), vision.get("layer_norm_eps", 1e-6)
    tile = hf.get("force_image_size") or vision["image_size"]
    merge = _merge(hf.get("downsample_ratio", 0.5), tile, patch)
    one_tile = not hf.get("dynamic_image_size", False)
    tower = _tower(
        vision,
        grid=vision["image_size"] // patch,
        patch_dim=vision.get("num_channels", 3) * patch * patch,
        norm_eps=eps,
        rms_norm=_known("norm_type", vision.get("norm_type", "rms_norm"), _NORMS) == "rms_norm",
        qk_norm_eps=eps if vision.get("qk_normalization", True) else None,
        qkv_bias=bool(vision.get("qkv_bias", False)),
    )
    return {
        "vision": tower,
        "language": decoder_config(text | {"model_type": _CHAT_LANGUAGE[kind]}),
        "layout": CHAT,
        "language_names": "internlm2" if kind == "InternLM2ForCausalLM" else "llama",
        "patch_size": patch,
        "tile_size": tile,
        "merge": merge,
        "transposed": version == "v1",
        "min_tiles": 1 if one_tile else hf.get("min_dynamic_patch", 1),
        "max_tiles": 1 if one_tile else hf.get("max_dynamic_patch", 6),
        "thumbnail": bool(hf.get("use_thumbnail", False)),
        "template": hf.get("template") or "",
        "image_token_id": None,
    }


def _native(hf: dict[str, Any]) -> dict[str, Any]:
    text, vision = hf["text_config"], hf["vision_config"]
    _known("text_config.model_type", text.get("model_type"), _NATIVE_LANGUAGE)
    _last_layer("vision_feature_layer", hf.get("vision_feature_layer", -1),
                vision["num_hidden_layers"])  # fmt: skip
    strategy = hf.get("vision_feature_select_strategy", "default")
    _known("vision_feature_select_strategy", strategy, ("default",))
    _known("projector_hidden_act", hf.get("projector_hidden_act", "gelu"), ("gelu",))
    if not vision.get("use_mean_pooling", True):
        raise UserError("config.json: vision_config.use_mean_pooling is false: a norm behind the "
                        "tower is not supported; no released InternVL has one")  # fmt: skip
    if not vision.get("use_absolute_position_embeddings", True):
        raise UserError("config.json: vision_config.use_absolute_position_embeddings is false; "
                        "no released InternVL does without them")  # fmt: skip
    patch, tile = _side("patch_size", vision), _side("image_size", vision)
    tower = _tower(
        vision,
        grid=tile // patch,
        patch_dim=vision.get("num_channels", 3) * patch * patch,
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        rms_norm=_known("norm_type", vision.get("norm_type", "layer_norm"), _NORMS) == "rms_norm",
        qk_norm_eps=1e-6 if vision.get("use_qk_norm", False) else None,  # in no config
        qkv_bias=bool(vision.get("attention_bias", False)),
    )
    return {
        "vision": tower,
        "language": decoder_config(text),
        "layout": NATIVE,
        "language_names": "llama",
        "patch_size": patch,
        "tile_size": tile,
        "merge": _merge(hf.get("downsample_ratio", 0.5), tile, patch),
        "transposed": False,
        "min_tiles": 1,  # preprocessor_config.json says how a picture is cut
        "max_tiles": 12,
        "thumbnail": True,
        "template": "",
        "image_token_id": hf.get("image_token_id", 151667),
    }


_NORMS = ("layer_norm", "rms_norm")


def _tower(vision: dict[str, Any], *, grid: int, **rest: Any) -> ViTConfig:
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    if width % heads:
        raise UserError(f"config.json: vision width {width} is no multiple of {heads} heads")
    return ViTConfig(
        hidden_size=width,
        num_layers=vision["num_hidden_layers"],
        num_heads=heads,
        intermediate_size=vision["intermediate_size"],
        activation=_known("hidden_act", vision.get("hidden_act", "gelu"), ACTIVATIONS),
        position_grid=grid,
        class_token=True,
        layer_scale=True,
        patch_bias=True,
        keeps_mean=True,
        **rest,
    )


def _known(key: str, value: Any, known: Any) -> Any:
    if value not in known:
        names = ", ".join(known)
        raise UserError(f"config.json: {key} {value!r} is not supported (InternVL); known: {names}")
    return value


def _last_layer(key: str, layer: int, layers: int) -> None:
    """Features of an inner layer would leave weights unused; no released InternVL takes them."""
    if layer not in (-1, layers):
        raise UserError(f"config.json: {key} {layer} is not supported; known: -1, the last layer")


def _side(key: str, vision: dict[str, Any]) -> int:
    """A side that may be written as a number or as a square's two."""
    value = vision[key]
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise UserError(f"config.json: vision_config.{key} {value} is not square")
    return sides.pop()


def _merge(ratio: float, tile: int, patch: int) -> int:
    merge = round(1 / ratio)
    if merge < 1 or abs(merge * ratio - 1) > 1e-6 or tile % (patch * merge):
        raise UserError(
            f"config.json: tiles of {tile} pixels, patches of {patch} and downsample_ratio {ratio} "
            "do not fit each other: tokens must be squares of whole patches"
        )
    return merge
