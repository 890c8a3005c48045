"""The published MiniCPM-V 2.6 in full size, as shapes: its count, and W4A8 prefill and decode."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from models.base import Batch
from models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import abstract_model

PUBLISHED = {
    "model_type": "minicpmv", "architectures": ["MiniCPMV"], "version": 2.6,
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 151666,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
    "query_num": 64, "image_size": 448, "patch_size": 14, "drop_vision_last_layer": False,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14}, "use_image_id": True,
    "vision_config": {
        "model_type": "siglip", "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
PARTS = {"language": 7_612_763_648, "tower": 417_792_240, "resampler": 68_619_264}


def part_of(src: str) -> str:
    return {"llm": "language", "vpm": "tower", "resampler": "resampler"}[src.split(".")[0]]


def test_full_size_w4a8() -> None:
    family = family_for(PUBLISHED)
    config = family.config_from_hf(PUBLISHED)
    counts = dict.fromkeys(PARTS, 0)
    for rule in family.weight_rules(config):
        counts[part_of(rule.src)] += math.prod(rule.shape)
    assert counts == PARTS and sum(counts.values()) == 8_099_175_152
    model = abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16)
    held = abstract_params(model)
    assert held["vision/layers/0/fc2/kernel"].in_features == 4320  # padded for its rotation
    assert sum(isinstance(v, QWeight) for v in held.values()) == 28 * 7 + 27 * 6 + 1 + 6 + 1
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert 0.5 < size / sum(counts.values()) < 0.75  # int4, int8 head, bf16 embedding

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    slices, patches, tokens = 10, 1040, 10 * 64 + 80
    vision = VisionInput(
        jax.ShapeDtypeStruct((slices, patches, 588), jnp.float32),
        ints(slices, patches, 2),
        jax.ShapeDtypeStruct((slices, patches), jnp.bool_),
        ints(slices, patches),
    )
    row = ints(1, tokens)
    batch = Batch(row, row, ints(1, 1, tokens), row, row, vision)
    cache = jax.eval_shape(lambda m: m.language.init_cache(1, tokens + 32), model)
    logits, cache = jax.eval_shape(lambda m, b, c: m.prefill(b, c), model, batch, cache)
    assert logits.shape == (1, 151666) and logits.dtype == jnp.float32
    one = ints(1)
    logits, _ = jax.eval_shape(lambda m, *a: m.decode(*a), model, one, one, one, cache)
    assert logits.shape == (1, 151666)
