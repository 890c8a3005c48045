"""Published Qwen2.5-VL models, as abstract shapes: parameter counts, names, W4A8 steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mquant_jax.models.registry import family_for
from mquant_jax.ptq.pipeline import untied
from tests.full_size import prefill_and_decode, quantised_count, w4a8

_TOP = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 32768, "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
_VISION = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN2_5_VL_7B = _TOP | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "vocab_size": 152064,
    "vision_config": _VISION | {"out_hidden_size": 3584},
}  # fmt: skip
QWEN2_5_VL_3B = _TOP | {
    "hidden_size": 2048, "intermediate_size": 11008, "max_window_layers": 70,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "vocab_size": 151936,
    "vision_config": _VISION | {"out_hidden_size": 2048},
}  # fmt: skip


def count(hf) -> int:
    """Parameter count from the model's definition."""
    d, inner, kv = hf["hidden_size"], hf["intermediate_size"], 128 * hf["num_key_value_heads"]
    layer = d * (d + 2 * kv) + d + 2 * kv + d * d + 3 * d * inner + 2 * d
    heads = 1 if hf["tie_word_embeddings"] else 2
    language = hf["num_hidden_layers"] * layer + d + heads * hf["vocab_size"] * d
    v = hf["vision_config"]
    e, wide = v["hidden_size"], v["intermediate_size"]
    block = 4 * (e * e + e) + 3 * e * wide + 2 * wide + e + 2 * e
    merger = e + 16 * e * e + 4 * e + 4 * e * d + d
    return language + v["depth"] * block + 1176 * e + merger


@pytest.mark.parametrize(
    ("hf", "tensors", "total"),
    [(QWEN2_5_VL_7B, 729, 8_292_166_656), (QWEN2_5_VL_3B, 824, 3_754_622_976)],
    ids=["7b", "3b"],
)
def test_full_size_w4a8(hf, tensors, total) -> None:
    family = family_for(hf)
    config = family.config_from_hf(hf)
    rules = family.weight_rules(config)
    assert len({r.src for r in rules}) == tensors
    assert sum(math.prod(r.shape) for r in rules) == count(hf) == total  # as shown on the hub
    assert config.vision.window == 8 and config.vision.full_layers == (7, 15, 23, 31)
    config, _ = untied(config, {"language/embedding": np.zeros(1)})
    model, held, size = w4a8(family, config)
    assert quantised_count(held) == config.language.num_layers * 7 + 1 + 32 * 7 + 1 + 2
    assert 0.5 < size / total < 0.8  # int4, int8 head, bf16 embedding
    cache = prefill_and_decode(model, hf["vocab_size"], 256 + 62, 1, 1024)
    assert cache.v.shape[0] == hf["num_hidden_layers"]


def test_names_of_a_block() -> None:
    family = family_for(QWEN2_5_VL_7B)
    rules = family.weight_rules(family.config_from_hf(QWEN2_5_VL_7B))
    shapes = {r.src: r.src_shape for r in rules}
    block = {n.removeprefix("visual.blocks.31."): s for n, s in shapes.items() if ".31." in n}
    assert block == {
        "attn.qkv.weight": (3840, 1280), "attn.qkv.bias": (3840,),
        "attn.proj.weight": (1280, 1280), "attn.proj.bias": (1280,),
        "mlp.gate_proj.weight": (3420, 1280), "mlp.gate_proj.bias": (3420,),
        "mlp.up_proj.weight": (3420, 1280), "mlp.up_proj.bias": (3420,),
        "mlp.down_proj.weight": (1280, 3420), "mlp.down_proj.bias": (1280,),
        "norm1.weight": (1280,), "norm2.weight": (1280,),
    }  # fmt: skip
    assert {n for n in shapes if n.startswith("visual.merger.")} == {
        "visual.merger.ln_q.weight", "visual.merger.mlp.0.weight", "visual.merger.mlp.0.bias",
        "visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias",
    }  # fmt: skip
    for name in shapes:  # in-memory names of transformers 5
        tail = name.removeprefix("model.")
        memory = {"v": "model.", "m": "model.language_model."}.get(name[0], "")
        assert family.canonical_name(memory + (tail if name[0] == "m" else name)) == name
