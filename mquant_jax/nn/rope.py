"""Rotary position tables and their application (half-split layout)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import AnyArray, along_last
from mquant_jax.ops.attention_xla import turned
from mquant_jax.shapes import Array, Float, Float32, Float64, Int32
from mquant_jax.target import target


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's longer context: slow rotations are slowed down further, fast ones stay.

    A slot whose wavelength is more than ``original / low`` positions turns ``factor`` times
    slower; one of less than ``original / high`` is left alone; in between the two are blended.

    Attributes:
        factor: how much longer the context became.
        low, high: wavelengths per original context that bound the blend; ``low < high``.
        original: the context before the change, in positions.
    """

    factor: float
    low: float
    high: float
    original: int

    def __call__(
        self, freq: Float64[np.ndarray, " slots"], theta: float
    ) -> Float64[np.ndarray, " slots"]:
        """Frequencies, scaled."""
        turns = self.original * freq / (2 * np.pi)  # of one slot over the original context
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return kept * freq + (1 - kept) * freq / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every slot turns ``factor`` times slower."""

    factor: float

    def __call__(
        self, freq: Float64[np.ndarray, " slots"], theta: float
    ) -> Float64[np.ndarray, " slots"]:
        """Frequencies, scaled."""
        return freq / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: slots are interpolated the more, the less they turn over the original context.

    A slot that turns ``fast`` times or more keeps its frequency, one that turns ``slow`` times or
    less is ``factor`` times slower, and in between the two are blended linearly by slot number.

    Attributes:
        factor: how much longer the context became.
        original: the context before the change, in positions.
        fast, slow: turns per original context that bound the blend.
        truncate: the bounding slots are rounded outward to whole numbers.
        attention: factor on the rotated queries and keys alike.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention: float = 1.0

    def __call__(
        self, freq: Float64[np.ndarray, " slots"], theta: float
    ) -> Float64[np.ndarray, " slots"]:
        """Frequencies of base ``theta``, scaled."""
        dim = 2 * len(freq)
        low, high = (self._slot(turns, dim, theta) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 1e-3 if low == high else 0  # no division by zero
        interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return freq * (1 - interpolated) + freq / self.factor * interpolated

    def _slot(self, turns: float, dim: int, theta: float) -> float:
        """The (fractional) slot that makes so many turns over the original context."""
        return dim * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: beyond ``original`` positions the base grows with the length in use.

    Up to there it changes nothing. Keys that are in the cache keep the rotation they had.

    Attributes:
        factor: growth of the base per length; above zero.
        original: positions that the model was trained for.
    """

    factor: float
    original: int

    def __call__(
        self, length: Int32[AnyArray, " B"], dim: int, theta: float
    ) -> Float32[Array, "B {dim//2}"]:
        """Frequencies of sequences of ``length``."""
        growth = self.factor * length.astype(jnp.float32) / self.original - (self.factor - 1)
        growth = (jnp.maximum(growth, 1.0) ** (dim / (dim - 2)))[:, None]
        slots = np.arange(0, dim, 2, dtype=np.float32)[None] / dim
        return jnp.asarray(frequencies(dim, theta))[None] * growth**-slots


@dataclasses.dataclass(frozen=True)
class SteppedScaling:
    """Qwen's dynamic NTK: the base grows by a step each time that a prompt's length doubles.

    A prompt of up to ``original * 2^k`` positions has its base multiplied by
    ``(2^(k+1) - 1) ^ (dim / (dim - 2))``. Tokens that follow it keep the base of the prompt.

    Attributes:
        original: positions that the model was trained for.
    """

    original: int

    def __call__(
        self, length: Int32[AnyArray, " B"], dim: int, theta: float
    ) -> Float32[Array, "B {dim//2}"]:
        """Frequencies for prompts of ``length``."""
        doublings = 31 - self.original.bit_length()  # as many as int32 can count
        bounds = self.original * 2 ** np.arange(doublings, dtype=np.int64)
        bases = (theta * (2.0 ** (k + 1) - 1) ** (dim / (dim - 2)) for k in range(doublings + 1))
        table = np.stack([frequencies(dim, base) for base in bases])
        step = jnp.sum(length[:, None] > bounds.astype(np.int32)[None], axis=1)
        return jnp.asarray(table)[step]


@dataclasses.dataclass(frozen=True)
class StoredFrequencies:
    """Each layer has frequencies of its own, a parameter."""


FixedScaling = Llama3Scaling | LinearScaling | YarnScaling
Scaling = FixedScaling | DynamicScaling | SteppedScaling | StoredFrequencies


@dataclasses.dataclass(frozen=True)
class LogGain:
    """From position ``length`` on, queries grow with the logarithm of their position."""

    length: int

    def __call__(self, positions: Int32[AnyArray, "streams B T"]) -> Float32[Array, "B T"]:
        """Factors of queries at these positions."""
        count = jnp.maximum(jnp.max(positions, axis=0), 0).astype(jnp.float32) + 1
        return jnp.maximum(jnp.log(count) / math.log(self.length), 1.0)


def frequencies(
    dim: int, theta: float, scaling: FixedScaling | None = None
) -> Float32[np.ndarray, " {dim//2}"]:
    """``theta ** (-2j / dim)`` for ``j < dim/2``, then scaled."""
    freq = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return (freq if scaling is None else scaling(freq, theta)).astype(np.float32)


def multi_axis_angles(
    positions: Int32[AnyArray, "streams B T"],
    dim: int,
    theta: float,
    streams: tuple[int, ...],
    scaling: Scaling | None = None,
    length: Int32[AnyArray, " B"] | None = None,
) -> Float32[Array, "B T {dim//2}"]:
    """Angles of M-RoPE: each frequency slot follows one of several position streams.

    Args:
        dim: channels that turn.
        theta: base.
        streams: the stream of each slot, ``dim / 2`` numbers.
        scaling: of the frequencies.
        length: positions of the rows' prompts, for scaling that depends on them; by default those
            of ``positions``.

    Returns:
        The angles; the positions themselves for :class:`StoredFrequencies`.
    """
    per_slot = slot_positions(positions, streams)
    if isinstance(scaling, StoredFrequencies):
        return per_slot
    freq: AnyArray
    if isinstance(scaling, DynamicScaling | SteppedScaling):
        used = jnp.max(positions, axis=(0, 2)) + 1
        length = used if length is None else length
        # Only the dynamic kind keeps growing after the prompt.
        growing = jnp.maximum(used, length) if isinstance(scaling, DynamicScaling) else length
        freq = scaling(growing, dim, theta)[:, None]
    else:
        freq = frequencies(dim, theta, scaling)
    return per_slot * along_last(freq, per_slot)


def slot_positions(
    positions: Int32[AnyArray, "streams B T"], streams: tuple[int, ...]
) -> Float32[Array, "B T {len(streams)}"]:
    """The position that each frequency slot follows."""
    return jnp.moveaxis(positions.astype(jnp.float32)[np.asarray(streams)], 0, -1)


def chunked(sections: tuple[int, ...]) -> tuple[int, ...]:
    """The stream of each slot where runs of slots, so many each, follow one stream after another.

    A single section is ordinary rope.
    """
    return tuple(i for i, slots in enumerate(sections) for _ in range(slots))


def interleaved(sections: tuple[int, ...]) -> tuple[int, ...]:
    """The stream of each slot where the streams take turns: 0, 1, 2, 0, 1, 2, ...

    Stream ``i > 0`` has a slot in each of the first ``sections[i]`` turns; stream 0 has the rest.
    """
    count, out = len(sections), [0] * sum(sections)
    for i, turns in enumerate(sections[1:], 1):
        for slot in range(i, min(count * turns, len(out)), count):
            out[slot] = i
    return tuple(out)


def grid_angles(
    coords: Int32[AnyArray, "N P 2"], dim: int, theta: float
) -> Float32[Array, "N P {dim//2}"]:
    """Angles of a vision tower's 2-D rope.

    Args:
        coords: row and column of each patch.
        dim: head width; each axis takes ``dim/4`` slots of base ``theta`` over ``dim/2``.

    Returns:
        Row angles, then column angles.
    """
    freq = frequencies(dim // 2, theta)
    places = jnp.asarray(coords, jnp.float32)[..., None]
    angles = places * along_last(freq, places)  # [N, P, 2, dim/4]
    return angles.reshape(*coords.shape[:-1], dim // 2)


def apply_rope(
    x: Float[Array, "B heads T d"], angles: Float32[Array, "B T slots"]
) -> Float[Array, "B heads T d"]:
    """Rotate heads by angles, in float32; keeps ``x.dtype``.

    Only the first ``2 * slots`` channels of a head turn, as two halves; the others pass.
    """
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    half, whole = angles.shape[-1], x.shape[-1] == 2 * angles.shape[-1]
    if target().platform == "tpu" and x.dtype == jnp.bfloat16 and x.shape[2] > 1 and whole:
        # Halves of a vector register are costly to cut and join; a product with a signed
        # permutation exchanges them exactly, next to free.
        one = np.eye(half)
        swap = np.block([[np.zeros_like(one), one], [-one, np.zeros_like(one)]])
        other = jnp.matmul(x, jnp.asarray(swap, x.dtype), preferred_element_type=jnp.float32)
        twice = [jnp.concatenate([y, y], axis=-1) for y in (cos, sin)]
        return (x.astype(jnp.float32) * twice[0] + other * twice[1]).astype(x.dtype)
    return turned(x, cos, sin)
