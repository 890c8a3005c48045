"""From a checkpoint folder to a model ready to run."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mquant_jax.checkpoint.store import CONFIG, load_json, load_manifest, load_params
from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Config, Family, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import Params, abstract_params, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.recipe import Recipe


class Loaded(NamedTuple):
    """A loaded checkpoint: the Flax module, the family's config, mquant.json, the family, and the
    Hugging Face config."""

    model: VLM
    config: Config
    manifest: dict[str, Any]
    family: Family
    hf_config: dict[str, Any]


def load_model(
    folder: str | Path,
    dtype: Any = None,
    *,
    keep_packed: bool | None = None,
    verify_hashes: bool = False,
) -> Loaded:
    """Load a checkpoint that ``python -m convert.hf_to_flax`` wrote.

    Args:
        dtype: type of everything that is not integer; default float32 on CPU, else bfloat16.
        keep_packed: hold int4 two values per byte, as in the checkpoint; ``False``: one int8 per
            value. The default is the form that the platform's products want.
        verify_hashes: see :func:`load_params`.

    Raises:
        UserError: missing, damaged or unfitting files.
    """
    folder = Path(folder)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
    family, config, recipe, hf_config = _describe(folder)
    params, manifest = load_params(folder, verify_hashes)
    try:
        model = abstract_model(family, config, recipe, dtype)
    except ValueError as e:
        raise UserError(f"{folder}: config.json and recipe do not fit: {e}") from e
    _check(params, abstract_params(model), folder)
    set_params(model, params, partial(_held, keep_packed))
    return Loaded(model, config, manifest, family, hf_config)


def _describe(folder: Path) -> tuple[Family, Config, Recipe, dict[str, Any]]:
    """Family, config and recipe as the folder's JSON files give them."""
    manifest = load_manifest(folder)
    hf_config = load_json(folder / CONFIG)
    family = family_for(hf_config, folder / CONFIG)
    config = family.config_from_hf(hf_config)
    language = dataclasses.replace(config.language, tied_head=manifest["tied_head"])
    recipe = Recipe.from_json(manifest["recipe"], f"{folder}: recipe")
    return family, dataclasses.replace(config, language=language), recipe, hf_config


def _check(params: Params, expected: Params, folder: Path) -> None:
    """The tensors are those of the model.

    Raises:
        UserError: they are not.
    """
    if params.keys() != expected.keys():
        odd = sorted(params.keys() ^ expected.keys())
        raise UserError(
            f"{folder}: {len(odd)} tensors do not fit the recipe and config, first {odd[0]}; "
            "convert the model again"
        )
    for name, like in expected.items():
        value = params[name]
        built: tuple[Any, Any] = jax.tree.structure(value), jax.tree.structure(like)
        if built[0] != built[1] or _shapes(value) != _shapes(like):
            raise UserError(
                f"{folder}: tensor {name}: expected {_shapes(like)}, found {_shapes(value)}; "
                "convert the model again"
            )


def _held(keep_packed: bool | None, value: Any, like: Any) -> Any:
    """A tensor in the model's type; a quantised one as the platform wants it, or as asked for."""
    if not isinstance(value, QWeight):
        return jnp.asarray(value).astype(like.dtype)
    if keep_packed is None:
        return held(value)
    return value if keep_packed else value.unpacked()


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(value)]
