"""MiniCPM-V models for tests: the goldens, and variants with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from mquant_jax.models.minicpmv import FAMILY
from tests import family_cases

FOLDER = "minicpmv2_6"
CASES = ("public", "quirk_zero_token")
model_of = partial(family_cases.model_of, FAMILY)
random_params = partial(family_cases.random_params, FAMILY)
# Two resampler heads whose width is no power of two, an MLP padded by the online rotation, three
# layers.
ODD = {
    "hidden_size": 264, "num_attention_heads": 11, "num_key_value_heads": 11,
    "vision_config": {
        "hidden_size": 40, "num_attention_heads": 2, "intermediate_size": 86,
        "num_hidden_layers": 3,
    },
}  # fmt: skip


def golden_case(case: str):
    """The float model of a golden, its config, inputs and outputs."""
    return family_cases.golden_case(f"{FOLDER}/{case}")


def changed_config(case: str = "public", **changes: Any) -> dict[str, Any]:
    """A golden's config.json with ``changes``; dictionaries are merged key by key."""
    return family_cases.changed_config(f"{FOLDER}/{case}", **changes)
