"""Check the types, choices and ranges of a recipe's JSON values."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.validate import shown

CHOICES = {
    "w_bits": (4, 8, 16),
    "bits": (4, 8, 16),
    "criterion": ("none", "paper", "measured"),
    "activations": ("static", "dynamic", "none"),
    "method": ("gptq", "rtn"),
    "inputs": ("quantised", "float"),
    "form": ("model", "block"),
    "observer": ("minmax", "percentile", "mse", "output"),
}
# Values outside these bounds are useless, and some would turn weights into NaN or zeros.
RANGES = {
    "group_size": (1, 2**20),
    "asymmetry": (0, 1),
    "refit": (0, 100),
    "visual_weight": (0, 1e3),
    "sink_weight": (0, 1e3),
    "prefix_sinks": (0, 64),
    "seed": (0, 2**32 - 1),
    "headroom": (0.5, 10),
    "max_samples": (1, 2**20),
    "epochs": (0, 1000),
    "rate": (0, 1),
    "act_rate": (0, 1),
}


def build(cls, data: Any, origin: str):
    """Build a dataclass from a JSON object; missing keys take their defaults.

    Raises:
        UserError: an unknown key or value; the message names it and the allowed ones.
    """
    return cls(**read(cls, data, origin))


def read(cls, data: Any, origin: str) -> dict[str, Any]:
    """Check a JSON object against a dataclass's fields; returns the values of the keys present.

    Raises:
        UserError: see :func:`build`.
    """
    if not isinstance(data, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise UserError(f"{origin}: unknown key {shown(key)}; known keys: {', '.join(fields)}")
    values = {}
    for key, value in data.items():
        default = fields[key].default
        where = f"{origin}.{key}"
        if dataclasses.is_dataclass(default):
            values[key] = build(type(default), value, where)
        else:
            values[key] = _check(key, value, default, where)
    return values


def _check(key: str, value: Any, default: Any, where: str):
    if key in CHOICES:
        if not any(type(value) is type(c) and value == c for c in CHOICES[key]):
            allowed = ", ".join(map(repr, CHOICES[key]))
            raise UserError(f"{where}: {shown(value)} is not one of {allowed}")
        return value
    if key == "group_size":
        good = value is None or (type(value) is int and value > 0)
        expected = "a positive integer or null"
    elif isinstance(default, tuple):
        good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        value, expected = tuple(value) if good else value, "a list of names"
    elif isinstance(default, float):
        good = type(value) in (int, float) and 0 <= value <= sys.float_info.max
        value, expected = float(value) if good else value, "a number, zero or more"
    else:
        good = type(value) is type(default) and (not isinstance(value, int) or value >= 0)
        expected = type(default).__name__
    if not good:
        raise UserError(f"{where}: expected {expected}, found {shown(value)}")
    _check_range(key, value, where)
    return value


def _check_range(key: str, value: Any, where: str) -> None:
    low, high = RANGES.get(key, (value, value))
    if value is not None and not low <= value <= high:
        raise UserError(f"{where}: expected {low:g} to {high:g}, found {shown(value)}")
