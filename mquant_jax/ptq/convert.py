"""The conversion of a Hugging Face model folder into a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.atomic import check_destination
from mquant_jax.checkpoint.plan import Plan, plan
from mquant_jax.checkpoint.source import Reader
from mquant_jax.checkpoint.store import MANIFEST, save
from mquant_jax.cli_support import progress, warn
from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch, Config, Family, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.recipe import Recipe
from mquant_jax.stages import stage


def convert(
    src: Path, dst: Path, recipe: Recipe, calibration: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Convert ``src`` into the checkpoint ``dst``; everything cheap is checked first.

    Returns:
        The manifest, as written to mquant.json.

    Raises:
        UserError: bad input; nothing was written.
    """
    check_destination(dst, MANIFEST, overwrite)
    if calibration is not None and not calibration.is_file():
        raise UserError(f"--calibration {calibration}: no such file")
    reader = Reader(src)
    family = family_for(reader.config, src / "config.json")
    todo = plan(family, read_config(family, reader), reader)
    _check_recipe(family, todo, recipe)
    _check_ties(reader.config, todo)
    with stage("read calibration"):
        batch = _calibration_batch(family, todo, recipe, src, calibration)
    with stage("read weights"):
        params: dict[str, Any] = todo.read(reader, progress)
    config, report = todo.config, None
    if recipe.changes_weights:
        from mquant_jax.ptq.pipeline import quantize_params, untied

        config, params = untied(config, params) if recipe.rotate else (config, params)
        params, report = quantize_params(family, config, recipe, params, batch, progress)
    with stage("write"):
        return save(
            dst,
            params,
            family=family.name,
            hf_config=reader.config,
            recipe=recipe,
            tied_head=config.language.tied_head,
            files=[src / "config.json", *reader.side_files()],
            report=report,
            overwrite=overwrite,
        )


def read_config(family: Family, reader: Reader) -> Config:
    """The family's config object.

    Raises:
        UserError: a key of config.json is missing or has an impossible value.
    """
    try:
        return family.config_from_hf(reader.config)
    except (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError) as e:
        path = reader.folder / "config.json"
        raise UserError(f"{path}: a key has an impossible value ({family.name}): {e}") from e


def _check_recipe(family: Family, todo: Plan, recipe: Recipe) -> None:
    """Shapes and recipe fit together (group sizes divide, say).

    Raises:
        UserError: they do not.
    """
    try:
        abstract_model(family, todo.config, recipe)
    except ValueError as e:
        raise UserError(f"recipe {recipe.name!r} does not fit this model: {e}") from e


def _check_ties(hf: dict[str, Any], todo: Plan) -> None:
    if todo.tied_head and hf.get("tie_word_embeddings") is False:
        warn("config.json says the head is not tied, but the checkpoint has no head of its own; "
             "the embedding is used")  # fmt: skip


def _calibration_batch(
    family: Family, todo: Plan, recipe: Recipe, src: Path, path: Path | None
) -> Batch | None:
    """Calibration data, read before the weights so that bad data fails early."""
    if not recipe.needs_calibration:
        if path is not None:
            warn(f"--calibration is not used: recipe {recipe.name!r} needs no data")
        return None
    from mquant_jax.ptq.calibration_data import load_calibration

    processor, limit = family.processor(src, todo.config), recipe.calibration.max_samples
    return processor.collate(load_calibration(path, processor, limit, family.pictures))
