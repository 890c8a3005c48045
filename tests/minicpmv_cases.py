"""MiniCPM-V models for tests: the goldens, and variations of them with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from models.minicpmv.config import MiniCPMVConfig
from models.minicpmv.modeling import MiniCPMV
from models.minicpmv.weights import weight_rules
from mquant_jax.nn.params import set_params
from tests.helpers import GOLDENS, Arrays, golden

FOLDER = "minicpmv2_6"
CASES = ("public", "quirk_zero_token")
# Two resampler heads that are no power of two, an MLP that the online rotation pads, three layers.
ODD = {
    "hidden_size": 264, "num_attention_heads": 11, "num_key_value_heads": 11,
    "vision_config": {
        "hidden_size": 40, "num_attention_heads": 2, "intermediate_size": 86,
        "num_hidden_layers": 3,
    },
}  # fmt: skip


def model_of(config: MiniCPMVConfig, params: dict[str, np.ndarray]) -> MiniCPMV:
    """The float model with these tensors."""
    model = nnx.eval_shape(lambda: MiniCPMV(config, rngs=nnx.Rngs(0)))
    set_params(model, dict(params))
    return model


def golden_case(case: str) -> tuple[MiniCPMV, MiniCPMVConfig, Arrays, Arrays]:
    """The float model of a golden, its config, inputs and outputs."""
    hf, inputs, outputs = golden(FOLDER, case)
    config = MiniCPMVConfig.from_hf(hf)
    source = load_file(GOLDENS / FOLDER / case / "model.safetensors")
    params = {r.dst: r.apply(source[r.src]) for r in weight_rules(config)}
    return model_of(config, params), config, inputs, outputs


def changed_config(case: str = "public", **changes: Any) -> dict[str, Any]:
    """A golden's config.json; dictionaries among ``changes`` are merged into its own."""
    hf = golden(FOLDER, case)[0]
    for key, value in changes.items():
        hf[key] = hf[key] | value if isinstance(value, dict) else value
    return hf


def random_params(config: MiniCPMVConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of the right shapes: norms around one, means and biases everywhere."""
    rng = np.random.default_rng(seed)
    out = {}
    for rule in weight_rules(config):
        value = rng.normal(0, 1, rule.shape)
        if rule.dst.endswith("norm/weight"):
            value = np.exp(0.5 * value)
        elif rule.dst.endswith("kernel"):
            value = value * rule.shape[1] ** -0.5 + 0.02
        out[rule.dst] = value.astype(np.float32)
    return out
