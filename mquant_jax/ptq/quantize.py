"""Quantise a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Config, Family, Processor, Prompt, abstract_model
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.ptq.calibration_data import chunked, load_calibration, with_answer
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.ptq.states import States
from mquant_jax.recipe import Recipe
from mquant_jax.samples import Sample, each

Samples = str | Path | Sequence[Sample | Prompt] | None


def quantize_model(
    module: VLM,
    config: Config,
    family: Family,
    processor: Processor,
    recipe: Recipe,
    samples: Samples = None,
) -> tuple[VLM, Config, dict[str, Any]]:
    """A quantised copy of a float model, its config, and the report.

    Args:
        samples: calibration data: a JSONL file, samples or prompts; ``None``: the bundled set.

    Raises:
        UserError: the model is quantised already; unreadable samples; see
            :class:`~mquant_jax.ptq.pipeline.Conversion`.
    """
    params = get_params(module)
    if any(isinstance(value, QWeight) for value in params.values()):
        raise UserError("the model is quantised already; load the float checkpoint")
    if recipe.rotate:
        config, params = untied(config, params)
    batches, states = None, States()
    if recipe.needs_calibration:
        prompts = _prompts(samples, processor, recipe, family)
        batches = chunked(prompts, processor, states).batches
    made, report = quantize_params(family, config, recipe, params, batches)
    states.close()
    dtype = next(v.dtype for v in params.values() if jnp.issubdtype(v.dtype, jnp.floating))
    model = abstract_model(family, config, recipe, dtype)

    def hold(value: Any, like: Any) -> Any:
        return held(value) if isinstance(value, QWeight) else jnp.asarray(value).astype(like.dtype)

    set_params(model, made, hold)
    return model, config, report


def _prompts(
    samples: Samples, processor: Processor, recipe: Recipe, family: Family
) -> list[Prompt]:
    limit = recipe.calibration.max_samples
    if samples is None or isinstance(samples, str | Path):
        path = None if samples is None else Path(samples)
        return load_calibration(path, processor, limit, family.pictures)
    taken = list(samples)[:limit]
    if not taken:
        raise UserError("samples: expected one at least")
    prompts = [s for s in taken if isinstance(s, Prompt)]
    given = [s for s in taken if isinstance(s, Sample)]
    if len(taken) == len(prompts):
        return prompts
    if len(taken) != len(given):
        raise UserError("samples: expected a JSONL file, or Sample or Prompt objects")
    return each(given, lambda sample: with_answer(sample, processor))
