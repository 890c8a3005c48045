"""One look at the float model before anything is quantised: what enters every quantisation point.

:class:`StatisticsRunner` runs the model part by part and keeps, for each point, the largest
magnitude per token (from which sinks are found) and per channel with a sample of rows (from which
smoothing is chosen), and the input of each part (for the asymmetric GPTQ).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.nn.stack import Runner, num_layers
from mquant_jax.ptq.observe import layer_of, run_tapped

SAMPLE = 256  # rows kept per point
_STANDS_OUT = 10.0  # times the median of the tokens' largest values


def chunks(args: Any, size: int) -> Iterator[tuple[slice, Any]]:
    """Slices of the leading axis of everything in ``args``."""
    rows = jax.tree.leaves(args)[0].shape[0]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop), jax.tree.map(lambda a, s=start, e=stop: a[s:e], args)


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


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1)


class StatisticsRunner(Runner):
    """Looks at every point of a float model.

    Args:
        columns: look at channels, too, and keep rows; else ``channels``, ``moments`` and
            ``samples`` stay empty.
        sample: rows kept per point.
        chunk: rows of the batch that run at a time.

    Attributes:
        inputs: path of a part (``language/layers``, ``vision/merger``) -> what entered it.
        tokens: path of a point -> float32 ``[B, T]``, largest magnitude of each token; NaN for
            those that the point does not serve.
        channels: path of a point -> float32 ``[K]``, largest magnitude of each channel.
        samples: path of a point -> a :class:`Sampler` of its rows, padding left out.
        moments: path of a point -> float64 ``[2, K]``, mean and mean square of each channel, over
            the tokens that do not stand out, as sinks do.
        point_of: path of a dense layer -> path of the point in front of it.
    """

    def __init__(self, columns: bool, chunk: int = 16, sample: int = SAMPLE):
        self.columns, self.chunk, self.sample = columns, chunk, sample
        self.inputs: dict[str, jax.Array] = {}
        self.tokens: dict[str, np.ndarray] = {}
        self.channels: dict[str, np.ndarray] = {}
        self.samples: dict[str, Sampler] = {}
        self.moments: dict[str, np.ndarray] = {}
        self._seen: dict[str, int] = {}
        self.point_of: dict[str, str] = {}

    def layers(self, name, stack, x, context):
        self.inputs[name] = x
        graphdef, state = nnx.split(stack)
        for i in range(num_layers(stack)):
            block = nnx.merge(graphdef, layer_of(state, i))
            x = self._part(f"{name}/{i}", block, (x, context), context.token_class)
        return x

    def module(self, name, module, x, classes):
        self.inputs[name] = x
        owner = name if hasattr(module, "POINTS") else name.rpartition("/")[0]
        return self._part(owner, module, (x,), classes)

    def _part(self, name, module, args, classes):
        for point, readers in getattr(module, "POINTS", {}).items():
            self.point_of |= {f"{name}/{reader}": f"{name}/{point}" for reader in readers}
        graphdef, state = nnx.split(module)
        outs = []
        for rows, part in chunks(args, self.chunk):
            out, taps = run_tapped(graphdef, state, *part)
            outs.append(out)
            for point, value in taps.items():
                path, per_token = f"{name}/{point}", np.asarray(_largest(value))
                real = np.asarray(classes_at(module, point, part, classes[rows])) >= 0
                per_token = np.where(real, per_token, np.nan)
                known = self.tokens.get(path)
                known = per_token if known is None else np.concatenate([known, per_token])
                self.tokens[path] = known
                if self.columns:
                    self._see_columns(path, np.asarray(value)[real])
        return jnp.concatenate(outs)

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
