"""What a conversion's report keeps of its calibration data and of the float model's activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mquant_jax.models.base import Batch
from mquant_jax.nn.act_quant import SINK, TEXT, TOKEN_CLASSES
from mquant_jax.ptq.sinks import flat
from mquant_jax.ptq.statistics import Statistics

Sinks = tuple[Sequence[int], Sequence[int]]  # positions, token ids


def token_classes(batches: Sequence[Batch], sinks: Sinks) -> np.ndarray:
    """Class of every token, sinks marked and padding -1: int32 ``[tokens]``."""
    ids, order, classes = flat(batches)
    positions, sink_ids = sinks
    marked = np.isin(order, positions) | ((classes == TEXT) & np.isin(ids, sink_ids))
    return np.where(marked & (classes >= 0), SINK, classes)


def coverage(batches: Sequence[Batch], sinks: Sinks) -> dict[str, Any]:
    """How much calibration data there was.

    Returns:
        ``{"prompts": n, "patches": n, "tokens": {class: n}, "lengths": [min, median, max]}``;
        lengths are in tokens, answers included.
    """
    classes = token_classes(batches, sinks)
    lengths = [n for b in batches for n in (np.asarray(b.token_class) >= 0).sum(1).tolist()]
    visions = [b.vision for b in batches if b.vision is not None]
    return {
        "prompts": len(lengths),
        "patches": sum(int(np.asarray(v.valid).sum()) for v in visions),
        "tokens": {name: int((classes == c).sum()) for c, name in enumerate(TOKEN_CLASSES)},
        "lengths": [min(lengths), int(np.median(lengths)), max(lengths)],
    }


def float_ranges(
    look: Statistics, batches: Sequence[Batch], sinks: Sinks
) -> dict[str, dict[str, dict[str, float]]]:
    """Range of what enters each point of the float model that ``look`` saw, columns and all.

    Returns:
        point -> token class -> ``{"amax": largest magnitude, "rms": root mean square}``. Points
        outside the language model's blocks have one class, called ``text`` as in their scales.
    """
    classes = token_classes(batches, sinks)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for path, largest in look.tokens.items():
        squares, real = look.squares[path], ~np.isnan(look.tokens[path])
        inner = path.startswith("language/layers/")
        of = classes if inner else np.full(largest.shape, TEXT)
        out[path] = {
            name: {
                "amax": float(largest[served].max()),
                "rms": float(squares[served].mean(dtype=np.float64) ** 0.5),
            }
            for c, name in enumerate(TOKEN_CLASSES)
            if (served := real & (of == c)).any()
        }
    return out
