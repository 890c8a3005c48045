"""Models of any family for tests: goldens, variants with random weights, rotated copies."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mquant_jax.models.base import VLM, Batch, Family, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.ptq.pipeline import float_model, quantize_params
from mquant_jax.recipe import Recipe
from tests.helpers import Arrays, forward, golden, golden_model, relative

ROTATED = Recipe("rotated", rotate=True, seed=3)


def model_of(family: Family, config: Any, params: Arrays) -> VLM:
    """The float model with these tensors."""
    model = abstract_model(family, config, Recipe())
    set_params(model, dict(params))
    return model


def golden_case(case: str) -> tuple[VLM, Any, Arrays, Arrays]:
    """``folder/case`` -> the float model of a golden, its config, inputs and outputs."""
    return golden_model(case)[1:]


def golden_params(case: str) -> Arrays:
    """A golden's tensors, by the package's names."""
    return get_params(golden_case(case)[0])


def family_of(hf: dict[str, Any]) -> tuple[Family, Any]:
    """The family of a config.json, and its config."""
    family = family_for(hf)
    return family, family.config_from_hf(hf)


def changed_config(case: str, **changes: Any) -> dict[str, Any]:
    """A golden's config.json with ``changes``; dictionaries are merged key by key."""
    hf = golden(*case.split("/"))[0]
    for key, value in changes.items():
        hf[key] = hf[key] | value if isinstance(value, dict) else value
    return hf


def random_params(family: Family, config: Any, seed: int = 0) -> Arrays:
    """Random tensors with norm weights and gains unlike one, and nonzero means and biases."""
    rng = np.random.default_rng(seed)
    out = {}
    for rule in family.weight_rules(config):
        value = rng.normal(0, 1, rule.shape)
        if rule.dst.endswith("norm/weight"):
            value = np.exp(0.5 * value)
        elif rule.dst.endswith("gain"):
            value = 0.5 + 0.1 * value
        elif rule.dst.endswith("kernel"):
            value = value * rule.shape[1] ** -0.5 + 0.02
        out[rule.dst] = value.astype(np.float32)
    return out


# Tables and kernels that write to a stream: rotation tests give them a nonzero mean.
_WRITERS = ("class_token", "positions", "query", "patch_embed/proj/kernel", "fc2/kernel")


def hardened(params: Arrays, seed: int = 0) -> Arrays:
    """Tensors that stress rotation: norm weights far from one, nonzero biases and means."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, value in params.items():
        value = np.asarray(value, np.float32)
        if "norm/weight" in name or name.endswith("gain"):
            value = value * rng.lognormal(0, 0.7, value.shape)
        elif name.endswith(("bias", "boi", "eoi")):
            value = value + rng.normal(0.3, 0.5, value.shape)
        elif name.endswith(_WRITERS):
            value = value + 0.05
        out[name] = value.astype(np.float32)
    return out


def batch_of(family: Family, config: Any, case: str) -> Batch:
    """A golden's inputs as a batch."""
    inputs = golden(*case.split("/"))[1]
    return jax.tree.map(jax.numpy.asarray, family.reference_batch(config, inputs))


def float_logits(
    family: Family, config: Any, recipe: Recipe, params: Arrays, case: str
) -> tuple[np.ndarray, VLM]:
    """Logits of a golden's unpadded tokens from an unquantised model (rotated or not), and the
    model."""
    batch = batch_of(family, config, case)
    model = float_model(family, config, recipe, params)
    return np.asarray(forward(model, batch))[np.asarray(batch.token_class) >= 0], model


def rotated_twin(
    family: Family,
    config: Any,
    params: Arrays,
    case: str,
    recipe: Recipe = ROTATED,
    rtol: float = 1e-4,
) -> VLM:
    """Check that rotation keeps the logits; return the rotated model."""
    expected, _ = float_logits(family, config, Recipe(), params, case)
    rotated, _ = quantize_params(family, config, recipe, params)
    got, twin = float_logits(family, config, recipe, rotated, case)
    assert relative(got, expected) < rtol
    return twin
