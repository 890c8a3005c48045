"""InternVL models for tests: the goldens, and variants with random weights."""

from __future__ import annotations

from functools import partial

from mquant_jax.models.internvl import FAMILY
from tests import family_cases
from tests.family_cases import changed_config, golden_case  # noqa: F401  (re-exported)

CASES = ("internvl2/public", "internvl2/public_qwen2", "internvl/public", "internvl/public_qwen3")
model_of = partial(family_cases.model_of, FAMILY)
random_params = partial(family_cases.random_params, FAMILY)
# A small InternViT-6B in both layouts: RMSNorm, query and key norms, no qkv biases.
BIG_TOWER = {
    "internvl2/public": {
        "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False,
    },
    "internvl/public": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
}  # fmt: skip
