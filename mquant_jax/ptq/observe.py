"""Observe the inputs of one module's quantisation points: taps and histograms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError


def _tapped(graphdef, state, args, known: Mapping[str, jax.Array] = MappingProxyType({})):
    taps: dict[str, jax.Array] = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        taps[name] = known.get(name, x)
        return taps[name]

    out = nnx.merge(graphdef, state)(*args, tap=tap)
    return out, taps


@partial(jax.jit, static_argnums=0)
def run_tapped(graphdef, state, *args):
    """A module's output, and the input of each of its quantisation points by name."""
    return _tapped(graphdef, state, args)


@partial(jax.jit, static_argnums=(0, 1))
def tapped(graphdef, point, state, known, *args):
    """The input of one quantisation point; nothing after it is computed, nor what only serves
    points whose inputs are ``known`` by name."""
    return _tapped(graphdef, state, args, known)[1][point]


class Histogram:
    """A histogram of magnitudes whose range doubles as larger values arrive.

    ``BINS`` is fine enough for clips down to a tenth of the range: 8 bins per int8 step.
    """

    BINS = 8192
    MOST = 1 << 20  # count about this many of an array's values: every n-th

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS)
        self.range = 0.0
        self.amax = 0.0

    @property
    def empty(self) -> bool:
        return not self.counts.any()

    def _reach(self, top: float) -> None:
        """Widen the range until it holds ``top``, merging bins by pairs."""
        self.amax = max(self.amax, top)
        if self.range == 0.0:
            self.range = top or 1e-12
        while top > self.range:
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([half, np.zeros_like(half)])
            self.range *= 2

    def _bins(self, magnitudes: np.ndarray) -> np.ndarray:
        index = (magnitudes * (self.BINS / self.range)).astype(np.int32)
        return np.minimum(index, self.BINS - 1)

    def add(self, values: np.ndarray) -> None:
        """Count ``|values|``, any shape; of a large array a part, its largest value always.

        Raises:
            FloatingPointError: some are NaN or Inf.
        """
        if values.size:
            largest = float(np.abs(values).max())
            if not np.isfinite(largest):
                raise FloatingPointError("NaN or Inf")
            self._reach(largest)
            # An odd stride runs through all columns.
            stride = values.size // self.MOST | 1
            values = np.abs(values.ravel()[::stride])
            self.counts += stride * np.bincount(self._bins(values), minlength=self.BINS)

    @classmethod
    def merged(cls, hists: Sequence[Histogram]) -> Histogram:
        """All together, as a new histogram."""
        out = cls()
        out._reach(max(h.amax for h in hists))
        for h in hists:
            if not h.empty:
                np.add.at(out.counts, out._bins(h.centres()), h.counts)
        return out

    def range_report(self) -> dict[str, float]:
        """Largest magnitude and root mean square of what was counted."""
        power = self.counts @ self.centres() ** 2 / max(self.counts.sum(), 1.0)
        return {"amax": self.amax, "rms": float(power**0.5)}

    def centres(self) -> np.ndarray:
        return (np.arange(self.BINS) + 0.5) * (self.range / self.BINS)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Name the point at which NaN or Inf appeared."""
    try:
        yield
    except FloatingPointError as e:
        raise UserError(
            f"{path}: activations hold NaN or Inf, or are too large for float32 ({e}); the source "
            "is damaged, or its activations outgrow the numbers it is computed with"
        ) from e
