"""Float parameters and calibration prompts in, quantised parameters and a report out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.base import Batch, Family
from mquant_jax.errors import UserError
from mquant_jax.nn.params import Params, abstract_params, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.rotate import rotate_params
from mquant_jax.ptq.scales import round_weight
from mquant_jax.ptq.sequential import Progress, QuantizingRunner
from mquant_jax.recipe import Recipe, Section


def no_progress(items: Iterable, label: str) -> Iterable:
    return items


def section_of(name: str, recipe: Recipe) -> Section:
    """The recipe's section that governs a tensor or quantisation point."""
    if name.startswith(("language/head", "language/embedding")):
        return recipe.head  # a tied table is the head
    if name.startswith("language/"):
        return recipe.language
    in_tower = name.startswith(("vision/patch_embed/", "vision/layers/"))
    return recipe.vision if in_tower else recipe.connector


def quantize_params(
    family: Family,
    config: Any,
    recipe: Recipe,
    params: Params,
    batch: Batch | None = None,
    progress: Progress = no_progress,
) -> tuple[Params, dict[str, Any]]:
    """Quantise a float model as ``recipe`` says.

    Args:
        params: float tensors by name, layers separate; for a rotation of an :func:`untied` model.
        batch: calibration prompts with their answers; needed when some activation is static or
            the weights are rounded by GPTQ.

    Returns:
        Tensors by name (``QWeight`` where quantised, with ``act_scale`` tables), and a report with
        weight error per layer and clipping per quantisation point.

    Raises:
        UserError: a recipe that needs calibration data without any, or data without pictures.
    """
    dtypes = {name: value.dtype for name, value in params.items()}
    if recipe.rotate:
        params = rotate_params(params, family.streams(config), recipe.seed)
    target = abstract_model(family, config, recipe)
    done: Params = {}
    report: dict[str, Any] = {"weights": {}, "points": {}}
    if recipe.needs_calibration:
        if batch is None:
            raise UserError(
                f"recipe {recipe.name!r} needs calibration data: pass --calibration FILE.jsonl"
            )
        runner = QuantizingRunner(target, recipe, section_of, progress)
        source = float_model(family, config, recipe, params)
        source(jax.tree.map(jnp.asarray, batch), runner)
        done, report = runner.params, runner.report
    out: Params = {}
    for name, shape in progress(list(abstract_params(target).items()), "quantise weights"):
        if name in done:
            out[name] = done[name]
        elif isinstance(shape, QWeight):
            s = section_of(name, recipe)
            out[name] = round_weight(params[name], s.w_bits, s.group_size, recipe.weight_clip)
            report["weights"][name] = relative_error(out[name], params[name])
        else:
            out[name] = params[name].astype(dtypes[name])
    return out, report


def float_model(family: Family, config: Any, recipe: Recipe, params: Params):
    """The unquantised model in float32, rotated if the recipe says so; ``params`` stays."""
    model = abstract_model(family, config, Recipe(rotate=recipe.rotate, seed=recipe.seed))
    set_params(model, {k: np.asarray(v, np.float32) for k, v in params.items()})
    return model


def untied(config: Any, params: Params) -> tuple[Any, Params]:
    """The same model with a head of its own.

    A rotation needs it: the final norm's weight goes into the head and not into the embedding.
    """
    if not config.language.tied_head:
        return config, params
    language = dataclasses.replace(config.language, tied_head=False)
    head = {"language/head/kernel": params["language/embedding"]}
    return dataclasses.replace(config, language=language), {**params, **head}


def abstract_model(family: Family, config: Any, recipe: Recipe, dtype=jnp.float32):
    """The model's structure with shapes in place of arrays: costs no memory at any size."""
    return nnx.eval_shape(lambda: family.build(config, recipe, dtype, nnx.Rngs(0)))


def relative_error(q: QWeight, weight: np.ndarray) -> float:
    """``||w - q|| / ||w||``."""
    w = np.asarray(weight, np.float32)
    return float(np.linalg.norm(w - np.asarray(q.dequantize())) / (np.linalg.norm(w) + 1e-30))
