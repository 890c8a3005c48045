"""LLaVA models for tests: the goldens, and variants with random weights."""

from __future__ import annotations

from typing import Any

CLIP, DINOV2 = "llava/public", "llava/public_dinov2"
GOLDEN_CASES = (CLIP, DINOV2)
# SigLIP with a Llama of extended context: no class token, every patch is kept.
SIGLIP: dict[str, Any] = {
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 48, "num_attention_heads": 4,
        "intermediate_size": 88, "num_hidden_layers": 3,
    },
    "text_config": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip
# Name -> the golden whose inputs it uses, and changes to its config.json.
VARIED: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": (CLIP, SIGLIP),
    "clip, last layer": (CLIP, {"vision_feature_layer": [-1]}),
    "dinov2, last layer but one": (DINOV2, {"vision_feature_layer": -2}),
    "dinov2 without biases": (
        DINOV2, {"vision_config": {"qkv_bias": False}, "multimodal_projector_bias": False},
    ),
    "clip of odd widths": (
        CLIP, {"vision_config": {"hidden_size": 40, "intermediate_size": 86,
                                 "num_attention_heads": 4}},
    ),
}  # fmt: skip
