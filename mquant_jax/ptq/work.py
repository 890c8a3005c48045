"""A part of the model while it is being quantised, and what is reported of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mquant_jax.nn.params import Params
from mquant_jax.ptq.observe import Histogram
from mquant_jax.ptq.states import Spool
from mquant_jax.ptq.statistics import Sampler
from mquant_jax.ptq.walk import Part


def empty_report() -> dict[str, dict[str, Any]]:
    """By tensor, point, layer and block: relative error of each weight, and of each layer's output
    by GPTQ's Hessian; clipping of static points, ranges of the others; channels that were split
    off, and what learning scales did."""
    return {"weights": {}, "outputs": {}, "points": {}, "ranges": {}, "split": {}, "tuning": {}}


@dataclasses.dataclass
class Seen:
    """What calibration saw at one point.

    Attributes:
        hists: magnitudes by token class.
        samples: a sample of rows by token class.
        hessian: float32 ``[K, K]``, or ``None``.
        cross: float32 ``[K, K]``, how the float model's inputs differ, or ``None``.
    """

    hists: list[Histogram]
    samples: list[Sampler]
    hessian: jax.Array | None = None
    cross: jax.Array | None = None


@dataclasses.dataclass
class Work:
    """A part while it is being quantised.

    Attributes:
        part: the part; its weights are replaced point by point.
        target: its abstract quantised form; ``None`` for a point on its own.
        twin: the module as it was, split, where the float model's inputs are known.
        known: name of a point that is done -> its inputs, chunk by chunk. No weight before it will
            change, so that later points are reached from there. Not of the last one, the widest.
        made: path -> ``QWeight`` or ``act_scale``.
        report: see :func:`empty_report`.
    """

    part: Part
    target: Any
    twin: tuple[Any, Any] | None = None
    known: dict[str, Spool] = dataclasses.field(default_factory=dict)
    made: Params = dataclasses.field(default_factory=dict)
    report: dict[str, dict[str, Any]] = dataclasses.field(default_factory=empty_report)
