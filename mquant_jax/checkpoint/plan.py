"""The plan of a conversion: each of our tensors has a source, and each source is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mquant_jax.checkpoint.source import FLOAT_DTYPES, Reader
from mquant_jax.checkpoint.tensor_file import DTYPES
from mquant_jax.cli_support import warn
from mquant_jax.errors import UserError
from mquant_jax.lazy import Lazy
from mquant_jax.models.base import Config, Family, with_head
from mquant_jax.models.rules import WeightRule
from mquant_jax.validate import shown

_HEAD = "language/head/"
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read and where it goes.

    Attributes:
        config: the family's config, its ``language.tied_head`` according to the checkpoint.
        rules: the rules of all tensors of our model.
        names: source names in the rules -> names in the checkpoint.
    """

    config: Config
    rules: list[WeightRule]
    names: dict[str, str]

    @property
    def tied_head(self) -> bool:
        return self.config.language.tied_head

    def tensors(self, reader: Reader) -> dict[str, Lazy]:
        """Return all our tensors in their storage dtype, read on demand.

        Reading one raises a UserError if it holds NaN or Inf.
        """
        return {rule.dst: self._tensor(reader, rule) for rule in self.rules}

    def read(self, reader: Reader) -> dict[str, np.ndarray]:
        """Like :meth:`tensors`, in memory."""
        return {name: tensor.load() for name, tensor in self.tensors(reader).items()}

    def _tensor(self, reader: Reader, rule: WeightRule) -> Lazy:
        if rule.src not in self.names:
            values = np.asarray(rule.otherwise, np.float32).reshape(rule.src_shape)
            return Lazy.of(rule.apply(values))
        name = self.names[rule.src]
        dtype = DTYPES[reader.tensors[name].dtype]
        first, count = rule.run()

        def read(start: int | None, stop: int | None) -> np.ndarray:
            if count is None:  # scattered rows of the source, or columns
                return rule.apply(read_finite(reader, name))[start:stop]
            begin, end, _ = slice(start, stop).indices(count)
            rows = read_finite(reader, name, first + begin, first + end)
            return rows.reshape(end - begin, *rule.shape[1:])

        return Lazy(rule.shape, dtype, read)


def read_finite(
    reader: Reader, name: str, start: int | None = None, stop: int | None = None
) -> np.ndarray:
    """Read rows of one tensor, or all of it, and check them.

    Raises:
        UserError: it holds NaN or Inf.
    """
    values = reader.read(name, start, stop)
    if bad := count_not_finite(values):
        raise UserError(
            f"{reader.tensors[name].file}: tensor {name} holds {bad} NaN or Inf of "
            f"{values.size} values; the checkpoint is damaged"
        )
    return values


def count_not_finite(values: np.ndarray) -> int:
    """Count the values that are NaN or Inf."""
    if values.dtype == ml_dtypes.bfloat16:  # NumPy's isfinite is slow for this type
        exponent = values.view(np.uint16) & 0x7F80
        return int(np.count_nonzero(exponent == 0x7F80))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def read_config(family: Family, hf_config: dict[str, Any], folder: Path) -> Config:
    """Return the family's config object; warn of unknown keys.

    Raises:
        UserError: a key of config.json is missing or has an impossible value.
    """
    config = family.config_from_hf(hf_config)
    if unknown := family.unknown_keys(hf_config):
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        names = ", ".join(map(shown, unknown[:_SHOWN])) + more
        warn(f"{folder / 'config.json'}: ignored, because no {family.name} model is known "
             f"to have such keys: {names}", "config")  # fmt: skip
    return config


def plan(family: Family, config: Config, reader: Reader) -> Plan:
    """Match the family's rules with the tensors of a folder; only headers are read.

    A checkpoint without a head ties it to the embedding, whatever config.json says.

    Raises:
        UserError: tensors are missing, unused, of the wrong shape or not float; all are listed.
    """
    names = _canonical(family, reader)
    config = with_head(config, tied=False)
    rules = family.weight_rules(config)
    head = [r.src for r in rules if r.dst.startswith(_HEAD)]
    if not any(src in names for src in head):
        config = with_head(config, tied=True)
        rules = family.weight_rules(config)
    shapes = {r.src: r.src_shape for r in rules}
    optional = {r.src for r in rules if r.otherwise is not None}
    missing = sorted(set(shapes) - set(names) - optional)
    unplaced = sorted(
        n
        for src, n in names.items()
        if not (src in shapes or family.ignored(src) or family.unused(config, src))
    )
    wrong = [
        text
        for src, shape in shapes.items()
        if src in names and (text := _mismatch(reader, names[src], shape))
    ]
    if missing or unplaced or wrong:
        parts = (
            _listing("missing", missing),
            _listing("unexpected", unplaced),
            _listing("wrong", wrong),
        )
        raise UserError(
            f"{reader.folder}: the tensors do not fit config.json ({family.name}): "
            + "; ".join(p for p in parts if p)
        )
    return Plan(config, rules, names)


def _canonical(family: Family, reader: Reader) -> dict[str, str]:
    """Return the rules' names -> the checkpoint's names."""
    out: dict[str, str] = {}
    for name in reader.tensors:
        src = family.canonical_name(name)
        if src in out:
            raise UserError(f"{reader.folder}: {out[src]} and {name} are the same tensor ({src})")
        out[src] = name
    return out


def _mismatch(reader: Reader, name: str, shape: tuple[int, ...]) -> str | None:
    info = reader.tensors[name]
    if info.shape != tuple(shape):
        return f"{name} (expected shape {list(shape)}, found {shown(list(info.shape))})"
    if info.dtype not in FLOAT_DTYPES:
        return f"{name} (expected one of {'/'.join(FLOAT_DTYPES)}, found {info.dtype})"
    return None


def _listing(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {title}: {', '.join(items[:_SHOWN])}{more}"
