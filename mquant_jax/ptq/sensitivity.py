"""What rounding costs each layer: its output's error on calibration data, for several widths.

The error is that of rounding to nearest with the clip search, on the float model's activations:
``sum_t |(w - q) x_t|^2 / sum_t |w x_t|^2``. GPTQ lowers it by a factor that is similar for all
layers of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.nn.params import find
from mquant_jax.ptq.gptq import accumulate, complete, empty_gram, relative_output_error
from mquant_jax.ptq.observe import run_tapped
from mquant_jax.ptq.scales import round_weight
from mquant_jax.ptq.statistics import classes_at
from mquant_jax.ptq.walk import Part
from mquant_jax.sections import Section


@dataclasses.dataclass(frozen=True)
class Cost:
    """One way to quantise one layer.

    Attributes:
        section: how.
        bits: stored bits per weight, scales included.
        error: relative squared error of the layer's output.
    """

    section: Section
    bits: float
    error: float


def stored_bits(section: Section, in_features: int) -> float:
    """Bits per weight, with the float32 scale of each group."""
    return section.w_bits + 32 / (section.group_size or in_features)


class Sensitivity:
    """A visitor of the float model that finds the costs of every layer.

    Args:
        options: the sections to try for a layer's path and number of inputs; none leaves it out.
        clip: search the clip that gives the least error.

    Attributes:
        costs: path of a layer -> its costs, in the order of its options.
        sizes: path of a layer -> ``(out, in)``.
    """

    def __init__(self, options: Callable[[str, int], Sequence[Section]], clip: bool):
        self.options, self.clip = options, clip
        self.costs: dict[str, list[Cost]] = {}
        self.sizes: dict[str, tuple[int, int]] = {}

    def visit(self, part: Part) -> tuple[Iterator[Any], None]:
        return self._outputs(part), None

    def _outputs(self, part: Part) -> Iterator[Any]:
        points = self._wanted(part)
        grams: dict[str, Any] = {}
        graphdef, state = nnx.split(part.module)
        for n, args in enumerate(part.inputs):
            out, taps = run_tapped(graphdef, state, *args)
            for point in points:
                x = taps[point]
                real = np.asarray(classes_at(part.module, point, args, part.classes[n])) >= 0
                if point not in grams:
                    grams[point] = empty_gram(x.shape[-1])
                grams[point] = accumulate(grams[point], x, jnp.asarray(real, jnp.float32))
            yield out
        for point, layers in points.items():
            gram = grams.pop(point)
            gram = gram if isinstance(gram, np.ndarray) else np.array(gram, np.float32)
            complete(gram)
            for path, (weight, sections) in layers.items():
                self.costs[path] = [self._cost(weight, gram, s) for s in sections]
                self.sizes[path] = weight.shape

    def _wanted(self, part: Part) -> dict[str, dict[str, Any]]:
        """Point -> path of each layer to be measured -> its weight and options."""
        points: dict[str, dict[str, Any]] = {}
        module: Any = part.module
        for point, readers in getattr(module, "POINTS", {}).items():
            for reader in readers:
                weight = np.asarray(find(module, reader).kernel.get_value(), np.float32)
                sections = self.options(f"{part.name}/{reader}", weight.shape[1])
                if sections:
                    known = points.setdefault(point, {})
                    known[f"{part.name}/{reader}"] = weight, sections
        return points

    def _cost(self, weight: np.ndarray, gram: np.ndarray, section: Section) -> Cost:
        q = round_weight(weight, section.w_bits, section.group_size, self.clip)
        rounded = np.asarray(jax.tree.map(jnp.asarray, q).dequantize())
        error = relative_output_error(weight, rounded, gram) ** 2
        return Cost(section, stored_bits(section, weight.shape[1]), error)

    def record(self, name: str) -> dict[str, Any]:
        """Nothing is kept: the pass is not resumed."""
        return {}

    def restore(self, name: str, record: Mapping[str, Any]) -> None:
        """Never called: see :meth:`record`."""
