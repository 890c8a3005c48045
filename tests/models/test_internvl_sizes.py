"""Published InternVL models, as abstract shapes: parameter counts, W4A8 prefill and decode."""

from __future__ import annotations

import math

import pytest

from benchmarks.aot.sizes import INTERNVIT_300M, MODELS
from mquant_jax.models.registry import family_for
from mquant_jax.ptq.pipeline import untied
from tests.full_size import prefill_and_decode, quantised_count, w4a8

INTERNVIT_6B = INTERNVIT_300M | {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25,
    "intermediate_size": 12800, "norm_type": "rms_norm", "use_qk_norm": True,
    "attention_bias": False,
}  # fmt: skip


def native(vision: dict, **text) -> dict:
    text = {
        "model_type": "qwen2", "vocab_size": 151674, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    } | text  # fmt: skip
    return {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
        "image_token_id": 151667, "downsample_ratio": 0.5, "text_config": text,
        "vision_config": {"attention_bias": True, "use_mean_pooling": True} | vision,
    }  # fmt: skip


INTERNVL3_8B = native(
    INTERNVIT_300M, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, intermediate_size=18944,
)  # fmt: skip
INTERNVL3_38B = native(
    INTERNVIT_6B, hidden_size=5120, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, intermediate_size=27648,
)  # fmt: skip


def qwen_count(hf: dict) -> int:
    """Parameter count of a Qwen2 with an untied head, from its definition."""
    t = hf["text_config"]
    d, inner = t["hidden_size"], t["intermediate_size"]
    kv = d // t["num_attention_heads"] * t["num_key_value_heads"]
    attention = 2 * d * d + d + 2 * (kv * d + kv)
    return t["num_hidden_layers"] * (attention + 3 * d * inner + 2 * d) + d + 2 * 151674 * d


def vit_6b_count() -> int:
    d, inner = 3200, 12800
    layer = 4 * d * d + d + 2 * d + 2 * d * inner + inner + d + 2 * d + 2 * d
    return 45 * layer + d * (3 * 14 * 14) + d + d + 1025 * d


def mlp1_count(width: int, out: int) -> int:
    return 2 * 4 * width + 4 * width * out + out + out * out + out


@pytest.mark.parametrize(
    ("hf", "count"),
    [
        (MODELS["internvl2-8b"], 8_075_365_376),
        (INTERNVL3_8B, qwen_count(INTERNVL3_8B) + 304_012_288 + mlp1_count(1024, 3584)),
        (INTERNVL3_38B, qwen_count(INTERNVL3_38B) + vit_6b_count() + mlp1_count(3200, 5120)),
    ],
    ids=["InternVL2-8B", "InternVL3-8B", "InternVL3-38B"],
)
def test_full_size_w4a8(hf, count) -> None:
    family = family_for(hf)
    config = family.config_from_hf(hf)
    assert sum(math.prod(r.shape) for r in family.weight_rules(config)) == count
    config, _ = untied(config, {})
    model, held, size = w4a8(family, config)
    assert quantised_count(held) > 300
    assert 0.5 < size / count < 0.75  # bytes per parameter: int4, int8 head, bf16 embedding
    prefill_and_decode(model, config.language.vocab_size, 13 * 256 + 60, 13, 1024)
