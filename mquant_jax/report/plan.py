"""The plan of a conversion, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mquant_jax.layer_plan import LayerPlan, LayerSpec, PartPlan
from mquant_jax.sections import kind_of

_MIB, _GIB = 1 << 20, 1 << 30


def summary(plan: LayerPlan) -> dict[str, Any]:
    """The plan as JSON: parts with their layers; equal blocks of a stack appear once with their
    ``count``. Sizes are in bytes."""
    parts: dict[str, dict[str, Any]] = {}
    for part in plan.parts:
        kind = _kind(part.name)
        row = parts.setdefault(kind, {"part": kind, "count": 0, "bytes_before": 0, "bytes_after": 0,
                                      "layers": _layers(part)})  # fmt: skip
        row["count"] += 1
        row["bytes_before"] += part.bytes_before
        row["bytes_after"] += part.bytes_after
    return {
        "family": plan.family,
        "recipe": plan.recipe.to_json(),
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "parts": list(parts.values()),
    }


def _kind(name: str) -> str:
    return kind_of(name.replace(".", "/")).replace("/", ".")


def _layers(part: PartPlan) -> list[dict[str, Any]]:
    """The specs of one part, with paths without the layer index."""
    rows = []
    for layer in part.layers:
        row = dataclasses.asdict(layer) | {"path": kind_of(layer.path)}
        rows.append(row | {"point": layer.point and kind_of(layer.point)})
    return rows


def table(plan: LayerPlan) -> str:
    """The plan as text: a row per part and kind of quantisation."""
    head = ("part", "layers", "weights", "group", "activations", "rotation", "MiB before", "after")
    rows = []
    for part, count in _kinds(plan.parts):
        groups: Sequence[tuple[list[str], LayerSpec | None]] = _alike(part.layers) or [([], None)]
        for i, (names, layer) in enumerate(groups):
            name = (f"{_kind(part.name)} x{count}" if count > 1 else part.name) if i == 0 else ""
            sizes = [f"{count * size / _MIB:.1f}" for size in (part.bytes_before, part.bytes_after)]
            rows.append((name, *_cells(names, layer), *(sizes if i == 0 else ("", ""))))
    total = [f"{size / _MIB:.1f}" for size in (plan.bytes_before, plan.bytes_after)]
    rows.append(("all", *[""] * 5, *total))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i > 5 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )


def _kinds(parts: Iterable[PartPlan]) -> list[tuple[PartPlan, int]]:
    """One part of each kind, and their number."""
    first: dict[str, PartPlan] = {}
    counts: dict[str, int] = {}
    for part in parts:
        kind = _kind(part.name)
        first.setdefault(kind, part)
        counts[kind] = counts.get(kind, 0) + 1
    return [(part, counts[kind]) for kind, part in first.items()]


def _alike(layers: Iterable[LayerSpec]) -> list[tuple[list[str], LayerSpec]]:
    """Layers grouped by equal quantisation, with their names within the part."""
    groups: dict[tuple[str, ...], tuple[list[str], LayerSpec]] = {}
    for layer in layers:
        names, _ = groups.setdefault(_cells((), layer)[1:], ([], layer))
        names.append(layer.path.rpartition("/")[2])
    return list(groups.values())


def _cells(names: Iterable[str], layer: LayerSpec | None) -> tuple[str, ...]:
    if layer is None:
        return "-", "float", "-", "-", "-"
    bits = f"int{layer.w_bits}" if layer.w_bits < 16 else "float"
    bits += ", split" if layer.protection == "split" else ""
    group = "-" if layer.group_size is None else str(layer.group_size)
    return " ".join(names), bits, group, layer.activations, layer.rotation
