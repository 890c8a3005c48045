"""The published Qwen-VL-Chat, as abstract shapes: parameter count, W4A8 prefill and decode."""

from __future__ import annotations

import math

from mquant_jax.models.registry import family_for
from tests.full_size import prefill_and_decode, quantised_count, w4a8

PUBLISHED = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "bf16": True,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
    "intermediate_size": 22016, "vocab_size": 151936, "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192, "seq_length": 2048, "no_bias": True, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False,
    "use_dynamic_ntk": True, "use_logn_attn": True, "use_flash_attn": False,
    "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48,
        "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664,
    },
}  # fmt: skip
TENSORS, PARAMETERS = 853, 9_656_935_168  # half the bytes in the published index


def test_full_size_w4a8() -> None:
    family = family_for(PUBLISHED)
    config = family.config_from_hf(PUBLISHED)
    shapes = {r.src: r.src_shape for r in family.weight_rules(config)}
    assert len(shapes) == TENSORS and sum(map(math.prod, shapes.values())) == PARAMETERS
    model, held, size = w4a8(family, config)
    assert quantised_count(held) == 32 * 7 + 48 * 6 + 1 + 6 + 1
    assert held["vision/layers/0/fc2/kernel"].in_features == 8192
    assert held["language/layers/0/down_proj/kernel"].in_features == 11008
    assert 6.0e9 < size < 6.2e9  # int4, int8 head, bf16 embedding; 19.3e9 as published
    prefill_and_decode(model, 151936, 2 * 258 + 100, 2, 1024)
