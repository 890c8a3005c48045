"""Published InternVL models in full size, as shapes: counts, and W4A8 prefill and decode."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from models.base import Batch
from models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import abstract_model, untied

VIT_300M = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "norm_type": "layer_norm",
}  # fmt: skip
VIT_6B = VIT_300M | {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25,
    "intermediate_size": 12800, "norm_type": "rms_norm", "use_qk_norm": True,
    "attention_bias": False,
}  # fmt: skip
INTERNVL2_8B = {
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
    "vision_config": VIT_300M | {"qkv_bias": True, "qk_normalization": False},
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
    VIT_300M, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, intermediate_size=18944,
)  # fmt: skip
INTERNVL3_38B = native(
    VIT_6B, hidden_size=5120, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, intermediate_size=27648,
)  # fmt: skip


def qwen_count(hf: dict) -> int:
    """Parameters of a Qwen2 with its own head, by the book."""
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
        (INTERNVL2_8B, 8_075_365_376),
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
    model = abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16)
    held = abstract_params(model)
    assert sum(isinstance(v, QWeight) for v in held.values()) > 300
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert 0.5 < size / count < 0.75  # bytes per parameter: int4, int8 head, bf16 embedding

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    tiles, tokens = 13, 13 * 256 + 60
    vision = VisionInput(
        jax.ShapeDtypeStruct((tiles, 1024, 588), jnp.float32),
        ints(tiles, 1024, 2),
        jax.ShapeDtypeStruct((tiles, 1024), jnp.bool_),
    )
    row = ints(1, tokens)
    batch = Batch(row, row, ints(1, 1, tokens), row, row, vision)
    cache = jax.eval_shape(lambda m: m.language.init_cache(1, tokens + 32), model)
    logits, cache = jax.eval_shape(lambda m, b, c: m.prefill(b, c), model, batch, cache)
    vocab = config.language.vocab_size
    assert logits.shape == (1, vocab) and logits.dtype == jnp.float32
    one = ints(1)
    logits, _ = jax.eval_shape(lambda m, *a: m.decode(*a), model, one, one, one, cache)
    assert logits.shape == (1, vocab)
