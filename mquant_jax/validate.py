"""Validate user input: text, counts, numbers, names and lists."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.errors import ImageError, UserError


def path(value: Any, name: str) -> Path:
    """
    Raises:
        UserError: neither text nor a path, or an impossible path.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise UserError(f"{name}: expected a path, found {kind(value)}")
    if "\0" in os.fspath(value):
        raise UserError(f"{name}: {shortened(value)}: a path cannot contain the character NUL")
    return Path(value)


def text(value: Any, name: str) -> str:
    """``value``, if it is a string that can be encoded as UTF-8.

    Raises:
        UserError: another type, or a lone surrogate, which tokenizers reject.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: expected text, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{name}: character {e.start} is {value[e.start]!a}, half of a surrogate pair; the "
            "text was decoded wrongly, decode it as UTF-8"
        ) from e
    return str(value)


def count(value: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """An integer of Python, NumPy or JAX as an ``int``.

    Raises:
        UserError: not an integer (booleans and whole floats are not), or outside ``least..most``.
    """
    wanted = f"expected a whole number, {_range(least, most)}"
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
        raise UserError(f"{name} is {value}; {wanted}")
    try:
        whole = operator.index(value)
    except TypeError as e:
        raise UserError(f"{name} is {shown(value)}; {wanted}") from e
    if whole < least or (most is not None and whole > most):
        raise UserError(f"{name} is {shown(whole)}; {wanted}")
    return whole


def number(value: Any, name: str, least: float = -math.inf) -> float:
    """A finite real number of Python, NumPy or JAX as a ``float``.

    Raises:
        UserError: another type (booleans and text included), NaN, infinite, or below ``least``.
    """
    array = getattr(value, "ndim", None) == 0 and getattr(value, "dtype", None) != np.bool_
    if isinstance(value, bool | np.bool_ | str) or not (isinstance(value, numbers.Real) or array):
        raise UserError(f"{name} is {shown(value)}; expected a number")
    try:
        real = float(value)
    except (OverflowError, TypeError, ValueError) as e:
        raise UserError(f"{name} is {shown(value)}; expected a number") from e
    if not math.isfinite(real):
        raise UserError(f"{name} is {real}; expected a finite number")
    if real < least:
        raise UserError(f"{name} is {real}; expected {least:g} or more")
    return real


def choice(value: Any, name: str, known: Sequence[str]) -> str:
    """``value``, if it is one of ``known``.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} is {shown(value)}; expected one of {', '.join(known)}")
    return value


def listed(items: Any, name: str, what: str, ndim: int) -> list[Any]:
    """The elements of a sequence (or iterable) of pictures, frames or clips.

    Args:
        what: name of the elements, for messages.
        ndim: minimum number of axes of an array with several elements.

    Raises:
        ImageError: a single picture, path or text, or not iterable.
    """
    if isinstance(items, list | tuple):
        return list(items)
    single = str | bytes | bytearray | memoryview | os.PathLike | Mapping | Set
    is_single = isinstance(items, single) or hasattr(items, "read")
    if is_single or getattr(items, "ndim", ndim) < ndim or not isinstance(items, Iterable):
        raise ImageError(
            f"{name}: expected a sequence of {what}, found {kind(items)}; put it in a list, and "
            "use [] for none"
        )
    return list(items)


def kind(value: Any) -> str:
    """The type of a value, and the shape of an array, for messages."""
    shape = getattr(value, "shape", None)
    if shape is None or getattr(value, "dtype", None) is None:
        return type(value).__name__
    return f"{value.dtype} {list(shape)}"


def shortened(value: Any, most: int = 120) -> str:
    """A path or another text for messages: printable, with the middle of long ones omitted."""
    shown = str(value)
    shown = shown if shown.isprintable() else ascii(shown)[1:-1]
    half = most // 2
    return shown if len(shown) <= most else f"{shown[:half]}...{shown[-half // 2 :]}"


def shown(value: Any) -> str:
    """A value for messages, shortened if it is long."""
    try:
        return shortened(repr(value), 80)
    except Exception:  # nested too deeply, an integer of too many digits, or a foreign __repr__
        return f"a {kind(value)}"


def _range(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else f"{least} to {most}"
