"""The plots of a report, with titles and captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mquant_jax.nn.act_quant import TOKEN_CLASSES
from mquant_jax.report import plots
from mquant_jax.report.findings import Findings, by_stack
from mquant_jax.report.plots import Series
from mquant_jax.report.summary import decibels, sensitive
from mquant_jax.sections import section_name

_INK = dict(zip(TOKEN_CLASSES, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=True))
_MARK = dict(zip(TOKEN_CLASSES, ("o", "s", "^"), strict=True))
_TOWER = {"vision": plots.VERMILION, "connector": plots.ORANGE, "language": plots.BLUE,
          "head": plots.GREEN, "embedding": plots.SKY}  # fmt: skip
_SMALL = 0.005  # smaller parts of the source share one bar
_MOST = 24  # kinds of layers in the plot of the most sensitive ones


@dataclasses.dataclass(frozen=True)
class Picture:
    """A plot of the report.

    Attributes:
        name: its file name without ``.png``.
        group: its section of the page.
        title, caption: what it shows and how to read it.
        data: the PNG file's bytes.
    """

    name: str
    group: str
    title: str
    caption: str
    data: bytes


def pictures(findings: Findings) -> Iterator[Picture]:
    """All plots that the findings have data for."""
    plots.need_matplotlib()
    yield _sizes(findings)
    yield from _weights(findings)
    yield from _activations(findings)
    if rows := sensitive(findings):
        yield _sensitivity(rows)


def _drawn(name: str, group: str, title: str, caption: str, figure: Any) -> Picture:
    return Picture(name, group, title, caption, plots.png(figure))


def _sizes(findings: Findings) -> Picture:
    rows = {kind: (b / 1e6, a / 1e6) for kind, (b, a) in findings.part_bytes.items()}
    rows = dict(sorted(rows.items(), key=lambda row: -max(row[1])))
    whole = sum(b for b, _ in rows.values())
    small = [kind for kind, pair in rows.items() if max(pair) < _SMALL * whole]
    pairs = [rows.pop(kind) for kind in small]
    if pairs:
        rows[f"{len(pairs)} more"] = (sum(b for b, _ in pairs), sum(a for _, a in pairs))
    title = "Size of each part"
    caption = "Tensors as stored, summed over equal blocks. "
    if findings.recipe.rotate:
        caption += "Rotation unties a head that was tied to the embedding."
    return _drawn("sizes", "sizes", title, caption,
                  plots.paired_bars(title, "MB", rows, ("source", "checkpoint")))  # fmt: skip


def _weights(findings: Findings) -> Iterator[Picture]:
    for name, what, errors, caption in (
        ("weight-sqnr", "Weight SQNR by layer", findings.weight_errors,
         "Signal-to-quantisation-noise ratio of each weight as rounded (after rotation, if the "
         "recipe rotates). Higher is better: 6 dB are one bit."),
        ("output-sqnr", "Output SQNR by layer", findings.output_errors,
         "Signal-to-noise ratio of each layer's output with rounded weights, on the calibration "
         "data. GPTQ lowers this noise at the expense of the weight's own."),
    ):  # fmt: skip
        if stacks := by_stack({path: decibels(e) for path, e in errors.items()}):
            yield _drawn(
                name, "weights", what, caption, plots.heat(what, "SQNR (dB)", stacks, ".1f")
            )
    scales = by_stack(findings.in_order(findings.weight_scales))
    for stack, kinds in scales.items():
        title = f"Weight scales, {stack}"
        median = {k: {i: s[1] for i, s in layers.items()} for k, layers in kinds.items()}
        band = {k: {i: (s[0], s[2]) for i, s in layers.items()} for k, layers in kinds.items()}
        series = [Series("median over channels", plots.BLUE, "o", median, band=band)]
        yield _drawn(f"weight-scales-{_slug(stack)}", "weights", title,
                     "Value of one integer step. The band spans all channels or groups.",
                     plots.lines(title, "weight units per step", series))  # fmt: skip


def _activations(findings: Findings) -> Iterator[Picture]:
    record = findings.record
    after = {**record.get("points", {}), **record.get("ranges", {})}
    before = record.get("before", {})
    for what, name, unit, caption, value in _RANGES:
        yield from _ranges(findings, what, name, unit, caption, value, before, after)
    for stack, points in by_stack(findings.in_order(findings.act_scales)).items():
        title = f"Static activation scales, {stack}"
        series = _scale_series(findings, points, stack)
        yield _drawn(f"activation-scales-{_slug(stack)}", "activations", title,
                     "Value of one int8 step: the clip divided by 127.",
                     plots.lines(title, "activation units per step", series))  # fmt: skip
    yield from _losses(record.get("points", {}))


_RANGES: tuple[tuple[str, str, str, str, Callable[[Mapping[str, float]], float | None]], ...] = (
    ("Largest activation", "ranges", "largest magnitude",
     "Largest magnitude at each point on the calibration data. Rotation also folds the norms' "
     "weights into the following layers, which is another reason why levels change.",
     lambda seen: seen["amax"]),
    ("Outliers", "outliers", "largest magnitude / RMS",
     "Largest magnitude over root mean square: the resolution that a static scale loses to cover "
     "the largest value. Rotation should lower it.",
     lambda seen: seen["amax"] / seen["rms"] if seen.get("rms") else None),
)  # fmt: skip


def _ranges(
    findings: Findings,
    what: str,
    name: str,
    unit: str,
    caption: str,
    value: Callable[[Mapping[str, float]], float | None],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Iterator[Picture]:
    """A plot per stack: one figure of the ranges, by point, class and stage."""
    before, after = findings.in_order(before), findings.in_order(after)
    turned = "rotated" if findings.recipe.rotate else "calibrated"
    stacks = dict.fromkeys([*by_stack(before), *by_stack(after)])
    for stack in stacks:
        series = []
        for cls in TOKEN_CLASSES:
            for stage, table, dashed in (("float model", before, True), (turned, after, False)):
                points = {p: v for p, c in table.items() if (v := value(c.get(cls, _NONE)))}
                kinds = by_stack(points).get(stack, {})
                if kinds:
                    label = f"{_class_name(cls, stack)}, {stage}"
                    series.append(Series(label, _INK[cls], _MARK[cls], kinds, dashed))
        if series:
            title = f"{what} at each point, {stack}"
            yield _drawn(f"{name}-{_slug(stack)}", "activations", title, caption,
                         plots.lines(title, unit, series))  # fmt: skip


_NONE: Mapping[str, float] = {"amax": 0.0, "rms": 0.0}


def _scale_series(findings: Findings, points: Mapping[str, Any], stack: str) -> list[Series]:
    """A line per group of token classes that share a scale."""
    single = all(len(t) == 1 for layers in points.values() for t in layers.values())
    groups = ((0,),) if single else findings.recipe.class_groups
    return [
        Series(
            "all tokens" if single else " + ".join(TOKEN_CLASSES[c] for c in group),
            _INK[TOKEN_CLASSES[group[0]]],
            _MARK[TOKEN_CLASSES[group[0]]],
            {p: {i: float(t[group[0]]) for i, t in layers.items()} for p, layers in points.items()},
        )
        for group in groups
    ]


def _losses(points: Mapping[str, Any]) -> Iterator[Picture]:
    """Rounding and clipping of static points."""
    rows = {
        f"{point} ({cls})" if point.startswith("language/layers/") else point: seen
        for point, classes in points.items()
        for cls, seen in classes.items()
    }
    if stacks := by_stack({k: decibels(s["error"]) for k, s in rows.items()}):
        title = "Activation SQNR at static points"
        yield _drawn("activation-sqnr", "activations", title,
                     "Signal-to-noise ratio of rounding and clipping on the calibration data.",
                     plots.heat(title, "SQNR (dB)", stacks, ".1f"))  # fmt: skip
    if any(s["clipped"] > 0 for s in rows.values()):
        title = "Clipped activations at static points"
        stacks = by_stack({k: 100 * s["clipped"] for k, s in rows.items()})
        yield _drawn("clipping", "activations", title,
                     "Share of values on the calibration data that exceed the clip and saturate.",
                     plots.heat(title, "values clipped (%)", stacks, ".2g"))  # fmt: skip


def _sensitivity(rows: list[Any]) -> Picture:
    title = f"Candidates for 8 bits, by error of the layer's {rows[0].measure}"
    shown = [
        (f"{row.kind} ({row.bits} bits)", 100 * row.error, _TOWER[section_name(row.kind)],
         f"{row.error:.2%}   + {row.added_bytes / 1e6:.3g} MB at 8 bits")
        for row in rows[:_MOST]
    ]  # fmt: skip
    caption = (
        "Root mean square over the layers of a kind, largest first; a colour per part of the "
        "model. The error of a layer does not tell how much answers degrade: check with "
        "python -m mquant_jax eval."
    )
    return _drawn("sensitivity", "sensitivity", title, caption,
                  plots.bars(title, "relative error (%)", shown))  # fmt: skip


def _class_name(cls: str, stack: str) -> str:
    """Towers have a single class, which records call text."""
    return cls if stack.startswith("language") else "all tokens"


def _slug(stack: str) -> str:
    return stack.replace("/", "-")
