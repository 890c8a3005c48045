"""Estimate a conversion's memory and time from its plan.

The model counts what is alive while one part is processed. Numbers that do not follow from shapes
are in :class:`Constants`. Time is a rough estimate: operations divided by a measured rate.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from mquant_jax.layer_plan import LayerPlan, LayerSpec, PartPlan
from mquant_jax.lazy import BLOCK_BYTES
from mquant_jax.ptq.calibration_data import CHUNK_TOKENS
from mquant_jax.ptq.states import BUDGET
from mquant_jax.recipe import Recipe

_FLOAT = 4  # bytes: all of it is float32


@dataclasses.dataclass(frozen=True)
class Constants:
    """Numbers that do not follow from shapes.

    Attributes:
        base: bytes of Python, JAX, compiled programs, and freed memory kept by the allocator.
        base_alone: the same without calibration, when little is compiled.
        reading: float32 copies of a tensor while it is read and rotated, itself included.
        looking: copies of a chunk's widest activations while the float model is observed.
        watching: the same at one point of the part being quantised.
        rounding: float32 copies of a point's weights while they are rounded.
        table: float32 copies of a block of a table's rows while it is rotated and rounded.
        passes: forward passes through a part while it is quantised.
        efficiency: share of the measured rate that passes, Hessians and factorisations reach.
        clip: seconds per weight of the clip search.
        read: seconds per weight that is read and rotated.
        start: seconds to start and compile.
    """

    base: int = 1900 << 20
    base_alone: int = 500 << 20
    reading: float = 8.0
    looking: float = 4.0
    watching: float = 4.0
    rounding: float = 7.0
    table: float = 10.0
    passes: float = 2.5
    efficiency: float = 0.5
    clip: float = 6e-8
    read: float = 5e-8
    start: float = 60.0


CONSTANTS = Constants()


@dataclasses.dataclass(frozen=True)
class Data:
    """The expected calibration data.

    Attributes:
        samples: number of prompts.
        tokens: tokens per prompt, visual ones included.
        patches: patches per prompt.
    """

    samples: int = 16
    tokens: int = 512
    patches: int = 1024

    def rows(self, part: str) -> int:
        """Return the rows that a part sees over all samples; a connector sees about as many as the
        decoder."""
        in_tower = part.startswith(("vision.layers.", "vision.patch_embed"))
        return self.samples * (self.patches if in_tower else self.tokens)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The expected cost of a conversion.

    Attributes:
        peak_bytes: peak memory.
        peak_part: the part at which it is reached.
        part_bytes: memory of that part.
        state_bytes: calibration states kept beside it; the rest is the program.
        seconds: time.
    """

    peak_bytes: int
    peak_part: str
    part_bytes: int
    state_bytes: int
    seconds: float


def cost(plan: LayerPlan, data: Data, gflops: float, constants: Constants = CONSTANTS) -> Cost:
    """Return the cost of a conversion.

    Args:
        gflops: float32 rate of the machine, see :func:`measured_gflops`.
    """
    given = data if plan.recipe.needs_calibration else None
    sizes = {
        part.name: (_part_bytes(part, plan, given, constants), _states(part, plan, given))
        for part in plan.parts
    }
    peak_part = max(sizes, key=lambda name: sum(sizes[name]))
    part_bytes, states = sizes[peak_part]
    base = base_bytes(plan.recipe, constants)
    seconds = sum(_part_seconds(p, plan, data, gflops * 1e9, constants) for p in plan.parts)
    return Cost(
        base + states + part_bytes, peak_part, part_bytes, states, constants.start + seconds
    )


def base_bytes(recipe: Recipe, constants: Constants = CONSTANTS) -> int:
    """Return the memory that any conversion takes and still holds at its end."""
    return constants.base if recipe.needs_calibration else constants.base_alone


def measured_gflops(size: int = 512, rounds: int = 20) -> float:
    """Return the best float32 rate over several matrix products; they are short, so that other
    users of the machine disturb only some of them."""
    a = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def points_of(part: PartPlan) -> Iterator[list[LayerSpec]]:
    """Return the layers that read each point of a part."""
    points: dict[str, list[LayerSpec]] = {}
    for layer in part.layers:
        if layer.point is not None and layer.path != "language/head":
            points.setdefault(layer.point, []).append(layer)
    yield from points.values()


def _is_table(part: PartPlan) -> bool:
    return part.name in ("language.embedding", "language.head")


def _part_bytes(part: PartPlan, plan: LayerPlan, data: Data | None, c: Constants) -> int:
    """Return the peak memory of one part, without states."""
    recipe, weights = plan.recipe, _FLOAT * part.elements
    if _is_table(part) or data is None:
        block = min(weights, BLOCK_BYTES)
        return int(c.table * block) if recipe.changes_weights else 2 * block
    widest = max((x.in_features * x.out_features for x in part.layers), default=0)
    moments = [weights + c.reading * _FLOAT * widest]
    chunk = _FLOAT * min(CHUNK_TOKENS, data.rows(part.name))
    copies = weights * (1 + recipe.weights.needs_float_inputs)
    for layers in points_of(part):
        k, gram = layers[0].in_features, _FLOAT * layers[0].in_features ** 2
        rounded = _rounded(layers)
        grams = gram if rounded and recipe.weights.method == "gptq" else 0
        moments += [
            weights + chunk * k * c.looking,
            copies + chunk * k * c.watching + grams * _grams(recipe, layers, watching=True),
            copies + c.rounding * _FLOAT * rounded * k
            + grams * _grams(recipe, layers, watching=False),
        ]  # fmt: skip
    return int(max(moments))


def _rounded(layers: list[LayerSpec]) -> int:
    """Return the rows of a point's weights that are rounded."""
    return sum(layer.out_features for layer in layers if layer.w_bits < 16)


def _grams(recipe: Recipe, layers: list[LayerSpec], watching: bool) -> int:
    """Count the ``[K, K]`` arrays alive at a point: the Hessian, the float model's difference, the
    factor, and another one where a channel is split off."""
    cross = recipe.weights.asymmetry > 0
    split = any(layer.protection == "split" for layer in layers)
    return 1 + cross + (0 if watching else 1 + split)


def _states(part: PartPlan, plan: LayerPlan, data: Data | None) -> int:
    """Return the bytes of hidden states around a part and of its points' inputs that stay in
    memory."""
    widths = [layers[0].in_features for layers in points_of(part)]
    if not widths or data is None:
        return 0
    kept = sum(widths) - max(widths) + 2 * min(widths)
    twins = 1 + plan.recipe.carries_float
    return min(BUDGET, _FLOAT * data.rows(part.name) * kept * twins)


def _part_seconds(part: PartPlan, plan: LayerPlan, data: Data, rate: float, c: Constants) -> float:
    """Return the time of one part over all passes."""
    recipe = plan.recipe
    if not recipe.changes_weights:
        return part.elements * 1e-9
    looks = recipe.balance + recipe.smooth * 2 + recipe.finds_sinks
    seconds = part.elements * c.read * (1 + looks)
    seconds += c.clip * sum(x.in_features * x.out_features for x in part.layers if x.w_bits < 8)
    if _is_table(part) or not recipe.needs_calibration:
        return seconds
    rows = data.rows(part.name)
    learns = recipe.learns_blocks and part.name.startswith("language.layers.")
    steps = 3 * recipe.tune.epochs if learns else 0  # a gradient costs two passes more
    passes = looks + steps + c.passes * (1 + recipe.carries_float)
    operations = 2.0 * part.elements * rows * passes
    for layers in points_of(part):
        k, out = layers[0].in_features, _rounded(layers)
        if out and recipe.weights.method == "gptq":
            cross = recipe.weights.asymmetry > 0
            operations += rows * k**2 * (1 + 2 * cross) + k**3 * 2 / 3 + 2.0 * out * k**2
    return seconds + operations / (rate * c.efficiency)
