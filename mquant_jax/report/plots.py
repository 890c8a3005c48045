"""Plot types: panels of lines over layers, heat maps, horizontal bars.

Colours are Okabe and Ito's, and cividis, which colour-blind readers can tell apart. Series also
differ in marker and line style.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mquant_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
)  # fmt: skip
_GREY = "#9a9a9a"
_DPI, _COLUMNS, _PANEL = 100, 4, (2.9, 2.3)  # columns of panels, size of one in inches
_ANNOTATED = 16  # heat maps of up to so many layers have numbers in their cells


def need_matplotlib() -> None:
    """
    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib: pip install 'mquant-jax[report]'")


@dataclasses.dataclass(frozen=True)
class Series:
    """One line in each panel.

    Attributes:
        label, colour, marker: style of the line.
        panels: name of a panel -> layer index -> value.
        dashed: draw a dashed line with hollow markers.
        band: name of a panel -> layer index -> smallest and largest value, drawn as an area.
    """

    label: str
    colour: str
    marker: str
    panels: Mapping[str, Mapping[int, float]]
    dashed: bool = False
    band: Mapping[str, Mapping[int, tuple[float, float]]] | None = None


def empty(width: float, height: float, title: str) -> Figure:
    """A figure without axes; its size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DPI)
    figure.suptitle(title, fontsize=12)
    return figure


def lines(title: str, unit: str, series: Sequence[Series]) -> Figure:
    """A panel per name, layers from left to right, values on a logarithmic axis.

    Args:
        unit: label of the vertical axis.
    """
    names = list(dict.fromkeys(name for s in series for name in s.panels))
    deepest = max(len(layers) for s in series for layers in s.panels.values())
    wide = 1 if deepest <= _ANNOTATED else 2
    columns = min(_COLUMNS // wide, len(names))
    rows = -(-len(names) // columns)
    width = max(columns * wide * _PANEL[0], 6.0)
    figure = empty(width, rows * _PANEL[1] + 0.8, title)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, name in zip(axes, names, strict=False):
        for s in series:
            _line(ax, s, name)
        ax.set_title(name, fontsize=10)
        _axes(ax)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    figure.supylabel(unit, fontsize=10)
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center",
        ncols=min(len(handles), 4), fontsize=9, frameon=False,
    )  # fmt: skip
    return figure


def _axes(ax: Any) -> None:
    """Layers against a logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.tick_params(labelbottom=True, labelsize=9)
    ax.set_xlabel("layer", fontsize=9)


def _line(ax: Any, s: Series, name: str) -> None:
    values = s.panels.get(name, {})
    if not values:
        return
    x, y = list(values), list(values.values())
    ax.plot(
        x, y, color=s.colour, label=s.label, linewidth=1.4 if len(x) <= _ANNOTATED else 1.0,
        linestyle="--" if s.dashed else "-", marker=s.marker, markersize=4.5,
        markevery=-(-len(x) // _ANNOTATED), markerfacecolor="white" if s.dashed else s.colour,
    )  # fmt: skip
    if s.band is not None:
        low, high = zip(*(s.band[name][i] for i in x), strict=True)
        ax.fill_between(x, low, high, color=s.colour, alpha=0.2, linewidth=0)


def heat(
    title: str, unit: str, stacks: Mapping[str, Mapping[str, Mapping[int, float]]], form: str
) -> Figure:
    """A heat map per stack: a row per name, layers from left to right, one shared colour scale.

    Args:
        unit: label of the colour bar.
        form: format of the numbers in the cells, if any.
    """
    heights = [len(rows) for rows in stacks.values()]
    deepest = max(len(_layers(rows)) for rows in stacks.values())
    size = min(max(0.55 * deepest + 3.5, 6.5), 12.0)
    figure = empty(size, 0.3 * sum(heights) + 1.0 * len(heights) + 0.7, title)
    grids = {stack: _grid(rows) for stack, rows in stacks.items()}
    values = np.concatenate([g[np.isfinite(g)] for g in grids.values()])
    # A few extreme layers would leave a single colour for all others.
    low, high = map(float, np.percentile(values, (2, 98)))
    high = high if high > low else low + 1.0
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights).ravel()
    for ax, (stack, rows) in zip(axes, stacks.items(), strict=True):
        image = _map(ax, grids[stack], rows, (low, high), form)
        ax.set_title(stack, fontsize=10)
    axes[-1].set_xlabel("layer", fontsize=10)
    figure.colorbar(image, ax=list(axes), label=unit, shrink=0.9, extend="both")
    return figure


def _layers(rows: Mapping[str, Mapping[int, float]]) -> list[int]:
    return sorted({layer for row in rows.values() for layer in row})


def _grid(rows: Mapping[str, Mapping[int, float]]) -> np.ndarray:
    layers = _layers(rows)
    return np.asarray([[row.get(i, math.nan) for i in layers] for row in rows.values()])


def _map(
    ax: Any,
    grid: np.ndarray,
    rows: Mapping[str, Mapping[int, float]],
    limits: tuple[float, float],
    form: str,
) -> Any:
    low, high = limits
    image = ax.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    layers = _layers(rows)
    step = -(-len(layers) // 20)
    ax.set_xticks(range(0, len(layers), step), [str(i) for i in layers[::step]], fontsize=9)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9)
    if len(layers) <= _ANNOTATED:
        for (i, j), value in np.ndenumerate(grid):
            if math.isfinite(value):
                ink = "black" if value > (low + high) / 2 else "white"
                ax.text(j, i, format(value, form), ha="center", va="center", color=ink, fontsize=8)
    return image


def bars(title: str, unit: str, rows: Sequence[tuple[str, float, str, str]]) -> Figure:
    """Horizontal bars, the first at the top: ``(name, value, colour, text beside it)``."""
    names, values, colours, texts = zip(*rows, strict=True)
    figure = empty(9.0, 0.32 * len(rows) + 1.2, title)
    ax = figure.subplots()
    drawn = ax.barh(range(len(rows)), values, color=colours)
    ax.bar_label(drawn, texts, padding=4, fontsize=9)
    ax.set_yticks(range(len(rows)), names, fontsize=9)
    ax.invert_yaxis()
    _bar_axis(ax, unit)
    return figure


def paired_bars(
    title: str, unit: str, rows: Mapping[str, tuple[float, float]], labels: tuple[str, str]
) -> Figure:
    """Two horizontal bars for each name, first and second, with their values beside them."""
    figure = empty(9.0, 0.5 * len(rows) + 1.6, title)
    ax = figure.subplots()
    at = np.arange(len(rows))
    for k, (label, colour) in enumerate(zip(labels, (_GREY, BLUE), strict=True)):
        values = [pair[k] for pair in rows.values()]
        drawn = ax.barh(at + (k - 0.5) * 0.38, values, 0.36, color=colour, label=label)
        ax.bar_label(drawn, [f"{v:.3g}" for v in values], padding=3, fontsize=8)
    ax.set_yticks(at, list(rows), fontsize=9)
    ax.invert_yaxis()
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    _bar_axis(ax, unit)
    return figure


def _bar_axis(ax: Any, unit: str) -> None:
    ax.set_xlabel(unit, fontsize=10)
    ax.margins(x=0.25)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of up to 128 colours, a third of the size of a full-colour one."""
    whole, out = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png")
    Image.open(whole).convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()
