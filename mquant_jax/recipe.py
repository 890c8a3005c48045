"""What is quantised and how: one frozen dataclass tree, JSON both ways.

A recipe is stored with every checkpoint and, with the model's config, is enough to rebuild the
shapes of all its tensors. Presets are in :data:`PRESETS`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError

SECTIONS = ("vision", "connector", "language", "head")
_CHOICES = {
    "w_bits": (4, 8, 16),
    "activations": ("static", "dynamic", "none"),
    "weight_method": ("gptq", "rtn"),
    "observer": ("minmax", "mse"),
}


@dataclasses.dataclass(frozen=True)
class Section:
    """How the dense layers of one part of the model are quantised.

    Attributes:
        w_bits: bits per weight; 16 leaves the weights in float.
        group_size: input columns that share a weight scale; ``None`` is per output channel.
        activations: ``static`` (calibrated int8 scales), ``dynamic`` (int8, scale per token found
            at run time) or ``none`` (float activations).
    """

    w_bits: int = 16
    group_size: int | None = None
    activations: str = "none"

    @property
    def quantised(self) -> bool:
        return self.w_bits < 16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How static scales are found.

    Attributes:
        observer: ``minmax``, or ``mse``: the clip with the least squared rounding error.
        max_samples: calibration samples used at most.
    """

    observer: str = "mse"
    max_samples: int = 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The whole plan.

    Attributes:
        name: the preset's name, or the user's.
        vision, connector, language, head: one :class:`Section` each. A tied head shares the token
            embedding, which is then quantised with it.
        weight_method: ``gptq``, or ``rtn``: round to nearest.
        weight_clip: search a per-channel clip of least squared error before rounding.
        modality_scales: one static scale per token class (MSQ, paper section 3.1) in the language
            model instead of one shared scale.
        rotate: fold norms and sign-randomised Hadamard rotations into the weights (paper section
            3.2), with an online rotation in front of every MLP's last layer.
        seed: of the rotations' signs.
        calibration: see :class:`Calibration`.
    """

    name: str = "float"
    vision: Section = Section()
    connector: Section = Section()
    language: Section = Section()
    head: Section = Section()
    weight_method: str = "rtn"
    weight_clip: bool = True
    modality_scales: bool = True
    rotate: bool = False
    seed: int = 0
    calibration: Calibration = Calibration()

    @property
    def rotation_seed(self) -> int | None:
        return self.seed if self.rotate else None

    def section(self, name: str) -> Section:
        return getattr(self, name)

    @property
    def changes_weights(self) -> bool:
        """Whether the checkpoint holds anything else than the source's tensors."""
        return self.rotate or any(
            s.quantised or s.activations != "none" for s in map(self.section, SECTIONS)
        )

    @property
    def needs_calibration(self) -> bool:
        parts = [self.section(s) for s in SECTIONS]
        gptq = self.weight_method == "gptq" and any(s.quantised for s in parts)
        return gptq or any(s.activations == "static" for s in parts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Build and check a recipe.

        Raises:
            UserError: an unknown key or value; the message names it and the allowed ones.
        """
        return _build(cls, data, origin)

    def table(self) -> str:
        """The plan as lines of text, one per section."""
        rows = ["section    weights  group  activations"]
        for name in SECTIONS:
            s = self.section(name)
            bits = f"int{s.w_bits}" if s.quantised else "float"
            rows.append(f"{name:<10} {bits:<8} {s.group_size or '-':<6} {s.activations}")
        how = f"weights by {self.weight_method}" if self.changes_weights else "as it was"
        turned = f", rotated (seed {self.seed})" if self.rotate else ", not rotated"
        rows.append(how + (turned if self.changes_weights else ""))
        return "\n".join(rows)


def _build(cls, data: Any, origin: str):
    if not isinstance(data, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise UserError(f"{origin}: unknown key {key!r}; known keys: {', '.join(fields)}")
    values = {}
    for key, value in data.items():
        default = fields[key].default
        where = f"{origin}.{key}"
        if dataclasses.is_dataclass(default):
            values[key] = _build(type(default), value, where)
        else:
            values[key] = _check(key, value, default, where)
    return cls(**values)


def _check(key: str, value: Any, default: Any, where: str):
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            allowed = ", ".join(map(repr, _CHOICES[key]))
            raise UserError(f"{where}: {value!r} is not one of {allowed}")
        return value
    if key == "group_size":
        good = value is None or (type(value) is int and value > 0)
        expected = "a positive integer or null"
    else:
        good = type(value) is type(default) and (not isinstance(value, int) or value >= 0)
        expected = type(default).__name__
    if not good:
        raise UserError(f"{where}: expected {expected}, found {value!r}")
    return value


def _uniform(name: str, section: Section, **changes) -> Recipe:
    return dataclasses.replace(
        Recipe(name=name, vision=section, connector=section, language=section), **changes
    )


_W4A8 = Section(4, None, "static")
_W8A8 = Section(8, None, "static")
# The head stays at 8 bits: it is small in compute, large in bytes read per generated token, and
# its errors go straight into the logits.
_MQUANT = {"head": _W8A8, "weight_method": "gptq", "rotate": True}
PRESETS: dict[str, Recipe] = {
    "float": Recipe(),
    "w4a8": _uniform("w4a8", _W4A8, **_MQUANT),
    "w4a8-v8": _uniform("w4a8-v8", _W4A8, vision=_W8A8, connector=_W8A8, **_MQUANT),
    "w4a8-rtn": _uniform("w4a8-rtn", _W4A8, head=_W8A8),
    "w4a8-dynamic": _uniform(
        "w4a8-dynamic",
        Section(4, None, "dynamic"),
        **(_MQUANT | {"head": Section(8, None, "dynamic")}),
    ),
    "w8a8": _uniform("w8a8", _W8A8, head=_W8A8, rotate=True),
    "w4a16": _uniform("w4a16", Section(4, None, "none"), weight_method="gptq"),
}


def resolve_recipe(name_or_path: str) -> Recipe:
    """A preset's name, or the path of a JSON file.

    Raises:
        UserError: neither; unreadable file; bad content.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"--recipe {name_or_path}: neither a preset ({', '.join(PRESETS)}) nor a JSON file"
        )
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    return Recipe.from_json(data, str(path))
