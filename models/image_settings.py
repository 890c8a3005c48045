"""Schemas of image preprocessing settings, for all families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.schema import Schema, flag, items, real, table, whole

# Pictures are scaled up to the smaller bound, or down to the larger one.
MOST_ENLARGED, MOST_PIXELS = 2**24, 2**26
MEAN = items(real(low=-10.0, high=10.0), None, 3, null=True)
STD = items(real(low=1e-4, high=1e4), None, 3, null=True)
_LEAST = whole(None, 1, MOST_ENLARGED, null=True)
_MOST = whole(None, 1, MOST_PIXELS, null=True)
_SIZE = Schema(
    {"shortest_edge": _LEAST, "longest_edge": _MOST, "min_pixels": _LEAST, "max_pixels": _MOST}
)
# Resized to a total number of pixels: Qwen2-VL.
AREA = Schema(
    {
        "do_resize": flag(True),
        "do_rescale": flag(True),
        "do_normalize": flag(True),
        "do_convert_rgb": flag(True),
        "rescale_factor": real(1 / 255, 0.0, 1.0, above=True),
        "resample": whole(3, 0, 5),
        "image_mean": MEAN,
        "image_std": STD,
        "size": table(None, null=True),
        "min_pixels": _LEAST,
        "max_pixels": _MOST,
        "patch_size": whole(14, 1, 256),
        "temporal_patch_size": whole(2, 1, 16),
        "merge_size": whole(2, 1, 16),
    }
)


def read_area(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read settings as transformers' image processors of this kind do; ``size`` in one form.

    Raises:
        UserError: a value of the wrong type or out of range, or contradictory bounds.
    """
    out = AREA.read(settings, str(path))
    size = _SIZE.read(out.pop("size") or {}, f"{path}: size")
    least, most = out.pop("min_pixels"), out.pop("max_pixels")
    least = least or size["shortest_edge"] or size["min_pixels"] or 56 * 56
    most = most or size["longest_edge"] or size["max_pixels"] or 28 * 28 * 1280
    if least > most:
        raise UserError(f"{path}: pictures of at least {least} and at most {most} pixels; expected "
                        "the first to be smaller")  # fmt: skip
    given = {key: value for key, value in out.items() if value is not None}
    return given | {"size": {"shortest_edge": least, "longest_edge": most}}


def agree(path: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the settings belong to a model with other patches.
    """
    for key, value in wanted.items():
        if settings[key] not in (None, value):
            raise UserError(f"{path}: {key} is {settings[key]}, the model's config has {value}")
