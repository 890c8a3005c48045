"""Watch the inputs of every quantisation point while calibration data runs through a model.

Layers run one at a time (one compiled program for all equal layers), so that what is watched can
be pulled out of each; see :class:`mquant_jax.nn.stack.Runner`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx

from mquant_jax.nn.stack import Runner, num_layers

# Called with the point's path, its input [..., K] and the token class [...] of each row.
Observer = Callable[[str, jax.Array, jax.Array], None]


@partial(jax.jit, static_argnums=0)
def _run_tapped(graphdef, state, *args):
    taps: dict[str, jax.Array] = {}
    out = nnx.merge(graphdef, state)(*args, tap=taps.__setitem__)
    return out, taps


@jax.jit
def _layer(state, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), state)


class ObservingRunner(Runner):
    """Runs layer by layer and shows ``observer`` the input of every quantisation point."""

    def __init__(self, observer: Observer):
        self.observer = observer

    def layers(self, name, stack, x, context):
        graphdef, state = nnx.split(stack)
        for i in range(num_layers(stack)):
            x, taps = _run_tapped(graphdef, _layer(state, i), x, context)
            self._show(f"{name}/{i}", taps, context.token_class)
        return x

    def module(self, name, module, x, classes):
        graphdef, state = nnx.split(module)
        x, taps = _run_tapped(graphdef, state, x)
        self._show(name, taps, classes)
        return x

    def _show(self, name: str, taps: dict[str, jax.Array], classes: jax.Array) -> None:
        for point, value in taps.items():
            self.observer(f"{name}/{point}", value, classes)


class Histogram:
    """A histogram of magnitudes whose range doubles as larger values arrive.

    ``BINS`` is fine enough for clips down to a tenth of the range: 8 bins per int8 step.
    """

    BINS = 8192

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
        """Count ``|values|``, any shape."""
        values = np.abs(values).ravel()
        if values.size:
            self._reach(float(values.max()))
            self.counts += np.bincount(self._bins(values), minlength=self.BINS)

    def merge(self, other: Histogram) -> Histogram:
        """Both together, as a new histogram."""
        out = Histogram()
        out._reach(max(self.amax, other.amax))
        for h in (self, other):
            if not h.empty:
                np.add.at(out.counts, out._bins(h.centres()), h.counts)
        return out

    def centres(self) -> np.ndarray:
        return (np.arange(self.BINS) + 0.5) * (self.range / self.BINS)


class RangeObserver:
    """One :class:`Histogram` per quantisation point and token class."""

    def __init__(self, n_classes: int):
        self.n_classes = n_classes
        self.points: dict[str, list[Histogram]] = {}

    def __call__(self, point: str, value: jax.Array, classes: jax.Array) -> None:
        value, classes = np.asarray(value), np.asarray(classes)
        hists = self.points.setdefault(point, [Histogram() for _ in range(self.n_classes)])
        for c, hist in enumerate(hists):
            hist.add(value[classes == c])
