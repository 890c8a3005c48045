"""The Qwen2.5-VL family: Qwen2-VL with another tower and time-based temporal positions.

Modeling, weight rules, streams, processing and processor are Qwen2-VL's
(:mod:`mquant_jax.models.qwen2_vl`), which select the tower by the config.
"""

from __future__ import annotations

import dataclasses

from mquant_jax.models.qwen2_5_vl.config import config_from_hf, config_tables
from mquant_jax.models.qwen2_vl import FAMILY as QWEN2_VL

FAMILY = dataclasses.replace(
    QWEN2_VL, name="qwen2_5_vl", config_from_hf=config_from_hf, config_tables=config_tables
)
