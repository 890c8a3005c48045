"""Preprocess pictures of one fixed square size: pixels, patches and rows of a vision input."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime.buckets import fine

# CLIP's colour normalisation, for values between 0 and 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def squeeze(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> np.ndarray:
    """Return an RGB picture of any shape as a normalised square: float32 ``[3, size, size]``."""
    x = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    x = (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def patchify(tiles: np.ndarray, patch: int) -> np.ndarray:
    """float32 ``[n, 3, S, S]`` -> ``[n, (S/patch)^2, 3 * patch^2]``, patches row by row."""
    n, channels, height, width = tiles.shape
    h, w = height // patch, width // patch
    x = tiles[:, :, : h * patch, : w * patch].reshape(n, channels, h, patch, w, patch)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(n, h * w, channels * patch * patch)


def pack_vision(patches: np.ndarray, side: int) -> VisionInput:
    """One row per square, padded to a bucket of rows.

    Args:
        patches: float32 ``[squares * side^2, patch_dim]``.
        side: patches along a square.
    """
    tiles = patches.reshape(-1, side * side, patches.shape[-1])
    rows = fine(len(tiles))
    out = np.zeros((rows, *tiles.shape[1:]), np.float32)
    out[: len(tiles)] = tiles
    valid = np.zeros((rows, side * side), bool)
    valid[: len(tiles)] = True
    coords = np.indices((side, side), np.int32).reshape(2, -1).T
    return VisionInput(out, np.broadcast_to(coords, (rows, *coords.shape)), valid)
