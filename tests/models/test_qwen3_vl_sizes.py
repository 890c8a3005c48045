"""Published Qwen3-VL models, as abstract shapes: parameter counts, names, W4A8 steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mquant_jax.models.registry import family_for
from mquant_jax.ptq.pipeline import untied
from tests.full_size import prefill_and_decode, quantised_count, w4a8

_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
    },
    "rope_theta": 5000000, "use_cache": True, "vocab_size": 151936,
}  # fmt: skip
_VISION = {
    "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02,
    "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_LARGE = _VISION | {
    "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_size": 1152,
    "intermediate_size": 4304,
}  # fmt: skip
_SMALL = _VISION | {
    "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024,
    "intermediate_size": 4096,
}  # fmt: skip


def published(hidden: int, layers: int, heads: int, inner: int, tied: bool, vision: dict) -> dict:
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner,
    }  # fmt: skip
    if tied:
        text["tie_word_embeddings"] = True
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655,
        "model_type": "qwen3_vl", "text_config": _TEXT | text, "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
        "vision_config": vision | {"out_hidden_size": hidden}, "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }  # fmt: skip


QWEN3_VL_2B = published(2048, 28, 16, 6144, True, _SMALL)
QWEN3_VL_4B = published(2560, 36, 32, 9728, True, _SMALL)
QWEN3_VL_8B = published(4096, 36, 32, 12288, False, _LARGE)
QWEN3_VL_32B = published(5120, 64, 64, 25600, False, _LARGE)


def count(hf) -> int:
    """Parameter count from the model's definition."""
    t, v = hf["text_config"], hf["vision_config"]
    d, inner, q = t["hidden_size"], t["intermediate_size"], 128 * t["num_attention_heads"]
    layer = 2 * d * q + 2 * d * 128 * 8 + 3 * d * inner + 2 * d + 2 * 128
    heads = 1 if hf["tie_word_embeddings"] else 2
    language = t["num_hidden_layers"] * layer + d + heads * t["vocab_size"] * d
    e, wide = v["hidden_size"], v["intermediate_size"]
    block = 4 * (e * e + e) + 2 * e * wide + wide + e + 4 * e
    mlp = 16 * e * e + 4 * e + 4 * e * d + d
    mergers = 2 * e + mlp + len(v["deepstack_visual_indexes"]) * (8 * e + mlp)
    return language + v["depth"] * block + 1536 * e + e + 2304 * e + mergers


@pytest.mark.parametrize(
    ("hf", "tensors", "total"),
    [
        (QWEN3_VL_2B, 625, 2_127_532_032),
        (QWEN3_VL_4B, 713, 4_437_815_808),
        (QWEN3_VL_8B, 750, 8_767_123_696),
        (QWEN3_VL_32B, 1058, 33_357_390_064),
    ],
    ids=["2b", "4b", "8b", "32b"],
)
def test_tensors(hf, tensors, total) -> None:
    family = family_for(hf)
    rules = family.weight_rules(family.config_from_hf(hf))
    assert sum(math.prod(r.shape) for r in rules) == count(hf) == total
    assert len({r.src for r in rules}) == tensors


@pytest.mark.parametrize("hf", [QWEN3_VL_2B, QWEN3_VL_4B, QWEN3_VL_8B], ids=["2b", "4b", "8b"])
def test_full_size_w4a8(hf) -> None:
    family = family_for(hf)
    config = family.config_from_hf(hf)
    taps, depth = len(config.vision.taps), config.vision.num_layers
    config, _ = untied(config, {"language/embedding": np.zeros(1)})
    model, held, size = w4a8(family, config)
    layers = config.language.num_layers
    assert quantised_count(held) == layers * 7 + 1 + depth * 6 + 1 + 2 * (1 + taps)
    assert 0.5 < size / count(hf) < 0.9  # int4, int8 head, bf16 embedding
    cache = prefill_and_decode(model, 151936, 256 + 62, 1, 1024)
    assert cache.v.shape[0] == layers
    assert model.feature_width == 4 * config.language.hidden_size


def test_names() -> None:
    family = family_for(QWEN3_VL_8B)
    rules = family.weight_rules(family.config_from_hf(QWEN3_VL_8B))
    shapes = {r.src: r.src_shape for r in rules}
    block = {n.split(".26.")[1]: s for n, s in shapes.items() if "visual.blocks.26." in n}
    assert block == {
        "attn.qkv.weight": (3456, 1152), "attn.qkv.bias": (3456,),
        "attn.proj.weight": (1152, 1152), "attn.proj.bias": (1152,),
        "mlp.linear_fc1.weight": (4304, 1152), "mlp.linear_fc1.bias": (4304,),
        "mlp.linear_fc2.weight": (1152, 4304), "mlp.linear_fc2.bias": (1152,),
        "norm1.weight": (1152,), "norm1.bias": (1152,),
        "norm2.weight": (1152,), "norm2.bias": (1152,),
    }  # fmt: skip
    merger = "model.visual.deepstack_merger_list.2."
    assert {n.removeprefix(merger): s for n, s in shapes.items() if n.startswith(merger)} == {
        "norm.weight": (4608,), "norm.bias": (4608,), "linear_fc1.weight": (4608, 4608),
        "linear_fc1.bias": (4608,), "linear_fc2.weight": (4096, 4608), "linear_fc2.bias": (4096,),
    }  # fmt: skip
    assert shapes["model.visual.pos_embed.weight"] == (2304, 1152)
    assert shapes["model.language_model.layers.35.self_attn.q_norm.weight"] == (128,)
    assert shapes["lm_head.weight"] == shapes["model.language_model.embed_tokens.weight"]
