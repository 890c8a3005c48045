"""Float parameters and calibration prompts in, quantised parameters and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.base import TOKEN_CLASSES, Batch, Family, Processor, Prompt
from mquant_jax.errors import UserError
from mquant_jax.nn.params import Params, abstract_params, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.observe import ObservingRunner, RangeObserver
from mquant_jax.ptq.scales import activation_scale, point_report, round_weight
from mquant_jax.recipe import Recipe, Section

Progress = Callable[[Iterable, str], Iterable]


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
    batches: Sequence[Batch] | None = None,
    progress: Progress = no_progress,
) -> tuple[Params, dict[str, Any]]:
    """Quantise a float model as ``recipe`` says.

    Args:
        params: float tensors by name, layers separate.
        batches: calibration batches; needed when some activation is static.

    Returns:
        Tensors by name (``QWeight`` where quantised, with ``act_scale`` tables), and a report with
        weight error per layer and clipping per quantisation point.

    Raises:
        UserError: static activations without calibration data, or data without pictures.
    """
    shapes = abstract_params(abstract_model(family, config, recipe))
    scales, points = {}, {}
    if recipe.needs_calibration:
        if not batches:
            raise UserError(
                f"recipe {recipe.name!r} has static activations and needs calibration data: "
                "pass --calibration FILE.jsonl"
            )
        scales, points = calibrate(family, config, recipe, params, batches, progress)
    out, weights = {}, {}
    for name, shape in progress(list(shapes.items()), "quantise weights"):
        if name.endswith("/act_scale"):
            out[name] = scales[name]
        elif isinstance(shape, QWeight):
            s = section_of(name, recipe)
            out[name] = round_weight(params[name], s.w_bits, s.group_size, recipe.weight_clip)
            weights[name] = relative_error(out[name], params[name])
        else:
            out[name] = params[name]
    return out, {"weights": weights, "points": points}


def abstract_model(family: Family, config: Any, recipe: Recipe, dtype=jnp.float32):
    """The model's structure with shapes in place of arrays: costs no memory at any size."""
    return nnx.eval_shape(lambda: family.build(config, recipe, dtype, nnx.Rngs(0)))


def relative_error(q: QWeight, weight: np.ndarray) -> float:
    """``||w - q|| / ||w||``."""
    w = np.asarray(weight, np.float32)
    return float(np.linalg.norm(w - np.asarray(q.dequantize())) / (np.linalg.norm(w) + 1e-30))


def calibrate(
    family: Family,
    config: Any,
    recipe: Recipe,
    params: Params,
    batches: Sequence[Batch],
    progress: Progress = no_progress,
) -> tuple[Params, dict[str, Any]]:
    """Static scale tables of every point that needs one, from the float model's activations.

    Returns:
        ``{point/act_scale: float32 [n_classes]}`` and a clipping report per point.
    """
    model = abstract_model(family, config, Recipe(modality_scales=recipe.modality_scales))
    # nnx wants its own copies: set_params consumes what it is given.
    set_params(model, {k: np.asarray(v, np.float32) for k, v in params.items()})
    observer = RangeObserver(len(TOKEN_CLASSES))
    runner = ObservingRunner(observer)
    for batch in progress(list(batches), "calibrate"):
        model(jax.tree.map(jnp.asarray, batch), runner)
    scales, report = {}, {}
    for point, hists in observer.points.items():
        if section_of(point, recipe).activations != "static":
            continue
        if not point.startswith("language/layers/"):
            hists = hists[:1]  # one class in the tower; the head only ever predicts text
        elif not recipe.modality_scales:
            hists = [hists[0].merge(hists[1])]
        scale = activation_scale(hists, recipe.calibration.observer, point)
        scales[f"{point}/act_scale"] = scale
        report[point] = point_report(hists, scale)
    return scales, report


def calibration_batches(
    prompts: Sequence[Prompt], processor: Processor, batch_size: int = 16
) -> list[Batch]:
    """Prompts sorted by length and collated, so that little is padding."""
    ordered = sorted(prompts, key=lambda p: len(p.input_ids))
    chunks = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [processor.collate(chunk) for chunk in chunks]
