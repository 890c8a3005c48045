"""What a checkpoint folder tells about its quantisation: record, scales and sizes."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mquant_jax.checkpoint.manifest import REPORT, Verify
from mquant_jax.checkpoint.reader import Checkpoint
from mquant_jax.checkpoint.writer import part_of
from mquant_jax.errors import UserError
from mquant_jax.files import is_file, read_json
from mquant_jax.layer_plan import LayerPlan, layer_plan, stored_bytes
from mquant_jax.loading import describe
from mquant_jax.nn.params import layer_path
from mquant_jax.recipe import Recipe
from mquant_jax.sections import kind_of

V = TypeVar("V")


@dataclasses.dataclass(frozen=True)
class Findings:
    """The data of a checkpoint's report.

    Attributes:
        folder: the checkpoint folder.
        manifest: contents of mquant.json.
        recipe: the recipe of the conversion.
        plan: how each layer is quantised, and sizes in the source.
        record: contents of report.json, or empty. docs/checkpoints.md lists its tables.
        act_scales: path of a static point -> float32 ``[classes]`` or ``[1]``, units per step.
        weight_scales: path of a quantised layer -> smallest, median and largest scale.
    """

    folder: Path
    manifest: dict[str, Any]
    recipe: Recipe
    plan: LayerPlan
    record: dict[str, Any]
    act_scales: dict[str, np.ndarray]
    weight_scales: dict[str, tuple[float, float, float]]

    @property
    def weight_errors(self) -> dict[str, float]:
        """Path of a layer -> relative error of its weight."""
        return self._by_layer("weights")

    @property
    def output_errors(self) -> dict[str, float]:
        """Path of a layer -> relative error of its output on the calibration data."""
        return self._by_layer("outputs")

    def _by_layer(self, table: str) -> dict[str, float]:
        tied = self.manifest["tied_head"]
        named = ((layer_path(name, tied), e) for name, e in self.record.get(table, {}).items())
        return {path: error for path, error in named if path is not None}

    @property
    def part_bytes(self) -> dict[str, tuple[int, int]]:
        """Kind of part (``language.layers.*``) -> bytes of its tensors in the source and here."""
        before: dict[str, int] = defaultdict(int)
        after: dict[str, int] = defaultdict(int)
        for part in self.plan.parts:
            before[_part_kind(part.name)] += part.bytes_before
        for name, entry in self.manifest["tensors"].items():
            after[_part_kind(part_of(name))] += entry["bytes"]
        return {kind: (before[kind], after[kind]) for kind in dict.fromkeys([*before, *after])}

    def in_order(self, values: Mapping[str, V]) -> dict[str, V]:
        """Values by path, in the order in which a block runs its points and layers if the record
        has it."""
        tables = (self.record.get(name, {}) for name in ("points", "ranges", "weights"))
        kinds = dict.fromkeys(kind_of(path) for table in tables for path in table)
        rank = {kind.removesuffix("/kernel"): i for i, kind in enumerate(kinds)}
        order = sorted(values, key=lambda path: rank.get(kind_of(path), len(rank)))
        return {path: values[path] for path in order}

    @property
    def missing(self) -> list[str]:
        """What the record lacks, and why."""
        return list(_missing(self.record, self.recipe))


def collect(folder: str | Path, verify: Verify = True) -> Findings:
    """Collect the data of a report. Of weights, only the scales are read.

    Raises:
        UserError: not a checkpoint, or a damaged one.
    """
    with Checkpoint(folder, verify) as checkpoint:
        family, config, recipe, hf_config = describe(checkpoint.folder, checkpoint.manifest)
        if recipe.rotate:  # it unties the head, but the plan starts from the source
            config = family.config_from_hf(hf_config)
        return Findings(
            checkpoint.folder,
            checkpoint.manifest,
            recipe,
            layer_plan(family, config, recipe, stored_bytes(hf_config)),
            read_record(checkpoint.folder) or {},
            dict(_act_scales(checkpoint)),
            dict(_weight_scales(checkpoint)),
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Contents of report.json, or ``None`` if the checkpoint has none.

    Raises:
        UserError: it is not a quantisation report.
    """
    path = folder / REPORT
    if not is_file(path):
        return None
    record = read_json(path)
    wrong = [name for name, fits in _FORMS.items() if name in record and not fits(record[name])]
    if wrong:
        raise UserError(
            f"{path}: damaged: {', '.join(wrong)}: not valid in a quantisation report; "
            "convert the model again"
        )
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(table: Any, *fields: str) -> bool:
    """Whether ``table`` is a table of numbers with at least these fields."""
    return isinstance(table, dict) and set(fields) <= set(table) and all(
        map(_is_number, table.values())
    )  # fmt: skip


def _points(table: Any, *fields: str) -> bool:
    """Whether ``table`` maps point -> token class -> figures."""
    return isinstance(table, dict) and all(
        isinstance(classes, dict)
        and all(_numbers(figures, *fields) for figures in classes.values())
        for classes in table.values()
    )


def _has(value: Any, **kinds: type) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in kinds.items())


_FORMS = {
    **dict.fromkeys(("weights", "outputs", "balance", "smoothing"), _numbers),
    "points": lambda v: _points(v, "amax", "clip", "clipped", "error"),
    **dict.fromkeys(("ranges", "before"), lambda v: _points(v, "amax", "rms")),
    "sinks": lambda v: _has(v, positions=list, ids=list),
    "coverage": lambda v: (
        _has(v, prompts=int, patches=int, lengths=list)
        and len(v["lengths"]) == 3
        and _numbers(v.get("tokens"))
    ),
    "calibration": lambda v: _has(v, pictures=list, questions=list),
    "tuning": lambda v: isinstance(v, dict),
    "prefix": lambda v: isinstance(v, list),
    "split": lambda v: (
        isinstance(v, dict)
        and all(_has(e, channel=int, rows_led=float, split=bool) for e in v.values())
    ),
}


def _missing(record: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    if not recipe.changes_weights:
        return
    if not record:
        yield "report.json: errors, ranges and decisions are unknown"
        return
    if not recipe.needs_calibration:
        yield "activation ranges: the recipe needs no calibration, so none were recorded"
    elif "coverage" not in record:
        yield ("calibration coverage, output errors and ranges before rotation: converted by a "
               "version that did not record them; convert the model again")  # fmt: skip
        return
    elif "before" not in record:
        yield ("activation ranges before rotation: only recorded by recipes that balance channels "
               "or smooth without rotating; others do not run the unrotated model")  # fmt: skip
    if not record.get("outputs"):
        yield "output errors: only recorded with GPTQ; this recipe rounds to nearest"


def _act_scales(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    for name in checkpoint.names:
        if name.endswith("/act_scale"):
            yield name.removesuffix("/act_scale"), np.atleast_1d(checkpoint.read(name))


def _weight_scales(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[float, float, float]]]:
    for name, entry in checkpoint.manifest["tensors"].items():
        path = layer_path(name, checkpoint.manifest["tied_head"])
        if "bits" in entry and path is not None:
            scale = checkpoint.read_scale(name)
            yield path, (float(scale.min()), float(np.median(scale)), float(scale.max()))


def _part_kind(part: str) -> str:
    return kind_of(part.replace(".", "/")).replace("/", ".")


def by_stack(values: Mapping[str, V]) -> dict[str, dict[str, dict[int, V]]]:
    """Regroup values by path as stack (``language/layers``) -> name in a block -> layer index ->
    value, indices ascending; paths without an index are left out."""
    out: dict[str, dict[str, dict[int, V]]] = {}
    for path, value in values.items():
        stack, star, name = kind_of(path).partition("/*/")
        if star:
            number = next(int(part) for part in path.split("/") if part.isdigit())
            out.setdefault(stack, {}).setdefault(name, {})[number] = value
    return {
        stack: {name: dict(sorted(layers.items())) for name, layers in names.items()}
        for stack, names in out.items()
    }


def outside_stacks(values: Mapping[str, V]) -> dict[str, V]:
    """The values that :func:`by_stack` leaves out."""
    return {path: value for path, value in values.items() if "/*/" not in kind_of(path)}
