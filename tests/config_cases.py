"""Configs of goldens and of published models, for tests of config.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.aot.sizes import MODELS
from mquant_jax.models.registry import family_for
from tests.helpers import GOLDENS
from tests.models import (
    test_cogvlm2_sizes,
    test_glm4v_sizes,
    test_internvl_sizes,
    test_llava_sizes,
    test_qwen2_5_vl_sizes,
    test_qwen3_vl_sizes,
    test_qwen_vl_sizes,
)

GOLDEN = {
    str(path.parent.relative_to(GOLDENS)): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(GOLDENS.glob("*/*/config.json"))
}
# From the repository of InternVL3-1B, with keys for experts that the model does not have.
INTERNVL3_1B = {
    "architectures": ["InternVLChatModel"], "auto_map": {}, "downsample_ratio": 0.5,
    "dynamic_image_size": True, "force_image_size": 448, "hidden_size": 896, "image_fold": None,
    "llm_config": {
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864,
        "layer_types": ["full_attention"] * 24, "max_position_embeddings": 32768,
        "max_window_layers": 70, "model_type": "qwen2", "moe_config": None,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "use_bfloat16": True, "use_cache": False, "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat",
    "output_attentions": False, "pad2square": False, "ps_version": "v2", "select_layer": -1,
    "system_message": None, "template": "internvl2_5", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": None, "use_backbone_lora": 0,
    "use_llm_lora": 0, "use_thumbnail": True,
    "vision_config": {
        "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "auto_map": {},
        "capacity_factor": 1.2, "drop_path_rate": 0.1, "dropout": 0.0,
        "eval_capacity_factor": 1.4, "hidden_act": "gelu", "hidden_size": 1024,
        "image_size": 448, "initializer_factor": 0.1, "initializer_range": 1e-10,
        "intermediate_size": 4096, "laux_allreduce": "all_nodes", "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b", "moe_coeff_ratio": 0.5, "moe_intermediate_size": 768,
        "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before",
        "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
        "num_experts": 8, "num_hidden_layers": 24, "num_routed_experts": 4,
        "num_shared_experts": 4, "patch_size": 14, "qk_normalization": False, "qkv_bias": True,
        "shared_expert_intermediate_size": 3072, "torch_dtype": "bfloat16",
        "use_bfloat16": True, "use_flash_attn": False, "use_moe": False, "use_residual": True,
        "use_rts": False, "use_weighted_residual": False,
    },
}  # fmt: skip
FULL = {
    **MODELS,
    "internvl3-1b": INTERNVL3_1B,
    "cogvlm2": test_cogvlm2_sizes.PUBLISHED,
    "glm4v": test_glm4v_sizes.PUBLISHED,
    "internvl3-8b": test_internvl_sizes.INTERNVL3_8B,
    "internvl3-38b": test_internvl_sizes.INTERNVL3_38B,
    "llava-1.5-7b": test_llava_sizes.LLAVA_7B,
    "llava-siglip-llama3": test_llava_sizes.MANTIS_8B,
    "llava-dinov2-qwen2": test_llava_sizes.DINO_QWEN,
    "qwen2.5-vl-7b": test_qwen2_5_vl_sizes.QWEN2_5_VL_7B,
    "qwen2.5-vl-3b": test_qwen2_5_vl_sizes.QWEN2_5_VL_3B,
    "qwen3-vl-2b": test_qwen3_vl_sizes.QWEN3_VL_2B,
    "qwen3-vl-8b": test_qwen3_vl_sizes.QWEN3_VL_8B,
    "qwen_vl": test_qwen_vl_sizes.PUBLISHED,
}


def config_of(hf: dict[str, Any]) -> Any:
    return family_for(hf).config_from_hf(hf)
