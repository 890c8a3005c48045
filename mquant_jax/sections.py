"""How dense layers are quantised: sections with defaults, and rules with exceptions.

A layer is named by its path with its index: ``language/layers/3/down_proj``, ``vision/merger/fc1``,
``language/head``. A rule's pattern is a glob on that path, or on the path without the index
(``language/layers/down_proj``): ``*`` matches any characters, including slashes, ``?`` matches one
and ``[...]`` one of several.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.recipe_fields import read
from mquant_jax.validate import shown

SECTIONS = ("vision", "connector", "language", "head", "embedding")
_NEAR = 3  # paths suggested in an error


@dataclasses.dataclass(frozen=True)
class Section:
    """How the dense layers of one part of the model are quantised.

    Attributes:
        w_bits: bits per weight; 16 leaves the weights in float.
        group_size: input columns per weight scale; ``None`` is one scale per output channel.
        activations: ``static`` (int8, calibrated scales), ``dynamic`` (int8, scale per token
            computed at run time) or ``none`` (float).
        dynamic_points: quantisation points (such as ``mlp_hidden``) that are dynamic in an
            otherwise static section.
    """

    w_bits: int = 16
    group_size: int | None = None
    activations: str = "none"
    dynamic_points: tuple[str, ...] = ()

    @property
    def quantised(self) -> bool:
        return self.w_bits < 16

    def mode(self, point: str) -> str:
        """Activation mode of a quantisation point, of any expert."""
        name = point.rpartition("/")[2]
        dynamic = self.activations == "static" and name in self.dynamic_points
        return "dynamic" if dynamic else self.activations

    def __str__(self) -> str:
        bits = f"int{self.w_bits}" if self.quantised else "float"
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{bits}{groups}, activations {self.activations}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception for some layers.

    Attributes:
        pattern: a glob on layer paths.
        changes: fields of :class:`Section` to change, and their values.
    """

    pattern: str
    changes: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, value: Any, origin: str = "recipe.rules") -> Rule:
        """A rule from ``[pattern, changes]``, or from an object with these two keys.

        Raises:
            UserError: not a rule, or an unknown key or value.
        """
        if isinstance(value, Rule):
            return value
        if isinstance(value, Mapping) and set(value) == {"pattern", "changes"}:
            value = value["pattern"], value["changes"]
        good = isinstance(value, list | tuple) and len(value) == 2
        if not (good and isinstance(value[0], str) and value[0] and value[1]):
            raise UserError(
                f'{origin}: expected [pattern, changes], such as ["language/layers/*/down_proj", '
                f'{{"w_bits": 8}}], found {shown(value)}'
            )
        changes = dict(value[1]) if isinstance(value[1], Mapping) else value[1]
        return cls(value[0], tuple(read(Section, changes, f"{origin} ({value[0]})").items()))

    def matches(self, path: str) -> bool:
        """Whether the rule applies to a layer."""
        spellings = path, without_number(path)
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in spellings)

    def applied(self, section: Section) -> Section:
        """The section with the changes."""
        return dataclasses.replace(section, **dict(self.changes))

    def to_json(self) -> list[Any]:
        return [self.pattern, dict(self.changes)]


def without_number(path: str) -> str:
    """A layer's path without its index."""
    return "/".join(part for part in path.split("/") if not part.isdigit())


def kind_of(path: str) -> str:
    """A layer's path with ``*`` for its index, shared by all equal layers."""
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))


def numbered(kind: str, path: str) -> str:
    """A kind with the index of a layer's path."""
    number = next((part for part in path.split("/") if part.isdigit()), "*")
    return kind.replace("*", number)


def section_name(path: str) -> str:
    """The section of a layer without rules."""
    if path in ("language/head", "language/embedding"):
        return path.removeprefix("language/")
    if path.startswith("language/"):
        return "language"
    return "vision" if path.startswith(("vision/patch_embed/", "vision/layers/")) else "connector"


def check_rules(rules: Iterable[Rule], sections: Mapping[str, Section]) -> None:
    """Check that every rule matches a layer, and that the layers of a stack are quantised alike.

    Args:
        sections: the section of every dense layer of a model, by path.

    Raises:
        UserError: a rule matches nothing (the message suggests similar paths); or layers of a
            stack would differ.
    """
    for rule in rules:
        if not any(map(rule.matches, sections)):
            kinds = sorted({kind_of(path) for path in sections})
            near = difflib.get_close_matches(kind_of(rule.pattern), kinds, _NEAR, cutoff=0.0)
            raise UserError(
                f"recipe: rule {rule.pattern!r} matches no layer of this model; "
                f"similar paths are {', '.join(near)}"
            )
    first: dict[str, str] = {}
    for path, section in sections.items():
        other = first.setdefault(kind_of(path), path)
        if sections[other] != section:
            raise UserError(
                f"recipe: rules quantise {path} ({section}) unlike {other} ({sections[other]}); "
                f"the layers of a stack must be alike, so use a pattern like {kind_of(path)}"
            )
