"""``rope_scaling`` and ``rope_parameters`` of a config.json -> base and scaling of positions.

They are the same object, which transformers 5 renamed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import theta
from mquant_jax.nn.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Scaling,
    YarnScaling,
    chunked,
    interleaved,
)
from mquant_jax.schema import Refused, Schema, choice, flag, inside, items, real, table, whole
from mquant_jax.validate import shown

NAMES = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"
FIELDS = {
    "rope_theta": theta(),
    _ORIGINAL: whole(None, 1, 2**30, null=True),
    **dict.fromkeys(NAMES, table(None, null=True)),
}
_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_KIND = choice(None, ("mrope", *_KINDS), null=True)
_FACTOR = real(None, 1.0, 1e6, null=True)
_TURNS = real(None, 0.0, 1e6, above=True, null=True)
_SCHEMA = Schema(
    {
        "rope_type": _KIND,
        "type": _KIND,
        "rope_theta": FIELDS["rope_theta"],
        "factor": _FACTOR,
        _ORIGINAL: FIELDS[_ORIGINAL],
        "low_freq_factor": _TURNS,
        "high_freq_factor": _TURNS,
        "beta_fast": _TURNS,
        "beta_slow": _TURNS,
        "attention_factor": real(None, 0.0, 1e3, above=True, null=True),
        "mscale": real(None, 0.0, 1e3, null=True),
        "mscale_all_dim": real(None, 0.0, 1e3, null=True),
        "truncate": flag(None),
        "mrope_section": items(whole(low=1, high=2048), None, 3, null=True),
        "mrope_interleaved": flag(None),
    },
    frozenset({"finetuned"}),
    {
        "partial_rotary_factor": Refused((1, 1.0)),
        "short_factor": Refused(reason="longrope is not supported"),
        "long_factor": Refused(reason="longrope is not supported"),
    },
)
# Keys of a single kind, which other kinds would ignore.
_OWN = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}


@dataclasses.dataclass(frozen=True)
class MRope:
    """How a family's tokens with three positions are rotated.

    Attributes:
        sections: rotary slots of each position stream where the config names none.
        streams: sections -> the stream of each slot.
    """

    sections: tuple[int, ...]
    streams: Callable[[tuple[int, ...]], tuple[int, ...]] = chunked


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a decoder.

    Attributes:
        theta: base.
        scaling: of the frequencies.
        max_positions: the context, in tokens.
        streams: position stream of each of the ``head_dim / 2`` slots.
    """

    theta: float
    scaling: Scaling | None
    max_positions: int
    streams: tuple[int, ...]


def read_rope(
    config: Mapping[str, Any],
    where: str,
    default_theta: float,
    head_dim: int,
    mrope: MRope | None = None,
) -> Rope:
    """Rotary positions from the typed keys :data:`FIELDS` and ``max_position_embeddings``.

    Args:
        where: the object that holds them, for messages.
        default_theta: base where the config names none.
        head_dim: channels that turn.
        mrope: ``mrope_section`` has a meaning, and ``mrope`` as a type means no scaling;
            ``None``: tokens have one position.

    Raises:
        UserError: an unsupported kind of scaling; keys that are contradictory, missing, or would
            be ignored.
    """
    name, values = _one_object(config, where)
    at = inside(where, name)
    for key in ("rope_theta", _ORIGINAL):
        values[key] = _agreed(at, key, values[key], config[key])
    base = values["rope_theta"] or default_theta
    kind = _kind(at, values, mrope is not None)
    _check_own(at, kind, values)
    streams = _streams(at, values, head_dim, mrope)
    context = config["max_position_embeddings"]
    scaling = _scaling(at, kind, values, context, base, head_dim)
    if isinstance(scaling, YarnScaling):
        context = max(context, round(scaling.original * scaling.factor))
    return Rope(base, scaling, min(context, 2**30), streams)


def _streams(
    at: str, values: Mapping[str, Any], head_dim: int, mrope: MRope | None
) -> tuple[int, ...]:
    """The position stream of each rotary slot.

    Raises:
        UserError: sections that do not fit the head, or an order of slots that the model has not.
    """
    takes_turns = mrope is not None and mrope.streams is interleaved
    if values["mrope_interleaved"] not in (None, takes_turns):
        raise UserError(f"{at}.mrope_interleaved {shown(values['mrope_interleaved'])}: this would "
                        "change the numbers and is not supported")  # fmt: skip
    if mrope is None:
        if values["mrope_section"]:
            raise UserError(f"{at}.mrope_section: this model has one position per token")
        return chunked((head_dim // 2,))
    sections = values["mrope_section"] or mrope.sections
    if sum(sections) != head_dim // 2:
        raise UserError(
            f"{at}.mrope_section is {list(sections)}; expected three numbers that add up to "
            f"head_dim/2 = {head_dim // 2}"
        )
    return mrope.streams(sections)


def _one_object(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the typed content of the object; if given twice, both must agree."""
    given = {name: _read(config[name], inside(where, name)) for name in NAMES if config[name]}
    name = next(iter(given), NAMES[0])
    values = _SCHEMA.read({}, where)
    for other in given.values():
        values = {key: _agreed(where, key, value, other[key]) for key, value in values.items()}
    return name, values


def _read(data: Mapping[str, Any], at: str) -> dict[str, Any]:
    if unknown := _SCHEMA.unknown(data):
        raise UserError(f"{inside(at, unknown[0])} is unknown and could change results; "
                        f"known: {', '.join(_SCHEMA.fields)}")  # fmt: skip
    return _SCHEMA.read(data, at)


def _agreed(where: str, key: str, first: Any, second: Any) -> Any:
    """Return the value, which may be given once or twice."""
    if first is not None and second is not None and first != second:
        raise UserError(f"{where}: {key} is given twice, as {shown(first)} and {shown(second)}; "
                        "remove the wrong one")  # fmt: skip
    return second if first is None else first


def _kind(at: str, values: Mapping[str, Any], mrope: bool) -> str:
    names = [values[key] for key in ("rope_type", "type") if values[key]]
    if mrope:  # "mrope" is the older name of M-RoPE without scaling
        names = [n for n in names if n not in ("mrope", "default")]
    if "mrope" in names:
        raise UserError(f"{at}: type 'mrope' is not supported for this model; "
                        f"known: {', '.join(_KINDS)}")  # fmt: skip
    if len(set(names)) > 1:
        raise UserError(f"{at}: rope_type is {names[0]!r} and type is {names[1]!r}; "
                        "remove the wrong one")  # fmt: skip
    return names[0] if names else "default"


def _check_own(at: str, kind: str, values: Mapping[str, Any]) -> None:
    """Raises:
    UserError: this kind would ignore a key.
    """
    foreign = [key for other, keys in _OWN.items() if other != kind for key in keys]
    if kind == "default" and values["factor"] not in (None, 1.0):
        foreign.append("factor")
    for key in foreign:
        if values[key] is not None:
            raise UserError(f"{at}.{key} has no meaning for rope type {kind!r}; "
                            "remove it, or set the type that it belongs to")  # fmt: skip


def _scaling(
    at: str, kind: str, values: Mapping[str, Any], context: int, base: float, dim: int
) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "yarn":
        return _yarn(at, values, context)
    factor = _needed(at, kind, values, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        if dim < 4:
            raise UserError(f"{at}: dynamic scaling needs 4 rotary channels, found {dim}")
        return DynamicScaling(factor, context)
    low, high = (_needed(at, kind, values, key) for key in _OWN["llama3"])
    if low >= high:
        raise UserError(f"{at}: low_freq_factor {low} and high_freq_factor {high} are invalid; "
                        "expected the first to be smaller")  # fmt: skip
    return Llama3Scaling(factor, low, high, values[_ORIGINAL] or context)


def _needed(at: str, kind: str, values: Mapping[str, Any], key: str) -> Any:
    if values[key] is None:
        raise UserError(f"{at}.{key} is missing; rope type {kind!r} needs it")
    return values[key]


def _yarn(at: str, values: Mapping[str, Any], context: int) -> YarnScaling:
    original = values[_ORIGINAL] or context
    factor = values["factor"]
    if factor is None and original == context:
        factor = _needed(at, "yarn", values, "factor")
    factor = factor or max(context / original, 1.0)
    fast, slow = values["beta_fast"] or 32.0, values["beta_slow"] or 1.0
    if slow >= fast:
        raise UserError(f"{at}: beta_fast {fast} and beta_slow {slow} are invalid; "
                        "expected the first to be larger")  # fmt: skip
    attention = values["attention_factor"]
    if attention is None:
        attention = _magnitude(factor)
        if values["mscale"] and values["mscale_all_dim"]:
            attention = _magnitude(factor, values["mscale"]) / _magnitude(
                factor, values["mscale_all_dim"]
            )
    truncate = values["truncate"] is not False
    return YarnScaling(factor, original, fast, slow, truncate, attention)


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """The paper's factor on queries and keys."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
