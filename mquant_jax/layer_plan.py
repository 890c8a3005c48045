"""How a recipe quantises each layer of a model, from config.json alone.

A config and a recipe give a frozen spec for every dense layer and table, and the size of every part
before and after. Modules, calibration and this plan all get a layer's section from
:meth:`mquant_jax.recipe.Recipe.section_for`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from mquant_jax.checkpoint.writer import part_of
from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Family, abstract_model, with_head
from mquant_jax.models.streams import Streams
from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.nn.params import (
    STACK,
    Params,
    abstract_params,
    find,
    layer_path,
    parameter_bytes,
)
from mquant_jax.numerics import QWeight
from mquant_jax.recipe import Recipe
from mquant_jax.sections import kind_of, numbered

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One dense layer, or a table.

    Attributes:
        path: its name in the model, ``language/layers/3/down_proj``.
        in_features, out_features: of the quantised layer; an online rotation may pad its inputs.
        point: path of the quantisation point of its input; ``None`` for a lookup table.
        w_bits: bits per weight; 16 is float.
        group_size: input columns per weight scale; ``None``: all.
        activations: quantisation mode of its input: ``static``, ``dynamic`` or ``none``.
        rotation: ``online`` (of its input, at run time), ``folded`` into its weights, or ``none``.
        protection: ``split`` (an input channel may be computed separately) or ``none``.
        bytes_before, bytes_after: size of its weights and scales, in source and checkpoint.
    """

    path: str
    in_features: int
    out_features: int
    point: str | None
    w_bits: int
    group_size: int | None
    activations: str
    rotation: str
    protection: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class PartPlan:
    """One part of a checkpoint: a block, a connector's module, a table.

    Attributes:
        name: its name in the checkpoint, ``language.layers.3``.
        layers: its dense layers, or its table.
        bytes_before, bytes_after: size of all its tensors.
        elements: number of elements of all its tensors.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    bytes_before: int
    bytes_after: int
    elements: int


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The plan for a whole model.

    Attributes:
        family: the family's name.
        config: config object of the quantised model (a rotation unties the head).
        recipe: the recipe.
        parts: in the order of the model's tensors.
    """

    family: str
    config: Any
    recipe: Recipe
    parts: tuple[PartPlan, ...]

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(layer for part in self.parts for layer in part.layers)

    @property
    def bytes_before(self) -> int:
        return sum(part.bytes_before for part in self.parts)

    @property
    def bytes_after(self) -> int:
        return sum(part.bytes_after for part in self.parts)


def stored_bytes(hf_config: Mapping[str, Any]) -> int:
    """Bytes per element of the source's tensors according to config.json; default two."""
    text = hf_config.get("text_config") or hf_config.get("llm_config") or {}
    for table in (hf_config, text):
        for key in ("dtype", "torch_dtype"):
            if (found := table.get(key)) is not None:
                return _DTYPE_BYTES.get(str(found), 2)
    return 2


def layer_plan(family: Family, config: Any, recipe: Recipe, float_bytes: int = 2) -> LayerPlan:
    """The plan of a conversion.

    Args:
        config: the family's config object of the source.
        float_bytes: bytes per element of the source's tensors, see :func:`stored_bytes`.

    Raises:
        UserError: the recipe does not fit the model, for example a group size or a rule.
    """
    source = {rule.dst: math.prod(rule.shape) for rule in family.weight_rules(config)}
    model = target_model(family, config, recipe)
    params = abstract_params(model)
    after = {name: _stored(name, value, source, float_bytes) for name, value in params.items()}
    specs = _specs(model, params, family.streams(model.config), recipe, source, after, float_bytes)
    parts = defaultdict(list)
    for name in params:
        parts[part_of(name)].append(name)
    before: dict[str, int] = defaultdict(int)
    for name, size in source.items():
        before[part_of(name)] += size * float_bytes
    return LayerPlan(family.name, model.config, recipe, tuple(
        PartPlan(
            part,
            tuple(specs[name] for name in names if name in specs),
            before[part],
            sum(after[name] for name in names),
            sum(math.prod(_shape(params[name])) for name in names),
        )
        for part, names in parts.items()
    ))  # fmt: skip


def target_model(family: Family, config: Any, recipe: Recipe) -> VLM:
    """The abstract quantised model; a rotation unties its head.

    Args:
        config: the family's config object of the source.

    Raises:
        UserError: the recipe does not fit the model.
    """
    config = with_head(config, tied=False) if recipe.rotate else config
    try:
        return abstract_model(family, config, recipe)
    except ValueError as e:
        raise UserError(f"recipe {recipe.name!r} does not fit this model: {e}") from e


def _shape(value: Any) -> tuple[int, ...]:
    """Shape of a tensor before quantisation."""
    quantised = isinstance(value, QWeight)
    return (value.out_features, value.in_features) if quantised else value.shape


def _stored(name: str, value: Any, source: Mapping[str, int], float_bytes: int) -> int:
    """Bytes of a tensor in the checkpoint. Float tensors keep the source's dtype; new ones are
    float32."""
    if isinstance(value, QWeight):
        return parameter_bytes({name: value})
    kept = name in source or name == "language/head/kernel"  # untied: a copy of the embedding
    integer = np.issubdtype(value.dtype, np.integer)
    return math.prod(value.shape) * (float_bytes if kept and not integer else 4)


def _specs(
    model: VLM,
    params: Params,
    streams: Streams,
    recipe: Recipe,
    source: Mapping[str, int],
    after: Mapping[str, int],
    float_bytes: int,
) -> dict[str, LayerSpec]:
    """Name of a weight tensor -> spec of its layer."""
    points, folded = _points(model), _folded(streams) if recipe.rotate else set()
    tied, out = "language/head/kernel" not in params, {}
    for name, value in params.items():
        path = layer_path(name, tied)
        if path is None:
            continue
        kind, section = kind_of(path), recipe.section_for(path)
        at, point = points.get(kind, (None, None))
        rotation = "folded" if kind in folded else "none"
        out_features, in_features = _shape(value)
        out[name] = LayerSpec(
            path,
            in_features,
            out_features,
            at and numbered(at, path),
            section.w_bits,
            section.group_size if section.quantised else None,
            "none" if point is None else point.mode,
            "online" if point is not None and point.rotation is not None else rotation,
            "split" if f"{path}/split/index" in params else "none",
            source.get(name, 0) * float_bytes,
            after[name],
        )
    return out


def _points(model: VLM) -> dict[str, tuple[str, ActQuant]]:
    """Kind of a dense layer -> path of its input's quantisation point, and the point."""
    out = {"language/head": ("language/head_in", model.language.head_in)}
    for path, module in nnx.iter_modules(model):
        names = [f"{name}/*" if name == STACK else str(name) for name in path]
        for point, readers in getattr(module, "POINTS", {}).items():
            for reader in readers:
                at = "/".join((*names, point))
                out["/".join((*names, reader))] = at, find(module, point)
    return out


def _folded(streams: Streams) -> set[str]:
    """Kinds of layers and tables that a rotation is folded into."""
    out: set[str] = set()
    for stream in streams.streams:
        out.update(stream.tables, stream.writers, *(read.readers for read in stream.reads))
    for attention in streams.attentions:
        out.update(*attention.pairs)
    return out
