"""Qwen-VL models for tests: the goldens, and variants with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from mquant_jax.models.qwen_vl import FAMILY
from tests import family_cases
from tests.family_cases import golden_case  # noqa: F401  (re-exported)

CASES = ("qwen_vl/public", "qwen_vl/multihead")
model_of = partial(family_cases.model_of, FAMILY)
random_params = partial(family_cases.random_params, FAMILY)
# Two resampler heads whose width is no power of two, an MLP padded by the online rotation, three
# layers.
ODD = {
    "hidden_size": 264, "num_attention_heads": 11, "kv_channels": 24,
    "visual": {"output_dim": 264, "width": 40, "heads": 2, "mlp_ratio": 2.16, "layers": 3},
}  # fmt: skip
# The golden's prompts of 63 tokens are more than four times the training length.
LONG = {"seq_length": 15}


def changed_config(case: str = CASES[0], **changes: Any) -> dict[str, Any]:
    """A golden's config.json with ``changes``; dictionaries are merged key by key."""
    return family_cases.changed_config(case, **changes)
