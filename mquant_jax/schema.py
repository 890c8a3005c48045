"""Typed reading of JSON objects by a schema.

A :class:`Schema` lists the keys that are read (type, range, default), keys without an effect here,
and unsupported keys, which would change results and are refused unless they have a neutral value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.validate import shown

REQUIRED: Any = object()  # the default of required fields
_MISMATCH: Any = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """Type and range of one key's value.

    Attributes:
        expected: type and range in words, for messages.
        convert: a JSON value -> the typed value, or ``_MISMATCH``.
        default: value of a missing key; :data:`REQUIRED`: the key must be present.
        null: whether ``null`` means the default.
    """

    expected: str
    convert: Callable[[Any, str], Any]
    default: Any = REQUIRED
    null: bool = False

    def read(self, value: Any, where: str) -> Any:
        """
        Raises:
            UserError: ``value`` has the wrong type or is out of range; the message starts with
                ``where``.
        """
        if value is None and self.null:
            return self.default
        out = self.convert(value, where)
        if out is _MISMATCH:
            raise UserError(f"{where} {shown(value)}: expected {self.expected}")
        return out


@dataclasses.dataclass(frozen=True)
class Refused:
    """An unsupported key.

    Attributes:
        neutral: values without an effect; ``None`` is always one.
        reason: why it is refused, and what to do.
    """

    neutral: tuple[Any, ...] = ()
    reason: str = "this would change results and is not supported"


@dataclasses.dataclass(frozen=True)
class Schema:
    """The keys of one JSON object.

    Attributes:
        fields: keys that are read.
        harmless: keys without an effect here.
        refused: unsupported keys; if another table lists the key as well, that table takes
            precedence.
    """

    fields: Mapping[str, Field]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, Refused] = dataclasses.field(default_factory=dict)

    def read(self, data: Any, where: str) -> dict[str, Any]:
        """All fields, typed, with defaults filled in.

        Args:
            data: the JSON value.
            where: the file and the object's key, for messages.

        Raises:
            UserError: not an object; a field of the wrong type or out of range; a missing required
                field; an unsupported key with a value that is not neutral.
        """
        data = self._object(data, where)
        for key, refused in self.refused.items():
            value = None if key in self.fields or key in self.harmless else data.get(key)
            if value is not None and not any(_same(value, n) for n in refused.neutral):
                raise UserError(f"{inside(where, key)} {shown(value)}: {refused.reason}")
        out = {}
        for key, field in self.fields.items():
            if key in data:
                out[key] = field.read(data[key], inside(where, key))
            elif field.default is REQUIRED:
                raise UserError(f"{inside(where, key)} is missing; expected {field.expected}")
            else:
                out[key] = field.default
        return out

    def __or__(self, other: Schema) -> Schema:
        """Merge two schemas; the other's fields take precedence."""
        return Schema(
            {**self.fields, **other.fields},
            self.harmless | other.harmless,
            {**self.refused, **other.refused},
        )

    def unknown(self, data: Mapping[str, Any]) -> list[str]:
        """Keys of ``data`` that the schema does not list."""
        known = self.harmless.union(self.fields, self.refused)
        return [key for key in data if key not in known]

    def _object(self, data: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(data, Mapping):
            raise UserError(f"{where} {shown(data)}: expected an object")
        return data


def inside(where: str, key: str) -> str:
    """The path of ``key`` in the object ``where``: ``config.json: vision_config.depth``."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells booleans from numbers."""
    return value == neutral and (isinstance(value, bool) == isinstance(neutral, bool))


def whole(
    default: Any = REQUIRED, low: int = 0, high: int = 2**31 - 1, null: bool = False
) -> Field:
    """An integer in ``low .. high``."""

    def convert(value: Any, where: str) -> Any:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return value if good else _MISMATCH

    return Field(f"a whole number from {low} to {high}", convert, default, null)


def real(
    default: Any = REQUIRED,
    low: float = 0.0,
    high: float = 1e12,
    above: bool = False,
    null: bool = False,
) -> Field:
    """A finite number in ``low .. high``; ``above``: ``low`` itself is excluded."""

    def convert(value: Any, where: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return _MISMATCH
        good = low <= value <= high and not (above and value == low)  # NaN compares false
        return float(value) if good else _MISMATCH

    bound = f"above {low:g}" if above else f"from {low:g}"
    return Field(f"a number {bound} to {high:g}", convert, default, null)


def flag(default: Any = REQUIRED) -> Field:
    """``true`` or ``false``; ``null`` is the default."""

    def convert(value: Any, where: str) -> Any:
        return value if isinstance(value, bool) else _MISMATCH

    return Field("true or false", convert, default, null=True)


def text(default: Any = REQUIRED, null: bool = False) -> Field:
    """Any string."""

    def convert(value: Any, where: str) -> Any:
        return value if isinstance(value, str) else _MISMATCH

    return Field("a text", convert, default, null)


def choice(default: Any, known: Iterable[str], null: bool = False) -> Field:
    """One of some strings."""
    names = tuple(known)

    def convert(value: Any, where: str) -> Any:
        if isinstance(value, str) and value not in names:
            raise UserError(f"{where} {shown(value)} is not supported; known: {', '.join(names)}")
        return value if isinstance(value, str) else _MISMATCH

    return Field(f"one of {', '.join(names)}", convert, default, null)


def square(default: Any = REQUIRED, low: int = 1, high: int = 2**16) -> Field:
    """A square's side, given as one number or as two equal ones."""
    one = whole(low=low, high=high)

    def convert(value: Any, where: str) -> Any:
        if not isinstance(value, list | tuple):
            return one.read(value, where)
        if len(value) != 2 or value[0] != value[1]:
            raise UserError(f"{where} {shown(value)} is not square; expected two equal numbers")
        return one.read(value[0], where)

    return Field(f"a square's side, {one.expected}", convert, default)


def items(
    of: Field, default: Any = REQUIRED, length: int | None = None, null: bool = False
) -> Field:
    """A list of values of one field, as a tuple; ``length``: its exact length."""
    count = "a list" if length is None else f"a list of {length}"

    def convert(value: Any, where: str) -> Any:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return _MISMATCH
        return tuple(of.read(item, f"{where}[{i}]") for i, item in enumerate(value))

    return Field(f"{count}, each {of.expected}", convert, default, null)


def table(default: Any = REQUIRED, null: bool = False) -> Field:
    """An object, to be read with its own schema."""

    def convert(value: Any, where: str) -> Any:
        return value if isinstance(value, Mapping) else _MISMATCH

    return Field("an object", convert, default, null)


def token_ids(default: Any = (), high: int = 2**31 - 1) -> Field:
    """Token ids, given as one number or a list, as a tuple; ``null`` is the default."""
    one = whole(low=0, high=high)

    def convert(value: Any, where: str) -> Any:
        if isinstance(value, list | tuple):
            return tuple(one.read(v, f"{where}[{i}]") for i, v in enumerate(value))
        return (one.read(value, where),)

    return Field(f"a token id or a list of them, each {one.expected}", convert, default, null=True)
