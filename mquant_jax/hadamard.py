"""Construct Hadamard matrices, and orthogonal transforms of any width from them.

Orders come from Sylvester doubling, Paley's two constructions over finite fields, and Kronecker
products of smaller orders; there are no tables. A width without a cheap exact form is split into
equal diagonal blocks, which need no padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import along_last


def has_hadamard(n: int) -> bool:
    """Return whether :func:`hadamard` can build a matrix of order ``n``."""
    return _build(n) is not None


def hadamard(n: int) -> np.ndarray:
    """Return a Hadamard matrix: ``+-1``, int8 ``[n, n]``, with ``H H^T = n I``.

    Raises:
        ValueError: no construction here gives that order.
    """
    matrix = _build(n)
    if matrix is None:
        raise ValueError(f"no Hadamard matrix of order {n} can be built")
    return matrix


@functools.lru_cache(maxsize=64)
def _build(n: int) -> np.ndarray | None:
    """Build a matrix by the first construction that fits: order 1 and 2, Paley I (``q + 1``, q = 3
    mod 4), Paley II (``2 (q + 1)``, q = 1 mod 4), then products of two orders."""
    if n in (1, 2):
        return np.array([[1]] if n == 1 else [[1, 1], [1, -1]], np.int8)
    if n % 4:
        return None
    direct = _paley_one(n) if n & (n - 1) else None
    if direct is None and n & (n - 1):
        direct = _paley_two(n)
    if direct is not None:
        return direct
    for a in (2, *range(4, int(n**0.5) + 1, 4)):
        if n % a == 0 and has_hadamard(a) and has_hadamard(n // a):
            return np.kron(hadamard(a), hadamard(n // a)).astype(np.int8)
    return None


def _paley_one(n: int) -> np.ndarray | None:
    q = n - 1
    if q % 4 != 3 or (jacobsthal := _jacobsthal(q)) is None:
        return None
    core = np.zeros((n, n), np.int8)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1, jacobsthal
    return core + np.eye(n, dtype=np.int8)


def _paley_two(n: int) -> np.ndarray | None:
    q = n // 2 - 1
    if q % 4 != 1 or (jacobsthal := _jacobsthal(q)) is None:
        return None
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, jacobsthal
    eye = np.eye(q + 1, dtype=np.int8)
    plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return (np.kron(conference, plus) + np.kron(eye, minus)).astype(np.int8)


def _jacobsthal(q: int) -> np.ndarray | None:
    """Return ``chi(a - b)`` over the field of ``q`` elements (chi: +1 square, -1 not, 0 zero)."""
    power = _prime_power(q)
    if power is None:
        return None
    p, k = power
    elements = list(itertools.product(range(p), repeat=k))
    index = {e: i for i, e in enumerate(elements)}
    modulus = _irreducible(p, k)
    chi = np.full(q, -1, np.int8)
    chi[0] = 0
    for e in elements[1:]:
        chi[index[_multiply(e, e, modulus, p)]] = 1
    values = np.array(elements)
    weights = p ** np.arange(k - 1, -1, -1)
    return chi[((values[:, None] - values[None]) % p) @ weights]


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return ``(p, k)`` with ``q = p^k``, or ``None``."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0 and rest > 1:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 and q > 1 else None


def _multiply(a: tuple, b: tuple, modulus: tuple, p: int) -> tuple:
    """Multiply two field elements, coefficients from the highest power down."""
    k = len(a)
    product = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    for i in range(k - 1):  # x^k = -modulus
        for j, m in enumerate(modulus):
            product[i + 1 + j] -= product[i] * m
    return tuple(c % p for c in product[k - 1 :])


def _irreducible(p: int, k: int) -> tuple:
    """Return the lower coefficients of a monic irreducible polynomial of degree k.

    A candidate is irreducible if no two non-zero elements multiply to zero. The fields used here
    are small enough to check all pairs.
    """
    zero = (0,) * k
    for candidate in itertools.product(range(p), repeat=k):
        if k == 1:
            return (0,)
        elements = [e for e in itertools.product(range(p), repeat=k) if e != zero]
        monic = [e for e in elements if next(c for c in e if c) == 1]
        if all(_multiply(a, b, candidate, p) != zero for a in monic for b in monic):
            return candidate
    raise AssertionError(f"no irreducible polynomial of degree {k} over {p}")


@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal map of width ``n``: signs, then ``I (x) H_outer (x) H_inner`` normalised.

    Attributes:
        n: output width.
        blocks: number of equal diagonal blocks.
        outer, inner: orders of the two Kronecker factors of a block; applied as two small dense
            products, which suit matrix units better than butterflies.
        seed: seed of the random signs, which spread what a plain Hadamard matrix would gather in
            one channel; ``None`` for no signs.
        padding: zero channels appended to the input first.
    """

    n: int
    blocks: int
    outer: int
    inner: int
    seed: int | None = 0
    padding: int = 0

    @property
    def inputs(self) -> int:
        """Input width."""
        return self.n - self.padding

    @property
    def signs(self) -> np.ndarray:
        """float32 ``[inputs]`` of ``+-1``."""
        if self.seed is None:
            return np.ones(self.inputs, np.float32)
        bits = np.random.default_rng((self.seed, self.n)).integers(0, 2, self.inputs)
        return (2 * bits - 1).astype(np.float32)

    def without_signs(self) -> Rotation:
        """Return the same rotation for inputs that already carry the signs."""
        return dataclasses.replace(self, seed=None)

    def signed(self, x: jax.Array) -> jax.Array:
        """Multiply ``x [..., inputs]`` by the signs."""
        return x if self.seed is None else x * along_last(jnp.asarray(self.signs, x.dtype), x)

    def padded(self, x: jax.Array) -> jax.Array:
        """Pad ``x [..., inputs]`` with zeros to ``[..., n]``."""
        if not self.padding:
            return x
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.padding)])

    def factors(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Return the outer factor, and the inner one, which normalises both."""
        inner = hadamard(self.inner) * (self.outer * self.inner) ** -0.5
        return jnp.asarray(hadamard(self.outer), dtype), jnp.asarray(inner, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x [..., inputs] @ R``: ``[..., n]`` in ``x.dtype``."""
        x = self.padded(self.signed(x))
        shape = x.shape
        outer, inner = self.factors(x.dtype)
        x = x.reshape(*shape[:-1], self.blocks, self.outer, self.inner) @ inner
        return jnp.einsum("...oi,op->...pi", x, outer).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A random orthogonal matrix, uniform over all such matrices."""

    n: int
    seed: int

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """float64 ``[n, n]``."""
        rng = np.random.default_rng((self.seed, self.n))
        q, r = np.linalg.qr(rng.standard_normal((self.n, self.n)))
        return q * np.sign(np.diagonal(r))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x [..., n] @ R``."""
        return x @ jnp.asarray(self.matrix, x.dtype)


def seed_of(seed: int, name: str) -> int:
    """Return the seed of one of a model's rotations."""
    return zlib.crc32(f"{seed}/{name}".encode())


def stream_rotation(
    n: int, seed: int, name: str, orthogonal: bool = False
) -> Rotation | Orthogonal:
    """Return the rotation of a residual stream (or heads) for a model's seed and a stream's name.

    Args:
        orthogonal: use a random orthogonal matrix instead of a Hadamard rotation.
    """
    return (Orthogonal if orthogonal else plan_rotation)(n, seed_of(seed, name))


# Blocks of at least this width mix well enough; narrower ones are replaced by a padded width.
WIDE_BLOCK = 128
MOST_PADDING = 0.04
# Channels per row of a TPU vector register: an inner factor of this order moves no data.
LANES = 128
LANES_WORTH = 1.25  # allowed cost relative to the most even split


def plan_rotation(n: int, seed: int | None = 0, may_pad: bool = False) -> Rotation:
    """Return the cheapest rotation of width ``n`` that mixes well.

    Fewer blocks mix better, and a block's cost per channel is ``outer + inner``. Among the exact
    forms, those with the fewest blocks whose dense factors stay at or below 256 are candidates. The
    most even split of them is chosen, or one whose inner factor fills the lanes of a vector
    register if it costs little more. If the blocks are then narrower than ``WIDE_BLOCK`` channels,
    a slightly wider rotation with a single block is used, its input padded with zeros
    (4304 -> 4320); likewise if only a wider one fills the lanes (8960 -> 9216).

    Args:
        may_pad: whether the width may grow, which only run-time rotations support.

    Raises:
        ValueError: ``n`` is odd, so no Hadamard block larger than one fits.
    """
    if n % 2 and not may_pad:
        raise ValueError(f"no Hadamard rotation of odd width {n}")
    exact = None if n % 2 else _exact(n, seed)
    lanes = _padded_to_lanes(n, exact) if may_pad and exact else None
    if lanes:
        return lanes
    if exact and (not may_pad or exact.blocks == 1 or n // exact.blocks >= WIDE_BLOCK):
        return exact
    for width in range(n + n % 2, int(n * (1 + MOST_PADDING)) + 1, 2):
        wider = _exact(width, seed)
        if wider.blocks == 1:
            return dataclasses.replace(wider, padding=width - n)
    return exact or dataclasses.replace(_exact(n + 1, seed), padding=1)


@functools.cache
def _exact(n: int, seed: int | None) -> Rotation:
    best = None
    for blocks in sorted(d for d in range(1, n + 1) if n % d == 0):
        size = n // blocks
        for outer in (d for d in range(1, int(size**0.5) + 1) if size % d == 0):
            inner = size // outer
            if inner > 256 or not has_hadamard(outer) or not has_hadamard(inner):
                continue
            if best is None or inner < best.inner:
                best = Rotation(n, blocks, outer, inner, seed)
        if best is not None:
            return _in_lanes(best) or best
    raise AssertionError("order 2 always fits an even width")


def _in_lanes(even: Rotation) -> Rotation | None:
    """Return a split of the same blocks with an inner factor of ``LANES``, if there is a cheap
    one."""
    outer, rest = divmod(even.outer * even.inner, LANES)
    if rest or outer > 256 or not has_hadamard(outer):
        return None
    if outer + LANES > LANES_WORTH * (even.outer + even.inner):
        return None
    return dataclasses.replace(even, outer=outer, inner=LANES)


def _padded_to_lanes(n: int, exact: Rotation) -> Rotation | None:
    """Return a slightly wider rotation that fills the lanes where ``exact`` does not, or
    ``None``."""
    if exact.blocks > 1 or exact.inner == LANES:
        return None
    for width in range(-(-n // LANES) * LANES, int(n * (1 + MOST_PADDING)) + 1, LANES):
        wider = _exact(width, exact.seed)
        cheap = wider.outer + wider.inner <= LANES_WORTH * (exact.outer + exact.inner)
        if wider.blocks == 1 and wider.inner == LANES and cheap:
            return dataclasses.replace(wider, padding=width - n)
    return None
