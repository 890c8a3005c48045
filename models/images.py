"""Pictures as callers give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mquant_jax.errors import UserError


def load_image(image: Any, name: str) -> Image.Image:
    """An RGB picture from a PIL image, a uint8 ``[H, W, 3]`` array or a path.

    Raises:
        UserError: no such file, not an image, or an array of another form; the message names it.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise UserError(f"{image}: no such file ({name})")
        try:
            with Image.open(image) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"{image}: not a readable image ({name}): {e}") from e
    dtype, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or shape[-1] != 3 or 0 in shape:
        found = f"{dtype} {list(shape)}" if dtype is not None else type(image).__name__
        raise UserError(
            f"{name}: expected a PIL image, a path or a uint8 [H, W, 3] array, found {found}"
        )
    return Image.fromarray(np.ascontiguousarray(image))
