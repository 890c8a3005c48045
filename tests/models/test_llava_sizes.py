"""Published LLaVA models, as abstract shapes: parameter counts, W4A8 prefill and decode."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mquant_jax.models.registry import family_for
from mquant_jax.ptq.pipeline import untied
from tests.full_size import prefill_and_decode, quantised_count, w4a8

CLIP_L = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
SIGLIP_SO = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
    "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14,
}  # fmt: skip
DINOV2_L = {
    "hidden_size": 1024, "image_size": 518, "mlp_ratio": 4, "model_type": "dinov2",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "use_swiglu_ffn": False,
}  # fmt: skip


def llava(vision: dict[str, Any], text: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "ignore_index": -100, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vision_config": vision, "text_config": text,
    } | top  # fmt: skip


# As on the hub, which omits most keys of the language model: they have default values.
LLAVA_7B = llava(
    CLIP_L,
    {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": 32064,
    },
    image_token_index=32000, pad_token_id=32001, tie_word_embeddings=False,
    torch_dtype="float16", transformers_version="4.36.0.dev0", image_seq_length=576,
)  # fmt: skip
_LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "vocab_size": 128320,
}  # fmt: skip
MANTIS_8B = llava(SIGLIP_SO, _LLAMA3, image_token_index=128256)
DINO_QWEN = llava(
    DINOV2_L,
    {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 152064,
    },
    image_token_index=151646,
)  # fmt: skip


def text_count(t: dict[str, Any], biases: bool = False) -> int:
    """Parameter count of a language model with an untied head, from its definition."""
    d, inner = t.get("hidden_size", 4096), t.get("intermediate_size", 11008)
    h = t.get("num_attention_heads", 32)
    kv = d // h * t.get("num_key_value_heads", h)
    attention = 2 * d * d + 2 * kv * d + biases * (d + 2 * kv)
    layer = attention + 3 * d * inner + 2 * d
    return t.get("num_hidden_layers", 32) * layer + d + 2 * t["vocab_size"] * d


def tower_count(d: int, inner: int, layers: int, tokens: int, extra: int) -> int:
    """Parameter count of the tower's used layers, patch kernel, positions and other tensors."""
    layer = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    return layers * layer + 588 * d + tokens * d + extra


def projector_count(d: int, out: int) -> int:
    return d * out + out + out * out + out


@pytest.mark.parametrize(
    ("hf", "count", "tokens"),
    [
        (LLAVA_7B, text_count(LLAVA_7B["text_config"]) + projector_count(1024, 4096)
         + tower_count(1024, 4096, 23, 577, 3 * 1024), 576),
        (MANTIS_8B, text_count(_LLAMA3) + projector_count(1152, 4096)
         + tower_count(1152, 4304, 26, 729, 1152), 728),
        (DINO_QWEN, text_count(DINO_QWEN["text_config"], True) + projector_count(1024, 3584)
         + tower_count(1024, 4096, 23, 1370, 2 * 1024 + 23 * 2 * 1024), 1369),
    ],
    ids=["llava-1.5-7b", "SigLIP-Llama-3-8B", "DINOv2-Qwen2-7B"],
)  # fmt: skip
def test_full_size_w4a8(hf, count, tokens) -> None:
    family = family_for(hf)
    config = family.config_from_hf(hf)
    assert family.unknown_keys(hf) == [] and config.image_tokens == tokens
    assert sum(math.prod(r.shape) for r in family.weight_rules(config)) == count
    config, _ = untied(config, {})
    model, held, size = w4a8(family, config)
    assert quantised_count(held) > 300
    assert 0.5 < size / count < 0.75  # bytes per parameter: int4, int8 head, bf16 embedding
    patches = config.vision.position_grid**2
    prefill_and_decode(model, config.language.vocab_size, 2 * tokens + 60, 2, patches)
