"""InternVL models for tests: the goldens, and variations of them with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from models.internvl.config import InternVLConfig
from models.internvl.modeling import InternVL
from models.internvl.weights import weight_rules
from mquant_jax.nn.params import set_params
from tests.helpers import GOLDENS, Arrays, golden

CASES = ("internvl2/public", "internvl2/public_qwen2", "internvl/public", "internvl/public_qwen3")


def model_of(config: InternVLConfig, params: dict[str, np.ndarray]) -> InternVL:
    """The float model with these tensors."""
    model = nnx.eval_shape(lambda: InternVL(config, rngs=nnx.Rngs(0)))
    set_params(model, dict(params))
    return model


def golden_case(case: str) -> tuple[InternVL, InternVLConfig, Arrays, Arrays]:
    """The float model of a golden, its config, inputs and outputs."""
    hf, inputs, outputs = golden(*case.split("/"))
    config = InternVLConfig.from_hf(hf)
    source = load_file(GOLDENS / case / "model.safetensors")
    params = {r.dst: r.apply(source[r.src]) for r in weight_rules(config)}
    return model_of(config, params), config, inputs, outputs


def changed_config(case: str, **changes: Any) -> dict[str, Any]:
    """A golden's config.json; dictionaries among ``changes`` are merged into its own."""
    hf = golden(*case.split("/"))[0]
    for key, value in changes.items():
        hf[key] = hf[key] | value if isinstance(value, dict) else value
    return hf


def random_params(config: InternVLConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of the right shapes: norms around one, means and biases everywhere."""
    rng = np.random.default_rng(seed)
    out = {}
    for rule in weight_rules(config):
        value = rng.normal(0, 1, rule.shape)
        if rule.dst.endswith("norm/weight"):
            value = np.exp(0.5 * value)
        elif rule.dst.endswith("gain"):
            value = 0.5 + 0.1 * value
        elif len(rule.shape) == 2 and rule.dst.endswith("kernel"):
            value = value * rule.shape[1] ** -0.5 + 0.02
        out[rule.dst] = value.astype(np.float32)
    return out


# InternViT-6B in small, in both layouts: RMSNorms, normed queries and keys, no qkv biases.
BIG_TOWER = {
    "internvl2/public": {
        "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False,
    },
    "internvl/public": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
}  # fmt: skip
