"""The llava bed's table: what its rows stand for, how they compare, how a run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.files import read_json
from mquant_jax.presets import METHODS
from mquant_jax.recipe import Recipe, Section

SHARED, MODALITY, SINK, DYNAMIC = "shared", "modality", "modality+sink", "dynamic"
ALL, TOWER, LANGUAGE = "all", "tower", "language"
_PARTS = ("vision", "connector", "language")
# Bits of weights in tower and connector, in the language model, and of activations.
WEIGHTS = {"w4a8": (4, 4, 8), "w4a8-v8": (8, 4, 8), "w8a8": (8, 8, 8), "w4a16": (4, 4, 16)}
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table, on every axis that the bed varies.

    Attributes:
        method: a key of :data:`~mquant_jax.presets.METHODS`, or a step of an ablation.
        activations: which tokens share a static scale in the language model: all (``shared``),
            those of a modality, or those but for sinks; or one scale per token at run time.
        scope: what is quantised: ``all``, ``tower`` (with the connector) or ``language``.
        weights: a key of :data:`WEIGHTS`.
        recipe: of an ablation's step; it decides about activations itself.
        budget: mean stored bits per weight, chosen for each layer (``mquant_jax allocate``).
    """

    method: str
    activations: str = SINK
    scope: str = ALL
    group_size: int | None = None
    weights: str = "w4a8"
    recipe: Recipe | None = None
    budget: float | None = None

    def key(self) -> dict[str, Any]:
        """The row's columns that say what was measured."""
        names = ("method", "scope", "activations", "group_size", "weights")
        return {name: getattr(self, name) for name in names}

    @property
    def name(self) -> str:
        """The row in a few words."""
        group = f", groups of {self.group_size}" if self.group_size else ""
        activations = "float activations" if self.weights == "w4a16" else self.activations
        return f"{self.method}, {activations}{group}"

    def rounded_as(self) -> Row:
        """The row whose weights and scales this one takes over: dynamic activations need no others
        than the static ones."""
        return dataclasses.replace(self, activations=SINK) if self.activations == DYNAMIC else self

    def plan(self) -> Recipe:
        """The recipe; head and embedding stay float."""
        made = self.recipe or dataclasses.replace(
            METHODS[self.method],
            modality_scales=self.activations != SHARED,
            sink_class=self.activations in (SINK, DYNAMIC),
        )
        sections = {"head": Section(), "embedding": Section()}
        return dataclasses.replace(made, **sections, **{p: self._section(p) for p in _PARTS})

    def _section(self, part: str) -> Section:
        tower, language, activations = WEIGHTS[self.weights]
        if self.scope == (TOWER if part == "language" else LANGUAGE):
            return Section()
        mode = "none" if activations == 16 else "static"
        mode = DYNAMIC if self.activations == DYNAMIC else mode
        group = self.group_size if part == "language" else None
        return Section(language if part == "language" else tower, group, mode)


def rows() -> list[Row]:
    """The table: one axis at a time around ``mquant``, W4A8 per channel, a scale per class.

    The rows that the claim rests on come first.
    """
    m = "mquant"
    return [
        Row(m),
        Row(m, DYNAMIC),
        Row("rtn", SHARED),
        Row(m, MODALITY),
        Row(m, SHARED),
        Row("quarot", SHARED),
        Row("smoothquant", SHARED),
        Row("rtn", SINK),
        Row("rtn", DYNAMIC),
        Row("quarot", MODALITY),
        Row("quarot", SINK),
        Row("quarot", DYNAMIC),
        Row(m, scope=TOWER),
        Row(m, scope=LANGUAGE),
        Row("rtn", SHARED, scope=TOWER),
        Row("rtn", SHARED, scope=LANGUAGE),
        Row(m, weights="w4a8-v8"),
        Row(m, weights="w8a8"),
        Row(m, weights="w4a16"),
        Row(m, group_size=64),
        Row(m, DYNAMIC, group_size=64),
        Row("rtn", SHARED, group_size=64),
    ]


def quick_rows() -> list[Row]:
    """Two rows: the method and rounding to nearest."""
    return [Row("rtn", SHARED), Row("quarot", SINK)]


def interval(values: np.ndarray, pictures: np.ndarray) -> list[float]:
    """95 % bootstrap interval of a mean over questions; pictures are drawn whole, because their
    questions depend on one another."""
    total, count = np.bincount(pictures, values), np.bincount(pictures)
    drawn = np.random.default_rng(0).integers(0, len(count), (DRAWS, len(count)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def pairs() -> list[tuple[Row, Row]]:
    """Rows to compare with one another, the idea first and what it is an alternative to second."""
    m = "mquant"
    return [
        (Row(m, MODALITY), Row(m, SHARED)),
        (Row(m), Row(m, MODALITY)),
        (Row(m), Row(m, DYNAMIC)),
        (Row(m), Row(m, weights="w4a16")),
        (Row("quarot", MODALITY), Row("quarot", SHARED)),
        (Row("quarot", SINK), Row("quarot", MODALITY)),
        (Row("quarot", SINK), Row("quarot", DYNAMIC)),
        (Row("rtn", SINK), Row("rtn", SHARED)),
        (Row("rtn", DYNAMIC), Row("rtn", SINK)),
        (Row("smoothquant", SHARED), Row("rtn", SHARED)),
        (Row("quarot", SINK), Row("rtn", SINK)),
        (Row(m), Row("quarot", SINK)),
        (Row(m, group_size=64), Row(m)),
    ]


def budget_pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Bits chosen for each layer against four bits in groups of 64 everywhere."""
    return [(row, Row("mquant", group_size=64)) for row in rows if row.budget]


def steps(rows: list[Row]) -> list[tuple[Row, Row]]:
    """The same of an ablation: each part over all before it, then alternatives."""
    added = [r for r in rows if r.method in ("rtn", "mquant") or r.method.startswith("+")]
    named = {r.method: r for r in rows}
    others = (
        ("mquant", "mquant, no learning"),
        ("mquant, by block", "mquant, no learning"),
        ("plain Hadamard +rms", "plain Hadamard"),
    )
    found = [(named[new], named[old]) for new, old in others if new in named and old in named]
    return [*zip(added[1:], added[:-1], strict=True), *found]


def gains(result: dict[str, Any], compared: list[tuple[Row, Row]]) -> list[dict[str, Any]]:
    """Paired differences between the rows of a result, as far as both were measured.

    Args:
        compared: :func:`pairs` or :func:`steps`.

    Returns:
        ``{"row", "over", "delta", "delta_ci95", "kl", "kl_over"}``: names of both rows, difference
        in exact match, and the KL from float of each.
    """
    columns = Row("").key()
    known = {tuple(r[k] for k in columns): r for r in result["rows"]}
    pictures = np.repeat(np.arange(len(result["questions"])), result["questions"])
    out = []
    for rows in compared:
        new, old = (known.get(tuple(row.key().values())) for row in rows)
        if new and old:
            hits, before = (_bits(r["right"], len(pictures)) for r in (new, old))
            change = hits - before
            out.append({
                "row": rows[0].name, "over": rows[1].name, "delta": float(change.mean()),
                "delta_ci95": interval(change, pictures), "kl": new["kl"], "kl_over": old["kl"],
            })  # fmt: skip
    return out


def _bits(text: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(float)


def missing(wanted: list[Row], measured: list[dict[str, Any]]) -> list[Row]:
    """Rows that are still to be measured."""
    known = [{k: r[k] for k in wanted[0].key()} for r in measured]
    return [row for row in wanted if row.key() not in known]


def kept(file: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run on the same model and questions.

    Args:
        head: what both runs must agree on.

    Raises:
        UserError: the file holds another bed's result, or one of another model or questions.
    """
    if not file.exists():
        return []
    found = read_json(file)
    other = [k for k in head if found.get(k) != head[k]]
    if other:
        raise UserError(
            f"{file}: {other[0]} is {found.get(other[0])}, now {head[other[0]]}; its rows cannot "
            "be continued, name another file or leave --resume out"
        )
    return found["rows"]
