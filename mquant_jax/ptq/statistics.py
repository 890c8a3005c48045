"""One look at a float model before anything is quantised: what enters every quantisation point.

:class:`Statistics` is shown the model part by part and keeps, for each point, the largest magnitude
per token (from which sinks are found) and, where columns are asked for, what channels hold (from
which they are balanced or smoothed).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.nn.params import find
from mquant_jax.ptq.observe import run_tapped
from mquant_jax.ptq.records import arrays_from, arrays_to
from mquant_jax.ptq.walk import Part

SAMPLE = 256  # rows kept per point
_STANDS_OUT = 10.0  # times the median of the tokens' largest values


def classes_at(module: nnx.Module, point: str, args: Any, classes: Any) -> Any:
    """Classes of the rows that a point really serves, -1 for the others.

    A module with experts says so itself: ``classes_at(point, context)``, both experts being shown
    everything while somebody listens.
    """
    own = getattr(module, "classes_at", None)
    return classes if own is None else own(point, args[-1])


class Sampler:
    """A fair sample of up to ``size`` rows out of all that are shown."""

    def __init__(self, size: int = SAMPLE):
        self.size, self.rng = size, np.random.default_rng(0)
        self.rows: np.ndarray | None = None
        self._keys = np.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Offer float ``[n, K]``."""
        keys = self.rng.random(len(rows))
        take = np.argsort(keys)[: self.size]
        rows, keys = rows[take], keys[take]
        if self.rows is not None:
            rows, keys = np.concatenate([self.rows, rows]), np.concatenate([self._keys, keys])
        keep = np.argsort(keys)[: self.size]
        self.rows, self._keys = rows[keep], keys[keep]


def column_squares(kernel: jax.Array, rows: int = 1024) -> np.ndarray:
    """Sum of squares of each column, float64 ``[K]``."""
    total = np.zeros(kernel.shape[1])
    for start in range(0, kernel.shape[0], rows):
        total += np.square(np.asarray(kernel[start : start + rows], np.float64)).sum(0)
    return total


@jax.jit
def _sizes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest magnitude and mean square of each token, float32 ``[...]``."""
    return jnp.max(jnp.abs(x), axis=-1), jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)


class Statistics:
    """A visitor that looks at every point of a float model.

    Args:
        columns: look at channels and weights, too, and keep rows; else ``squares``, ``channels``,
            ``moments``, ``samples`` and ``weights`` stay empty.
        sample: rows kept per point.

    Attributes:
        tokens: path of a point -> float32 ``[tokens]``, largest magnitude of each token, row by row
            and chunk by chunk; NaN for those that the point does not serve.
        squares: path of a point -> float32 ``[tokens]``, mean square of each token, as ``tokens``.
        channels: path of a point -> float32 ``[K]``, largest magnitude of each channel.
        samples: path of a point -> a :class:`Sampler` of its rows, padding left out.
        moments: path of a point -> float64 ``[2, K]``, mean and mean square of each channel, over
            the tokens that do not stand out, as sinks do.
        weights: path of a dense layer -> float64 ``[K]``, sum of squares of each column.
        point_of: path of a dense layer -> path of the point in front of it.
    """

    def __init__(self, columns: bool, sample: int = SAMPLE):
        self.columns, self.sample = columns, sample
        self.tokens: dict[str, np.ndarray] = {}
        self.squares: dict[str, np.ndarray] = {}
        self.channels: dict[str, np.ndarray] = {}
        self.samples: dict[str, Sampler] = {}
        self.moments: dict[str, np.ndarray] = {}
        self.weights: dict[str, np.ndarray] = {}
        self._seen: dict[str, int] = {}
        self.point_of: dict[str, str] = {}

    def visit(self, part: Part):
        owner = part.name if hasattr(part.module, "POINTS") else part.name.rpartition("/")[0]
        for point, readers in getattr(part.module, "POINTS", {}).items():
            for reader in readers:
                path = f"{part.name}/{reader}"
                self.point_of[path] = f"{part.name}/{point}"
                if self.columns:
                    kernel = find(part.module, reader).kernel.get_value()
                    self.weights[path] = column_squares(kernel)
        return self._outputs(owner, part), None

    def _outputs(self, owner: str, part: Part):
        graphdef, state = nnx.split(part.module)
        for n, args in enumerate(part.inputs):
            out, taps = run_tapped(graphdef, state, *args)
            for point, value in taps.items():
                path = f"{owner}/{point}"
                per_token, squares = map(np.asarray, _sizes(value))
                real = np.asarray(classes_at(part.module, point, args, part.classes[n])) >= 0
                if not np.isfinite(per_token[real]).all():
                    raise UserError(
                        f"{path}: activations of the float model hold NaN or Inf; the source is "
                        "damaged, or its activations outgrow float32"
                    )
                _append(self.tokens, path, np.where(real, per_token, np.nan))
                if self.columns:
                    _append(self.squares, path, np.where(real, squares, np.nan))
                    self._see_columns(path, np.asarray(value)[real])
            yield out

    def _see_columns(self, path: str, rows: np.ndarray) -> None:
        per_channel = np.abs(rows).max(0, initial=0.0)
        self.channels[path] = np.maximum(self.channels.get(path, 0.0), per_channel)
        self.samples.setdefault(path, Sampler(self.sample)).add(rows)
        largest = np.abs(rows).max(1)
        rows = rows[largest <= _STANDS_OUT * np.median(largest)] if len(rows) else rows
        before = self._seen.get(path, 0)
        self._seen[path] = before + len(rows)
        sums = np.stack([rows.sum(0, np.float64), np.square(rows).sum(0, np.float64)])
        known = self.moments.get(path, np.zeros_like(sums))
        self.moments[path] = (known * before + sums) / max(self._seen[path], 1)

    _KEPT = ("tokens", "squares", "channels", "moments", "weights")

    def record(self, name: str) -> dict[str, Any]:
        """What was seen of a part."""
        kept = {k: _below(getattr(self, k), name) for k in self._KEPT}
        kept["samples"] = {p: s.rows for p, s in _below(self.samples, name).items()}
        return {
            "arrays": {k: arrays_to(v) for k, v in kept.items()},
            "point_of": _below(self.point_of, name),
        }

    def restore(self, name: str, record: dict[str, Any]) -> None:
        """Take it up again."""
        kept = {k: arrays_from(v) for k, v in record["arrays"].items()}
        for path, rows in kept.pop("samples").items():
            self.samples[path] = Sampler(self.sample)
            self.samples[path].rows = rows
        for k, values in kept.items():
            getattr(self, k).update(values)
        self.point_of.update(record["point_of"])


def _append(known: dict[str, np.ndarray], path: str, values: np.ndarray) -> None:
    """Add a chunk's values to those of the chunks before it."""
    before = known.get(path, np.empty(0, np.float32))
    known[path] = np.concatenate([before, values.ravel()])


def _below(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of a part and of the points below it."""
    return {k: v for k, v in values.items() if k == name or k.startswith(f"{name}/")}
