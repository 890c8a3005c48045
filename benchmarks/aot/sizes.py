"""Configs of published models in full size, as in their config.json."""

from __future__ import annotations

_QWEN2_VL = {
    "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
    "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
}  # fmt: skip
_QWEN2_VL_TOWER = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
INTERNVIT_300M = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "norm_type": "layer_norm",
}  # fmt: skip

MODELS = {
    "qwen2_vl-2b": _QWEN2_VL | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "vision_config": _QWEN2_VL_TOWER | {"hidden_size": 1536},
    },
    "qwen2_vl-7b": _QWEN2_VL | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        "vision_config": _QWEN2_VL_TOWER | {"hidden_size": 3584},
    },
    "internvl2-8b": {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"],
        "force_image_size": 448, "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1,
        "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12,
        "template": "internlm2-chat",
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2",
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 92553,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False,
        },
        "vision_config": INTERNVIT_300M | {"qkv_bias": True, "qk_normalization": False},
    },
    "minicpmv-2.6": {
        "model_type": "minicpmv", "architectures": ["MiniCPMV"], "version": 2.6,
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 151666,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
        "query_num": 64, "image_size": 448, "patch_size": 14, "drop_vision_last_layer": False,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14}, "use_image_id": True,
        "vision_config": {
            "model_type": "siglip", "hidden_size": 1152, "image_size": 980,
            "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
            "patch_size": 14,
        },
    },
}  # fmt: skip
