"""InternVL's two published config.json layouts -> the shapes of our generic parts.

``internvl_chat`` is the layout of the OpenGVLab repositories (InternVL2 to 3.5), ``internvl`` that
of transformers (their ``-hf`` and ``-HF`` twins). The models are the same.
"""

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
from mquant_jax.schema import Refused, Schema, choice, flag, real, square, table, text, whole
from mquant_jax.validate import shown

CHAT, NATIVE = "internvl_chat", "internvl"
# Language models by the class named in config.json, or by model_type.
_CHAT_LANGUAGE = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_NATIVE_LANGUAGE = ("llama", "qwen2", "qwen3")
_MERGE_FIRST = "unmerged LoRA weights are not supported; merge them into the model first"
# Training settings of InternVL 3.5's language models.
_TRAINED = Schema({}, frozenset("debug ep_size micro_forward skip_checkpoint use_deepep".split()))
_CHAT_TOP = common(
    {
        "llm_config": table(),
        "vision_config": table(None, null=True),
        "select_layer": whole(-1, -1024, 1024),
        "ps_version": choice("v1", ("v1", "v2")),
        "force_image_size": whole(None, 1, 2**16, null=True),
        "downsample_ratio": real(0.5, 1 / 64, 1.0),
        "dynamic_image_size": flag(False),
        "use_thumbnail": flag(False),
        "min_dynamic_patch": whole(1, 1, 1024),
        "max_dynamic_patch": whole(6, 1, 1024),
        "template": text(None, null=True),
    },
    "hidden_size img_context_token_id system_message tie_word_embeddings vocab_size",
    image_fold=Refused(),
    pad2square=Refused((False,)),
    use_backbone_lora=Refused((0, False), _MERGE_FIRST),
    use_llm_lora=Refused((0, False), _MERGE_FIRST),
)
_NATIVE_TOP = common(
    {
        "text_config": table(None, null=True),
        "vision_config": table(None, null=True),
        "downsample_ratio": real(0.5, 1 / 64, 1.0),
        "image_token_id": token(151667),
        "projector_hidden_act": choice("gelu", ("gelu",)),
        "vision_feature_layer": whole(-1, -1024, 1024),
        "vision_feature_select_strategy": choice("default", ("default",)),
        "tie_word_embeddings": flag(None),
    },
    "image_seq_length",
)
_TOWER = {
    "hidden_act": choice("gelu", ACTIVATIONS),
    "layer_norm_eps": norm_eps(1e-6),
    "num_channels": whole(3, 3, 3),
}
_CHAT_VISION = common(
    _TOWER
    | {
        "hidden_size": width(3200),
        "num_hidden_layers": layers(48),
        "num_attention_heads": heads(25),
        "intermediate_size": width(12800),
        "image_size": square(224),
        "patch_size": square(14),
        "norm_type": choice("rms_norm", ("layer_norm", "rms_norm")),
        "qk_normalization": flag(True),
        "qkv_bias": flag(False),
    },
    # Sizes of experts that no released tower has: use_moe is false in all of them.
    "capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_intermediate_size "
    "moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts "
    "shared_expert_intermediate_size use_residual use_rts use_weighted_residual",
)
_NATIVE_VISION = common(
    _TOWER
    | {
        "hidden_size": width(1024),
        "num_hidden_layers": layers(24),
        "num_attention_heads": heads(16),
        "intermediate_size": width(4096),
        "image_size": square(448),
        "patch_size": square(14),
        "norm_type": choice("layer_norm", ("layer_norm", "rms_norm")),
        "use_qk_norm": flag(False),
        "attention_bias": flag(False),
    },
    "layer_scale_init_value projection_dropout use_mask_token",
    use_mean_pooling=Refused((True,), "a norm after the tower is not supported"),
    use_absolute_position_embeddings=Refused((True,)),
)


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Vision tower, decoder and the tiling of pictures.

    Attributes:
        layout: layout of config and tensor names: ``internvl_chat`` or ``internvl``.
        language_names: naming scheme of the decoder's tensors: ``internlm2`` or ``llama``.
        tile_size: side of a tile in pixels.
        merge: side of the square of patches that becomes one token (pixel shuffle).
        transposed: whether tokens are in column-major order (``ps_version`` v1).
        min_tiles, max_tiles: tiles of a picture, without the thumbnail.
        thumbnail: whether the whole picture follows the tiles, if there are several.
        template: name of the published prompt template; "" in the native layout.
        image_token_id: the placeholder; ``None`` if only the tokenizer has it.
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
            UserError: a key has an invalid value, or is not supported.
        """
        chat = hf.get("model_type") == CHAT
        return cls(**(_chat if chat else _native)(hf))


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json in either layout."""
    chat = hf.get("model_type") == CHAT
    key = "llm_config" if chat else "text_config"
    language = (hf.get(key) if chat else hf.get(key) or {"model_type": "qwen2"}) or {}
    if not isinstance(language, Mapping):
        raise UserError(f"{FILE}: {key} {shown(language)}: expected an object")
    return {
        "": (_CHAT_TOP if chat else _NATIVE_TOP, hf),
        "vision_config": (_CHAT_VISION if chat else _NATIVE_VISION, hf.get("vision_config") or {}),
        key: (SCHEMAS[_language_kind(language, chat)] | _TRAINED, language),
    }


def _language_kind(language: Mapping[str, Any], chat: bool) -> str:
    """Return the language model's model_type, which the class in ``architectures`` may also
    give."""
    names, kind = language.get("architectures"), language.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    if not chat:
        return _known("text_config.model_type", kind, _NATIVE_LANGUAGE)
    if name:
        return _CHAT_LANGUAGE[_known("llm_config.architectures", name, _CHAT_LANGUAGE)]
    return _known("llm_config.model_type", kind, _CHAT_LANGUAGE.values())


def _chat(hf: dict[str, Any]) -> dict[str, Any]:
    tables = read_tables(config_tables(hf))
    top, vision, text = tables[""], tables["vision_config"], tables["llm_config"]
    kind = _language_kind(hf["llm_config"], True)
    _last_layer("select_layer", top["select_layer"], vision["num_hidden_layers"])
    patch, eps = vision["patch_size"], vision["layer_norm_eps"]
    tile = top["force_image_size"] or vision["image_size"]
    merge = _merge(top["downsample_ratio"], tile, patch)
    one_tile = not top["dynamic_image_size"]
    if top["min_dynamic_patch"] > top["max_dynamic_patch"]:
        raise UserError(f"{FILE}: min_dynamic_patch {top['min_dynamic_patch']} is larger than "
                        f"max_dynamic_patch {top['max_dynamic_patch']}")  # fmt: skip
    tower = _tower(
        vision,
        qk_norm_eps=eps if vision["qk_normalization"] else None,
        qkv_bias=vision["qkv_bias"],
    )
    return {
        "vision": tower,
        "language": decoder_config(text, kind, f"{FILE}: llm_config"),
        "layout": CHAT,
        "language_names": "internlm2" if kind == "internlm2" else "llama",
        "patch_size": patch,
        "tile_size": tile,
        "merge": merge,
        "transposed": top["ps_version"] == "v1",
        "min_tiles": 1 if one_tile else top["min_dynamic_patch"],
        "max_tiles": 1 if one_tile else top["max_dynamic_patch"],
        "thumbnail": top["use_thumbnail"],
        "template": top["template"] or "",
        "image_token_id": None,
    }


def _native(hf: dict[str, Any]) -> dict[str, Any]:
    tables = read_tables(config_tables(hf))
    top, vision, text = tables[""], tables["vision_config"], tables["text_config"]
    _last_layer("vision_feature_layer", top["vision_feature_layer"], vision["num_hidden_layers"])
    if top["tie_word_embeddings"] is not None:
        text["tie_word_embeddings"] = top["tie_word_embeddings"]
    kind = (hf.get("text_config") or {}).get("model_type", "qwen2")
    tower = _tower(
        vision,
        qk_norm_eps=1e-6 if vision["use_qk_norm"] else None,  # not in the config
        qkv_bias=vision["attention_bias"],
    )
    return {
        "vision": tower,
        "language": decoder_config(text, kind, f"{FILE}: text_config"),
        "layout": NATIVE,
        "language_names": "llama",
        "patch_size": vision["patch_size"],
        "tile_size": vision["image_size"],
        "merge": _merge(top["downsample_ratio"], vision["image_size"], vision["patch_size"]),
        "transposed": False,
        "min_tiles": 1,  # preprocessor_config.json has the tiling
        "max_tiles": 12,
        "thumbnail": True,
        "template": "",
        "image_token_id": top["image_token_id"],
    }


def _tower(vision: Mapping[str, Any], **rest: Any) -> ViTConfig:
    where, size, patch = f"{FILE}: vision_config", vision["hidden_size"], vision["patch_size"]
    check_heads(where, size, vision["num_attention_heads"])
    return ViTConfig(
        hidden_size=size,
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        patch_dim=vision["num_channels"] * patch * patch,
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        positions=PositionTable(check_grid(where, vision["image_size"], patch)),
        class_token=True,
        layer_scale=True,
        patch_bias=True,
        keeps_mean=True,
        rms_norm=vision["norm_type"] == "rms_norm",
        **rest,
    )


def _known(key: str, value: Any, known: Iterable[str]) -> Any:
    names = tuple(known)
    if value not in names:
        raise UserError(f"{FILE}: {key} {shown(value)} is not supported (InternVL); "
                        f"known: {', '.join(names)}")  # fmt: skip
    return value


def _last_layer(key: str, layer: int, layers: int) -> None:
    """Check that features come from the last layer: an inner layer would leave weights unused, and
    no released InternVL uses one."""
    if layer not in (-1, layers):
        raise UserError(f"{FILE}: {key} {layer} is not supported; known: -1, the last layer")


def _merge(ratio: float, tile: int, patch: int) -> int:
    merge = round(1 / ratio)
    if merge < 1 or abs(merge * ratio - 1) > 1e-6 or tile % (patch * merge):
        raise UserError(
            f"{FILE}: tiles of {tile} pixels, patches of {patch} and downsample_ratio {ratio} "
            "do not fit: tokens must be squares of whole patches"
        )
    return merge
