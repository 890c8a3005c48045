"""Float parameters and calibration prompts in, quantised parameters and a report out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch, Config, Family, abstract_model
from mquant_jax.nn.decoder import SinkRule
from mquant_jax.nn.params import Params, abstract_params, set_params
from mquant_jax.nn.stack import Runner
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.balance import balance_params
from mquant_jax.ptq.prefix import prefix_ids, prefix_params
from mquant_jax.ptq.rotate import rotate_params
from mquant_jax.ptq.scales import round_weight
from mquant_jax.ptq.sequential import Progress, QuantizingRunner
from mquant_jax.ptq.sinks import find_sinks
from mquant_jax.ptq.smooth import smooth_params
from mquant_jax.ptq.statistics import StatisticsRunner
from mquant_jax.ptq.tune import tune
from mquant_jax.recipe import Recipe, Section
from mquant_jax.stages import stage


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
    config: Config,
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
    if recipe.needs_calibration and batch is None:
        raise UserError(
            f"recipe {recipe.name!r} needs calibration data: pass --calibration FILE.jsonl"
        )
    dtypes = {name: value.dtype for name, value in params.items()}
    report: dict[str, Any] = {"weights": {}, "points": {}}
    if batch is not None:
        batch = jax.tree.map(jnp.asarray, batch)
    if recipe.balance:
        params, report["balance"] = _balanced(family, config, params, batch)
    if recipe.rotate:
        params = _rotated(family, config, recipe, params)
    target = abstract_model(family, config, recipe)
    done: Params = {}
    if recipe.needs_calibration and batch is not None:
        params, done = _calibrated(family, config, recipe, params, batch, target, progress, report)
    out = _rounded(target, recipe, params, done, dtypes, progress, report)
    if recipe.learns and batch is not None:
        set_params(target, dict(out))
        teacher = float_model(family, config, without_prefix(recipe), params)
        with stage("learn scales"):
            learned, report["tuning"] = tune(target, teacher, batch, recipe.tune, progress)
        for name, value in learned.items():
            old = out[name]
            out[name] = dataclasses.replace(old, scale=value) if isinstance(old, QWeight) else value
    return out, report


@stage("balance")
def _balanced(
    family: Family, config: Config, params: Params, batch: Batch | None
) -> tuple[Params, dict[str, Any]]:
    look = StatisticsRunner(columns=True, sample=0)
    float_model(family, config, Recipe(), params)(batch, look)
    return balance_params(params, family.streams(config), look)


@stage("rotate")
def _rotated(family: Family, config: Config, recipe: Recipe, params: Params) -> Params:
    return rotate_params(
        params,
        family.streams(config),
        recipe.seed,
        recipe.online_signs,
        recipe.orthogonal,
        recipe.online_reads,
    )


@stage("round the rest")
def _rounded(
    target: nnx.Module,
    recipe: Recipe,
    params: Params,
    done: Params,
    dtypes: dict[str, Any],
    progress: Progress,
    report: dict[str, Any],
) -> Params:
    """Every tensor of ``target``: those in ``done`` as they are, other weights rounded to nearest,
    the rest in the source's dtype."""
    out: Params = {}
    for name, shape in progress(list(abstract_params(target).items()), "quantise weights"):
        if name in done:
            out[name] = done[name]
        elif isinstance(shape, QWeight):
            s = section_of(name, recipe)
            out[name] = round_weight(params[name], s.w_bits, s.group_size, recipe.weights.clip)
            report["weights"][name] = relative_error(out[name], params[name])
        else:
            out[name] = params[name].astype(dtypes.get(name, np.float32))
    return out


def _calibrated(
    family: Family,
    config: Config,
    recipe: Recipe,
    params: Params,
    batch: Batch,
    target: nnx.Module,
    progress: Progress,
    report: dict[str, Any],
) -> tuple[Params, Params]:
    """Everything that the calibration batch decides; ``report`` is filled.

    Returns:
        The float tensors, smoothed if the recipe says so, and what is made of them.
    """
    bare, done = without_prefix(recipe), {}
    look = StatisticsRunner(columns=False)

    def run(recipe: Recipe, params: Params, runner: Runner, name: str = "observe") -> None:
        with stage(name):
            float_model(family, config, recipe, params)(batch, runner)

    if recipe.smooth:
        by_column = StatisticsRunner(columns=True)
        run(bare, params, by_column)
        params, strengths = smooth_params(
            params, family.streams(config), recipe, by_column, section_of
        )
        report["smoothing"] = strengths
    if recipe.finds_sinks or recipe.weights.needs_float_inputs:
        run(bare, params, look)
    if recipe.finds_sinks:
        found = sinks_of(look, batch)
        report["sinks"] = dict(zip(("positions", "ids"), found, strict=True))
        if recipe.marks_sinks:
            done = sink_rule(*found)
        if recipe.prefix_sinks:
            report["prefix"] = prefix_ids(*found, batch, recipe.prefix_sinks)
            model = float_model(family, config, bare, params)
            done |= prefix_params(model, report["prefix"])
            if recipe.weights.needs_float_inputs:
                look = StatisticsRunner(columns=False)
                run(recipe, params | done, look)
    inputs = look.inputs if recipe.weights.needs_float_inputs else None
    runner = QuantizingRunner(target, recipe, section_of, progress, inputs)
    run(recipe, params | done, runner, "calibrate and round")
    report |= runner.report
    return params, done | runner.params


def sinks_of(look: StatisticsRunner, batch: Batch) -> tuple[list[int], list[int]]:
    """Positions and ids of the sinks that a look at the language model showed."""
    tokens = {k: v for k, v in look.tokens.items() if k.startswith("language/layers/")}
    ids, order, classes = map(np.asarray, (batch.input_ids, batch.order, batch.token_class))
    return find_sinks(tokens, ids, order, classes, SinkRule.POSITIONS, SinkRule.IDS)


def sink_rule(positions: list[int], ids: list[int]) -> Params:
    """The tensors of a :class:`SinkRule`."""

    def padded(values: list[int], size: int) -> np.ndarray:
        return np.asarray([*values, *[-1] * (size - len(values))], np.int32)

    return {
        "language/sinks/positions": padded(positions, SinkRule.POSITIONS),
        "language/sinks/ids": padded(ids, SinkRule.IDS),
    }


def float_model(family: Family, config: Config, recipe: Recipe, params: Params):
    """The unquantised model in float32, rotated and with a prefix if the recipe says so; ``params``
    stays."""
    kept = ("rotate", "orthogonal", "online_signs", "online_reads", "seed", "prefix_sinks")
    model = abstract_model(family, config, Recipe(**{k: getattr(recipe, k) for k in kept}))
    if recipe.marks_sinks:  # as the quantised model will: calibration goes by token class
        model.language.sinks = nnx.eval_shape(SinkRule)
        params = sink_rule([], []) | params
    set_params(model, {k: np.asarray(v, _working_dtype(v)) for k, v in params.items()})
    return model


def without_prefix(recipe: Recipe) -> Recipe:
    """The recipe of a model that sees prompts alone."""
    return dataclasses.replace(recipe, prefix_sinks=0)


def _working_dtype(value: np.ndarray):
    return value.dtype if np.issubdtype(value.dtype, np.integer) else np.float32


def untied(config: Config, params: Params) -> tuple[Config, Params]:
    """The same model with a head of its own.

    A rotation needs it: the final norm's weight goes into the head and not into the embedding.
    """
    if not config.language.tied_head:
        return config, params
    language = dataclasses.replace(config.language, tied_head=False)
    head = {"language/head/kernel": params["language/embedding"]}
    return dataclasses.replace(config, language=language), {**params, **head}


def relative_error(q: QWeight, weight: np.ndarray) -> float:
    """``||w - q|| / ||w||``."""
    w = np.asarray(weight, np.float32)
    return float(np.linalg.norm(w - np.asarray(q.dequantize())) / (np.linalg.norm(w) + 1e-30))
