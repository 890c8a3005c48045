"""The summary of a report: errors by part, saturation, decisions, candidates for 8 bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mquant_jax.layer_plan import LayerSpec
from mquant_jax.report.findings import Findings
from mquant_jax.sections import SECTIONS, kind_of, section_name

_LEAST = 1e-9  # relative error below which a tensor counts as exact: 180 dB


def decibels(error: float) -> float:
    """Signal-to-quantisation-noise ratio, in dB, of a relative error ``|x - q| / |x|``."""
    return -20.0 * math.log10(max(error, _LEAST))


def mean_error(errors: Mapping[str, float] | list[float]) -> float:
    """Root mean square of relative errors, from the mean noise-to-signal ratio."""
    values = list(errors.values()) if isinstance(errors, Mapping) else errors
    return math.sqrt(sum(e**2 for e in values) / len(values))


def by_section(errors: Mapping[str, float]) -> dict[str, float]:
    """Section of the recipe -> SQNR in dB over its layers."""
    groups: dict[str, list[float]] = {}
    for path, error in errors.items():
        groups.setdefault(section_name(path), []).append(error)
    return {name: decibels(mean_error(groups[name])) for name in SECTIONS if name in groups}


@dataclasses.dataclass(frozen=True)
class Sensitive:
    """Layers of one kind, as a candidate for 8 bits.

    Attributes:
        kind: their path, ``language/layers/*/down_proj``.
        count: number of layers.
        bits: bits of their weights.
        measure: what ``error`` measures, ``output`` or ``weight``.
        error: root mean square of their relative errors.
        worst: path and relative error of the worst layer.
        added_bytes: bytes that 8 bits would add to the checkpoint.
    """

    kind: str
    count: int
    bits: int
    measure: str
    error: float
    worst: tuple[str, float]
    added_bytes: int

    @property
    def rule(self) -> list[Any]:
        """The recipe rule that keeps them at 8 bits."""
        return [self.kind, {"w_bits": 8}]


def sensitive(findings: Findings) -> list[Sensitive]:
    """Layers of fewer than 8 bits by kind, largest error first.

    The error is that of the layer's output on the calibration data if it was recorded for all of
    them, otherwise that of its weight. Layers of a kind are quantised alike, so they are one row.
    """
    specs = {s.path: s for s in findings.plan.layers if s.w_bits < 8}
    outputs, weights = findings.output_errors, findings.weight_errors
    measure = "output" if specs.keys() <= outputs.keys() else "weight"
    errors = outputs if measure == "output" else weights
    kinds: dict[str, list[LayerSpec]] = {}
    for path, spec in specs.items():
        if path in errors:
            kinds.setdefault(kind_of(path), []).append(spec)
    rows = [_row(kind, measure, layers, errors) for kind, layers in kinds.items()]
    return sorted(rows, key=lambda row: -row.error)


def _row(
    kind: str, measure: str, layers: list[LayerSpec], errors: Mapping[str, float]
) -> Sensitive:
    own = {layer.path: errors[layer.path] for layer in layers}
    worst = max(own, key=own.__getitem__)
    bits = layers[0].w_bits
    added = sum(s.in_features * s.out_features * (8 - bits) // 8 for s in layers)
    return Sensitive(kind, len(layers), bits, measure, mean_error(own), (worst, own[worst]), added)


def saturation(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where static scales clip most and have the largest error on the calibration data."""
    rows = [
        (point, cls, seen)
        for point, classes in record.get("points", {}).items()
        for cls, seen in classes.items()
    ]
    if not rows:
        return None
    clipped = max(rows, key=lambda row: row[2]["clipped"])
    worst = max(rows, key=lambda row: row[2]["error"])
    return {
        "points": len({point for point, _, _ in rows}),
        "clipping": sum(seen["clipped"] > 0 for _, _, seen in rows),
        "most_clipped": _named(clipped, "clipped"),
        "worst_error": _named(worst, "error"),
    }


def saturation_rows(findings: Findings) -> list[tuple[str, str]]:
    """:func:`saturation`, a line each."""
    seen = saturation(findings.record)
    if seen is None:
        return []
    most, worst = seen["most_clipped"], seen["worst_error"]
    clipped = "no value of the calibration data is clipped"
    if seen["clipping"]:
        clipped = (
            f"{seen['clipping']} pairs of point and class clip, at most {most['clipped']:.3%} of "
            f"their values ({most['point']}, {most['class']})"
        )
    lost = f"{worst['error']:.2%} ({worst['point']}, {worst['class']})"
    return [("saturation", clipped), ("largest error of a static point", lost)]


def _named(row: tuple[str, str, Mapping[str, float]], key: str) -> dict[str, Any]:
    return {"point": row[0], "class": row[1], key: row[2][key]}


def decisions(findings: Findings) -> dict[str, Any]:
    """Decisions that the conversion made from data; ``None`` if the recipe makes none."""
    record, recipe = findings.record, findings.recipe
    split = record.get("split")
    smoothing = record.get("smoothing")
    return {
        "balanced": sorted(record["balance"]) if "balance" in record else None,
        "split": None if split is None else sorted(p for p, e in split.items() if e["split"]),
        "split_candidates": None if split is None else len(split),
        "smoothed": None if smoothing is None else sum(a > 0 for a in smoothing.values()),
        "sinks": record.get("sinks"),
        "prefix": record.get("prefix"),
        "rotated": recipe.rotate,
    }


def summary(findings: Findings) -> dict[str, Any]:
    """The summary as JSON; errors in dB, sizes in bytes."""
    before, after = map(sum, zip(*findings.part_bytes.values(), strict=True))
    return {
        "checkpoint": str(findings.folder),
        "family": findings.manifest["family"],
        "recipe": findings.recipe.name,
        "bytes_before": before,
        "bytes_after": after,
        "weight_sqnr_db": by_section(findings.weight_errors),
        "output_sqnr_db": by_section(findings.output_errors),
        "saturation": saturation(findings.record),
        "decisions": decisions(findings),
        "coverage": findings.record.get("coverage"),
        "keep_at_8_bits": [
            dataclasses.asdict(row) | {"rule": row.rule} for row in sensitive(findings)
        ],
        "missing": findings.missing,
    }


def text(findings: Findings) -> str:
    """The summary as text."""
    lines = []
    for label, errors in (("weight SQNR (dB)", findings.weight_errors),
                          ("output SQNR (dB)", findings.output_errors)):  # fmt: skip
        if parts := by_section(errors):
            lines.append(f"{label}: " + ", ".join(f"{n} {db:.1f}" for n, db in parts.items()))
    lines += [f"{name}: {said}" for name, said in saturation_rows(findings)]
    lines += [f"{name}: {said}" for name, said in decision_rows(findings)]
    if rows := sensitive(findings):
        first = ", ".join(f"{row.kind} ({row.error:.2%})" for row in rows[:3])
        lines.append(f"first candidates for 8 bits, by {rows[0].measure} error: {first}")
    lines += [f"missing: {what}" for what in findings.missing]
    return "\n".join(lines)


def decision_rows(findings: Findings) -> list[tuple[str, str]]:
    """The decisions, one line each."""
    made, rows = decisions(findings), []
    if made["rotated"]:
        rows.append(("rotation", f"seed {findings.recipe.seed}"))
    if made["balanced"] is not None:
        names = ", ".join(made["balanced"]) or "none: no layer's channels were uneven enough"
        rows.append(("balanced before rotation", names))
    if made["smoothed"] is not None:
        rows.append(("smoothed", f"{made['smoothed']} of {len(findings.record['smoothing'])}"))
    if made["split"] is not None:
        names = ", ".join(made["split"]) or "none"
        rows.append(("channel split off (RMS)", f"{len(made['split'])} of "
                     f"{made['split_candidates']} candidates: {names}"))  # fmt: skip
    if made["sinks"] is not None:
        sinks = made["sinks"]
        rows.append(("sinks", f"positions {sinks['positions']}, token ids {sinks['ids']}"))
    if made["prefix"] is not None:
        rows.append(("prefix", f"token ids {made['prefix']}"))
    return rows
