"""The published GLM-4V-9B, as abstract shapes: parameter count, W4A8 prefill and decode."""

from __future__ import annotations

import math

from mquant_jax.models.registry import family_for
from tests.full_size import prefill_and_decode, quantised_count, w4a8

PUBLISHED = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "add_bias_linear": False, "add_qkv_bias": True, "hidden_size": 4096, "num_layers": 40,
    "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2,
    "kv_channels": 128, "ffn_hidden_size": 13696, "padded_vocab_size": 151552,
    "layernorm_epsilon": 1.5625e-07, "rmsnorm": True, "original_rope": True, "rope_ratio": 1,
    "post_layer_norm": True, "seq_length": 8192, "tie_word_embeddings": False,
    "boi_token_id": 151339, "eoi_token_id": 151340, "eos_token_id": [151329, 151336, 151338],
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1792, "image_size": 1120, "in_channels": 3,
        "intermediate_size": 15360, "layer_norm_eps": 1e-6, "num_heads": 16,
        "num_hidden_layers": 63, "num_positions": 6401, "patch_size": 14, "scaling_factor": 8,
    },
}  # fmt: skip
LAYERS = {"language": 8_158_433_280, "tower": 4_279_387_392}  # as reported by users


def test_full_size_w4a8() -> None:
    family = family_for(PUBLISHED)
    config = family.config_from_hf(PUBLISHED)
    rules = family.weight_rules(config)
    counts = {
        "language": sum(math.prod(r.shape) for r in rules if ".encoder.layers." in r.src),
        "tower": sum(math.prod(r.shape) for r in rules if ".vision.transformer." in r.src),
    }
    total = sum(math.prod(r.shape) for r in rules)
    assert counts == LAYERS and total == 13_906_320_896
    assert config.vision.tokens == 1602
    model, held, size = w4a8(family, config)
    assert quantised_count(held) == 40 * 7 + 63 * 6 + 1 + 1 + 4 + 1
    assert 7.6 < size / 2**30 < 7.7  # int4, int8 head, bf16 embedding; float: 25.9 in bf16
    cache = prefill_and_decode(model, 151552, 1602 + 62, 1, 6400)
    assert cache.v.shape == (40, 1, 2, 1602 + 62 + 32, 128)
