"""GLM-4V and CogVLM2 models for tests: the goldens, and variations of them with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from models.base import VLM, Family
from models.registry import family_for
from mquant_jax.nn.params import set_params
from tests.helpers import GOLDENS, Arrays, golden

# A padded online rotation in front of fc2, a third layer, heads of another number.
ODD_TOWER = {"hidden_size": 40, "num_heads": 2, "intermediate_size": 86, "num_hidden_layers": 3}


def model_of(family: Family, config: Any, params: dict[str, np.ndarray]) -> VLM:
    """The float model with these tensors."""
    model = nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0)))
    set_params(model, dict(params))
    return model


def golden_params(folder: str) -> dict[str, np.ndarray]:
    """A public golden's tensors under our names."""
    family, config = family_of(changed_config(folder))
    source = load_file(GOLDENS / folder / "public" / "model.safetensors")
    return {r.dst: r.apply(source[r.src]) for r in family.weight_rules(config)}


def golden_case(folder: str) -> tuple[VLM, Any, Arrays, Arrays]:
    """The float model of a public golden, its config, inputs and outputs."""
    hf, inputs, outputs = golden(folder, "public")
    family, config = family_of(hf)
    return model_of(family, config, golden_params(folder)), config, inputs, outputs


def family_of(hf: dict[str, Any]) -> tuple[Family, Any]:
    """The family of a config.json, and its config."""
    family = family_for(hf)
    return family, family.config_from_hf(hf)


def changed_config(folder: str, **changes: Any) -> dict[str, Any]:
    """A golden's config.json; dictionaries among ``changes`` are merged into its own."""
    hf = golden(folder, "public")[0]
    for key, value in changes.items():
        hf[key] = hf[key] | value if isinstance(value, dict) else value
    return hf


def random_params(family: Family, config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of the right shapes: norms around one, means and biases everywhere."""
    rng = np.random.default_rng(seed)
    out = {}
    for rule in family.weight_rules(config):
        value = rng.normal(0, 1, rule.shape)
        if rule.dst.endswith("norm/weight"):
            value = np.exp(0.5 * value)
        elif rule.dst.endswith("kernel"):
            value = value * rule.shape[1] ** -0.5 + 0.02
        out[rule.dst] = value.astype(np.float32)
    return out


def hardened(params: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Norm weights far from one, biases and means everywhere: what rotation must survive."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, value in params.items():
        value = np.asarray(value, np.float32)
        if name.endswith("norm/weight"):
            value = value * rng.lognormal(0, 0.7, value.shape)
        elif name.endswith(("bias", "boi", "eoi")):
            value = value + rng.normal(0.3, 0.5, value.shape)
        elif name.endswith(("positions", "patch_embed/proj/kernel", "fc2/kernel")):
            value = value + 0.05
        out[name] = value.astype(np.float32)
    return out
