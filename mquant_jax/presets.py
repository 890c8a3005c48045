"""Named recipes: presets for users, and methods for comparison."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, read_json
from mquant_jax.recipe import Calibration, Recipe, Section, Tuning, Weights


def _uniform(name: str, section: Section, **changes) -> Recipe:
    return dataclasses.replace(
        Recipe(name=name, vision=section, connector=section, language=section), **changes
    )


_W4A8 = Section(4, None, "static")
_W8A8 = Section(8, None, "static")
_GPTQ = Weights(method="gptq")
# The head stays at 8 bits. It takes little compute but many bytes per generated token, and its
# errors directly affect the logits.
_MQUANT = {
    "head": _W8A8,
    "weights": _GPTQ,
    "balance": True,
    "rotate": True,
    "sink_class": True,
    "calibration": Calibration(headroom=1.1),
}

PRESETS: dict[str, Recipe] = {
    "float": Recipe(),
    "w4a8": _uniform("w4a8", _W4A8, **_MQUANT),
    # Needs the float and the quantised language model in memory, and computes gradients.
    "w4a8-tuned": _uniform("w4a8-tuned", _W4A8, tune=Tuning(epochs=2), **_MQUANT),
    "w4a8-v8": _uniform("w4a8-v8", _W4A8, vision=_W8A8, connector=_W8A8, **_MQUANT),
    "w4a8-rtn": _uniform("w4a8-rtn", _W4A8, head=_W8A8),
    "w4a8-dynamic": _uniform(
        "w4a8-dynamic",
        Section(4, None, "dynamic"),
        **(_MQUANT | {"head": Section(8, None, "dynamic")}),
    ),
    "w8a8": _uniform("w8a8", _W8A8, head=_W8A8, rotate=True, sink_class=True),
    "w4a16": _uniform("w4a16", Section(4, None, "none"), weights=_GPTQ),
}

_RTN = _uniform("rtn", _W4A8, head=_W8A8, weights=Weights(clip=False), modality_scales=False)
# Methods under their names in the literature, all W4A8 and static; ``mquant`` uses everything.
METHODS: dict[str, Recipe] = {
    "rtn": _RTN,
    "smoothquant": dataclasses.replace(_RTN, name="smoothquant", smooth=True),
    "quarot": dataclasses.replace(_RTN, name="quarot", weights=_GPTQ, rotate=True),
    "mquant": dataclasses.replace(PRESETS["w4a8-tuned"], name="mquant"),
}
RECIPES = PRESETS | METHODS


def resolve_recipe(name_or_path: str) -> Recipe:
    """The recipe of a preset's name, or in a JSON file.

    Raises:
        UserError: neither a preset nor a file; the file is unreadable or invalid.
    """
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]
    path = Path(name_or_path)
    if not is_file(path):
        raise UserError(
            f"--recipe {name_or_path}: neither a preset ({', '.join(RECIPES)}) nor a JSON file"
        )
    return Recipe.from_json(read_json(path), str(path))
