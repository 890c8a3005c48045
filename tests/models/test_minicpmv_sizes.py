"""The published MiniCPM-V 2.6, as abstract shapes: parameter count, W4A8 prefill and decode."""

from __future__ import annotations

import math

from benchmarks.aot.sizes import MODELS
from mquant_jax.models.registry import family_for
from tests.full_size import prefill_and_decode, quantised_count, w4a8

PUBLISHED = MODELS["minicpmv-2.6"]
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
    model, held, size = w4a8(family, config)
    assert held["vision/layers/0/fc2/kernel"].in_features == 4320  # padded for its rotation
    assert quantised_count(held) == 28 * 7 + 27 * 6 + 1 + 6 + 1
    assert 0.5 < size / sum(counts.values()) < 0.75  # int4, int8 head, bf16 embedding
    prefill_and_decode(model, 151666, 10 * 64 + 80, 10, 1040, position_rows=True)
