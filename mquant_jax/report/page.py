"""The quantisation report: a self-contained HTML file, and its plots as PNG files."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.layer_plan import LayerSpec
from mquant_jax.report.findings import Findings, outside_stacks
from mquant_jax.report.html import data_url, page, table
from mquant_jax.report.pictures import Picture, pictures
from mquant_jax.report.summary import (
    by_section,
    decibels,
    decision_rows,
    saturation_rows,
    sensitive,
)
from mquant_jax.runtime.choices import merged
from mquant_jax.sections import kind_of, section_name

PAGE = "report.html"
_STYLE = """
figure{margin:1rem 0}figure img{max-width:100%;height:auto;display:block}
figcaption,.note{color:#555;max-width:52rem}
td:last-child{white-space:normal;overflow-wrap:anywhere}.left td{text-align:left}
"""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What the checkpoint runs on a platform.

    Attributes:
        tokens: of the prompt that was traced.
        rows: of :func:`mquant_jax.runtime.choices.rows_of`.
    """

    platform: str
    tokens: int
    rows: list[dict[str, Any]]


def write_report(findings: Findings, out: Path, ran: Ran | None = None) -> list[Path]:
    """Write ``report.html`` and its plots to a folder; returns the files.

    Args:
        ran: for the page's section about kernels, which is left out without it.

    Raises:
        UserError: matplotlib is not installed.
    """
    drawn = list(pictures(findings))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / PAGE]
    files[0].write_text(report_page(findings, drawn, ran), encoding="utf-8")
    for picture in drawn:
        files.append(out / f"{picture.name}.png")
        files[-1].write_bytes(picture.data)
    return files


def report_page(findings: Findings, drawn: Sequence[Picture], ran: Ran | None = None) -> str:
    """The page with embedded plots."""
    title = f"Quantisation report: {findings.folder.name}"
    sections = {
        "Summary": _summary(findings),
        "Sizes": _shown(drawn, "sizes"),
        "What determines each layer": _decided(findings),
        "Weights": [*_shown(drawn, "weights"), *_single_layers(findings)],
        "Activations": [*_shown(drawn, "activations"), *_single_points(findings)],
        "Candidates for 8 bits": [*_shown(drawn, "sensitivity"), *_candidates(findings)],
        "Calibration data": _coverage(findings),
        "Kernels": () if ran is None else _kernels(ran),
        "Missing data": [f"<p>{html.escape(text)}</p>" for text in findings.missing],
    }
    body = []
    for name, parts in sections.items():
        if content := list(parts):
            body += [f"<h2>{html.escape(name)}</h2>", *content]
    return page(title, body, _STYLE)


def _shown(drawn: Sequence[Picture], group: str) -> Iterator[str]:
    for picture in drawn:
        if picture.group == group:
            yield (
                f'<figure><img alt="{html.escape(picture.title)}" '
                f'src="{data_url(picture.data, "png")}">'
                f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
            )


def _kernels(ran: Ran) -> Iterator[str]:
    yield (
        f'<p class="note">What runs on {html.escape(ran.platform)} for one prompt of {ran.tokens} '
        "tokens with a picture. Layers of a stack are counted once.</p>"
    )
    rows = [(phase, op, str(n), form, why or "-") for phase, op, n, form, why in merged(ran.rows)]
    yield _left(("phase", "operation", "calls", "form", "why not another one"), rows)


def _summary(findings: Findings) -> Iterator[str]:
    before, after = map(sum, zip(*findings.part_bytes.values(), strict=True))
    rows = [
        ("family, recipe", f"{findings.manifest['family']}, {findings.recipe.name}"),
        ("size", f"{before / 1e6:.2f} MB in the source, {after / 1e6:.2f} MB here"),
    ]
    for label, errors in (("weight SQNR", findings.weight_errors),
                          ("output SQNR", findings.output_errors)):  # fmt: skip
        if parts := by_section(errors):
            rows.append((label, ", ".join(f"{n} {db:.1f} dB" for n, db in parts.items())))
    yield _left(("", ""), [*rows, *saturation_rows(findings), *decision_rows(findings)])


def _decided(findings: Findings) -> Iterator[str]:
    """How the layers of each kind are quantised, and which part of the recipe determines it."""
    kinds: dict[tuple[str, ...], int] = {}
    for layer in findings.plan.layers:
        cells = _layer_cells(layer, findings)
        kinds[cells] = kinds.get(cells, 0) + 1
    head = ("layers", "count", "weights", "group", "activations", "rotation", "decided by")
    yield _left(head, [(cells[0], str(n), *cells[1:]) for cells, n in kinds.items()])


def _layer_cells(layer: LayerSpec, findings: Findings) -> tuple[str, ...]:
    rule = findings.recipe.rule_for(layer.path)
    decided = f"section {section_name(layer.path)}"
    if rule is not None:
        decided = f"rule {json.dumps(rule.to_json())} on {decided}"
    bits = f"int{layer.w_bits}" if layer.w_bits < 16 else "float"
    return (
        kind_of(layer.path), bits + _protected(layer, findings), str(layer.group_size or "-"),
        layer.activations, layer.rotation, decided,
    )  # fmt: skip


def _protected(layer: LayerSpec, findings: Findings) -> str:
    if layer.protection == "none":
        return ""
    split = findings.record.get("split", {}).get(layer.path)
    return "" if split is None else ", channel split off" if split["split"] else ", not split"


def _single_layers(findings: Findings) -> Iterator[str]:
    weights, outputs = findings.weight_errors, findings.output_errors
    rows = [
        (path, *(f"{decibels(e[path]):.1f}" if path in e else "-" for e in (weights, outputs)))
        for path in outside_stacks(weights)
    ]
    if rows:
        yield "<h3>Layers outside the stacks</h3>"
        yield table(("layer", "weight SQNR (dB)", "output SQNR (dB)"), rows)


def _single_points(findings: Findings) -> Iterator[str]:
    record = findings.record
    before = record.get("before", {})
    after = outside_stacks({**record.get("points", {}), **record.get("ranges", {})})
    rows = [
        (point, _number(before.get(point, {}).get(cls, {}), "amax"),
         *(_number(seen, key) for key in ("amax", "rms", "clip", "clipped", "error")))
        for point, classes in after.items()
        for cls, seen in classes.items()
    ]  # fmt: skip
    if rows:
        yield "<h3>Points outside the stacks</h3>"
        head = ("point", "largest before", "largest", "RMS", "clip", "clipped", "error")
        yield table(head, rows)


_SHARES = ("clipped", "error")


def _number(seen: Mapping[str, float], key: str) -> str:
    if key not in seen:
        return "-"
    return f"{seen[key]:.3%}" if key in _SHARES else f"{seen[key]:.4g}"


def _candidates(findings: Findings) -> Iterator[str]:
    rows = [
        (row.kind, str(row.count), f"{row.error:.2%}", f"{row.worst[0]}: {row.worst[1]:.2%}",
         f"{row.added_bytes / 1e6:.3g}", json.dumps(row.rule))
        for row in sensitive(findings)
    ]  # fmt: skip
    if rows:
        head = ("layers", "count", "error", "worst", "MB added", "rule for the recipe")
        yield table(head, rows)


def _coverage(findings: Findings) -> Iterator[str]:
    """The amount of calibration data, and its ratio to the layers' widths."""
    seen: dict[str, Any] | None = findings.record.get("coverage")
    known: dict[str, Any] = findings.record.get("calibration", {})
    if seen is None:
        return
    low, median, high = seen["lengths"]
    tokens = ", ".join(f"{n} {name}" for name, n in seen["tokens"].items())
    rows = [
        ("prompts", str(seen["prompts"])),
        ("tokens", tokens),
        ("prompt length", f"{low} to {high} tokens, median {median}"),
        ("patches", str(seen["patches"])),
    ]
    if known:
        rows += [
            ("different pictures", str(len(known["pictures"]))),
            ("different questions", str(len(known["questions"]))),
        ]
    counts = {"language": sum(seen["tokens"].values()), "vision": seen["patches"]}
    for section, count in counts.items():
        widths = {
            layer.path: layer.in_features
            for layer in findings.plan.layers
            if section_name(layer.path) == section and layer.w_bits < 16
        }
        if widths:
            widest = max(widths, key=widths.__getitem__)
            rows.append((f"rows per input, {section}",
                         f"{count / widths[widest]:.1f} at {kind_of(widest)}, the widest "
                         f"({widths[widest]} inputs)"))  # fmt: skip
    yield _left(("", ""), rows)
    unseen = [name for name, n in seen["tokens"].items() if not n and name != "sink"]
    if unseen:
        yield (f"<p>No {' or '.join(unseen)} tokens in the data: their static scales are those of "
               "another class.</p>")  # fmt: skip


def _left(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="left">{table(header, rows)}</div>'
