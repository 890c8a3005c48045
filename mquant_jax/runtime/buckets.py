"""The sizes that programs are compiled for. Every size in a request is rounded up to one of them.

Fewer sizes mean fewer programs. Each program takes seconds to compile and, on CPU, hundreds of
memory maps, of which a process has 65,530. The price is padding. Sizes double at the small end,
where a call is cheap, and grow in smaller steps at the large end, where padding is expensive:

``patches``  of a picture: 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, ...
``prompt``   in tokens: 32, then the same sizes as patches
``slots``    of the KV cache, prompt and answer: 256, 1024, then the same sizes as patches
``rows``     of a batch: 1, 2, 4, 8, ...

Pictures and prompts of one size run together in groups of 1, 4, 16, ... (:func:`groups`).
Programs exchange features and cache entries in pieces of :data:`PIECE` tokens, so that a program's
shape does not depend on two sizes where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PIECE = 64  # tokens
# The most patches or tokens in one call of several rows. A few hundred keep a CPU busy; an
# accelerator needs more.
MOST_TOGETHER = {"cpu": 1024}
MOST_TOGETHER_ELSEWHERE = 8192


def _steps(n: int) -> int:
    """The smallest of 64, 128, 192, 256, 384, 512, 768, 1024, 1280, ... that is at least ``n``."""
    if n <= 2 * PIECE:
        return PIECE if n <= PIECE else 2 * PIECE
    octave = 1 << (n - 1).bit_length() - 1  # octave < n <= 2 * octave
    step = octave // (4 if octave >= 1024 else 2)
    return -(-n // step) * step


def patches(n: int, multiple: int = 1) -> int:
    """Patches of a padded picture, a multiple of ``multiple``, the patches merged into a token."""
    return -(-_steps(n) // multiple) * multiple


def prompt(n: int) -> int:
    """Tokens of a padded prompt."""
    return PIECE // 2 if n <= PIECE // 2 else _steps(n)


def slots(n: int) -> int:
    """Cache slots for a prompt and answer of ``n`` tokens in total."""
    return 256 if n <= 256 else max(1024, _steps(n))


def rows(n: int) -> int:
    """Rows of a padded batch."""
    return 1 << (n - 1).bit_length()


def decoding(n: int, most: int, platform: str, alone: bool) -> int:
    """Rows that one step of an engine of ``most`` decodes where ``n`` have a token to come. On CPU
    a few cost nearly as much as eight, and one ``alone``, if it may be, costs least."""
    if platform != "cpu":
        return most
    return min(most, 1 if alone and n == 1 else max(8, rows(n)))


def groups(n: int, size: int, platform: str) -> list[int]:
    """Powers of four that sum to ``n``: the group sizes for rows of ``size`` patches or tokens."""
    most = MOST_TOGETHER.get(platform, MOST_TOGETHER_ELSEWHERE)
    out = []
    while n:
        group = 1
        while group * 4 <= n and group * 4 * size <= most:
            group *= 4
        out.append(group)
        n -= group
    return out


def together(n: int, size: int, platform: str) -> int:
    """How many of ``n`` rows of ``size`` patches or tokens one call takes, a power of two."""
    most = max(1, MOST_TOGETHER.get(platform, MOST_TOGETHER_ELSEWHERE) // size)
    return min(rows(n), 1 << most.bit_length() - 1)


def fine(n: int, multiple: int = 1) -> int:
    """At most an eighth more than ``n``. For the batches that families collate and calibration runs
    unchanged."""
    step = -(-(1 << max(0, n.bit_length() - 4)) // multiple) * multiple
    return -(-n // step) * step


def pieces(tokens: int) -> int:
    """Number of pieces that hold ``tokens`` tokens."""
    return -(-tokens // PIECE)


def feature_pieces(needed: int, rows: int, tokens: int) -> int:
    """Pieces of visual features that a prefill of this size takes: room for two pictures per row
    with a partly filled last piece each, and more only if ``needed``."""
    usual = rows * (tokens // PIECE + 2)
    return usual if needed <= usual else 1 << (needed - 1).bit_length()


def up_to(most: int, size: Callable[[int], int]) -> Iterator[int]:
    """Every value that ``size`` (:func:`prompt` or another of these) returns for 1 to ``most``."""
    n = 1
    while True:
        yield size(n)
        if size(n) >= most:
            return
        n = size(n) + 1
