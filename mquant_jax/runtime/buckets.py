"""The sizes that programs are compiled for. Every size that a request brings is rounded up here.

Few sizes mean few programs: each takes seconds to compile and, on CPU, hundreds of memory maps, of
which a process has 65,530. Padding costs time instead. Sizes double at the small end, where a call
costs little, and go in smaller steps at the large end, where padding is expensive:

``patches``  of a picture: 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, ...
``prompt``   in tokens: 32, and then as patches
``slots``    of the cache, prompt and answer: 256, 1024, and then as patches
``rows``     of a batch: 1, 2, 4, 8, ...

Pictures and prompts of one size run together in groups of 1, 4, 16, ... (:func:`groups`).
Between programs, features and cache entries travel in pieces of :data:`PIECE` tokens, so that no
program's shape depends on two sizes where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PIECE = 64  # tokens
# Patches or tokens that one call takes at most, as far as they are of several rows. A CPU is busy
# with a few hundred; an accelerator wants more.
MOST_TOGETHER = {"cpu": 1024}
MOST_TOGETHER_ELSEWHERE = 8192


def _steps(n: int) -> int:
    """The least of 64, 128, 192, 256, 384, 512, 768, 1024, 1280, ... that holds ``n``."""
    if n <= 2 * PIECE:
        return PIECE if n <= PIECE else 2 * PIECE
    octave = 1 << (n - 1).bit_length() - 1  # octave < n <= 2 * octave
    step = octave // (4 if octave >= 1024 else 2)
    return -(-n // step) * step


def patches(n: int, multiple: int = 1) -> int:
    """Patches of a padded picture; a multiple of the patches that become one token."""
    return -(-_steps(n) // multiple) * multiple


def prompt(n: int) -> int:
    """Tokens of a padded prompt."""
    return PIECE // 2 if n <= PIECE // 2 else _steps(n)


def slots(n: int) -> int:
    """Cache slots for prompts and answers of ``n`` tokens together."""
    return 256 if n <= 256 else max(1024, _steps(n))


def rows(n: int) -> int:
    """Rows of a padded batch."""
    return 1 << (n - 1).bit_length()


def decoding(n: int, most: int, platform: str) -> int:
    """Rows that one step of an engine of ``most`` decodes where ``n`` have a token to come. On CPU
    one row alone is cheapest, and a few cost nearly as much as eight."""
    if platform != "cpu":
        return most
    return min(most, 1 if n == 1 else max(8, rows(n)))


def groups(n: int, size: int, platform: str) -> list[int]:
    """Group sizes, powers of four, that sum to ``n``, for rows of ``size`` patches or tokens."""
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
    """Rows of ``size`` patches or tokens that one call takes of ``n``, a power of two."""
    most = max(1, MOST_TOGETHER.get(platform, MOST_TOGETHER_ELSEWHERE) // size)
    return min(rows(n), 1 << most.bit_length() - 1)


def fine(n: int, multiple: int = 1) -> int:
    """At most an eighth more than ``n``: for batches as families collate them, which calibration
    runs as they are."""
    step = -(-(1 << max(0, n.bit_length() - 4)) // multiple) * multiple
    return -(-n // step) * step


def pieces(tokens: int) -> int:
    """Pieces that hold so many tokens."""
    return -(-tokens // PIECE)


def feature_pieces(needed: int, rows: int, tokens: int) -> int:
    """Pieces of visual features that prompts of this size take: two pictures a row that leave
    their last piece unfilled; more only where they are needed."""
    usual = rows * (tokens // PIECE + 2)
    return usual if needed <= usual else 1 << (needed - 1).bit_length()


def up_to(most: int, size: Callable[[int], int]) -> Iterator[int]:
    """Every size, as :func:`prompt` and its siblings make them, for 1 to ``most``."""
    n = 1
    while True:
        yield size(n)
        if size(n) >= most:
            return
        n = size(n) + 1
