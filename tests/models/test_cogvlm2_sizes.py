"""The published CogVLM2-Llama3-19B, as abstract shapes: parameter count, W4A8 steps."""

from __future__ import annotations

import math

import pytest

from mquant_jax.models.registry import family_for
from tests.full_size import prefill_and_decode, quantised_count, w4a8

PUBLISHED = {
    "architectures": ["CogVLMForCausalLM"], "template_version": "chat", "hidden_act": "silu",
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128002,
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1792, "image_size": 1344, "in_channels": 3,
        "intermediate_size": 15360, "layer_norm_eps": 1e-6, "num_heads": 16,
        "num_hidden_layers": 63, "num_positions": 9217, "patch_size": 14,
    },
}  # fmt: skip


@pytest.mark.parametrize("aifs", [False, True])
def test_full_size_w4a8(aifs) -> None:
    family = family_for(PUBLISHED)
    config = family.config_from_hf(PUBLISHED)
    rules = family.weight_rules(config)
    frequencies = sum(math.prod(r.shape) for r in rules if r.src.endswith("inv_freq"))
    total = sum(math.prod(r.shape) for r in rules)
    assert frequencies == 32 * 64 and total - frequencies == 19_503_105_280
    assert 2 * total == 39_006_214_656  # bytes, by the published index
    assert config.vision.tokens == 2306 and config.placeholder == 128002
    model, held, size = w4a8(family, config)
    assert quantised_count(held) == 32 * 14 + 63 * 6 + 1 + 1 + 4 + 1
    assert 10.0 < size / 2**30 < 10.2  # int4, int8 head, bf16 embedding; 36.3 in bf16
    slots = 2305 if aifs else None  # the last one uses the language expert
    cache = prefill_and_decode(model, 128256, 2306 + 62, 1, 9216, slots)
    assert cache.v.shape == (32, 1, 8, 2306 + 62 + 32, 128)
