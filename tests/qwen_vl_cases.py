"""Qwen-VL models for tests: the goldens, and variations of them with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from mquant_jax.models.qwen_vl import FAMILY
from tests import family_cases
from tests.family_cases import golden_case  # noqa: F401  (for the tests)

CASES = ("qwen_vl/public", "qwen_vl/multihead")
model_of = partial(family_cases.model_of, FAMILY)
random_params = partial(family_cases.random_params, FAMILY)
# Two resampler heads that are no power of two, an MLP that the online rotation pads, three layers.
ODD = {
    "hidden_size": 264, "num_attention_heads": 11, "kv_channels": 24,
    "visual": {"output_dim": 264, "width": 40, "heads": 2, "mlp_ratio": 2.16, "layers": 3},
}  # fmt: skip
# The golden's prompts of 63 tokens are more than four times as long as the training was.
LONG = {"seq_length": 15}


def changed_config(case: str = CASES[0], **changes: Any) -> dict[str, Any]:
    """A golden's config.json; dictionaries among ``changes`` are merged into its own."""
    return family_cases.changed_config(case, **changes)
