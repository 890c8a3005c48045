"""Cut a picture into a small overview and slices of its own shape (NumPy and PIL only)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Slicing:
    """How pictures are cut into slices. Sizes are ``(width, height)``.

    Attributes:
        size: side in pixels of a square with about the area of a slice.
        patch: side of a patch; all sides are multiples of it.
        most: maximum number of slices, besides the overview.
        mean, std: colour normalisation, for values between 0 and 1.
    """

    size: int
    patch: int
    most: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def grid(self, width: int, height: int) -> tuple[int, int] | None:
        """Columns and rows of slices; ``None`` if the overview is enough.

        Among arrangements of about as many slices as the area needs, this is the one nearest to the
        picture's aspect ratio (in the logarithm). Ties go to fewer slices, then fewer columns.
        """
        wanted = min(math.ceil(width * height / self.size**2), self.most)
        if wanted <= 1:
            return None
        counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= self.most]
        grids = [(c, n // c) for n in counts for c in range(1, n + 1) if n % c == 0]
        shape = math.log(width / height)
        errors = [abs(shape - math.log(cols / rows)) for cols, rows in grids]
        return grids[errors.index(min(errors))]

    def fit(self, width: float, height: float, enlarge: bool) -> Size:
        """The size of this aspect ratio with about a slice's area, or less without ``enlarge``."""
        if width * height > self.size**2 or enlarge:
            ratio = width / height
            height = int(self.size / math.sqrt(ratio))
            width = int(height * ratio)
        return self._whole_patches(width), self._whole_patches(height)

    def _whole_patches(self, side: float) -> int:
        return max(round(side / self.patch) * self.patch, self.patch)

    def plan(self, width: int, height: int) -> tuple[Size, Size | None, Size | None]:
        """Size of the overview; grid and size of the slices, if any."""
        grid = self.grid(width, height)
        if grid is None:
            return self.fit(width, height, enlarge=True), None, None
        wide, high = (
            max(round(side / n) * n, n) / n for side, n in zip((width, height), grid, strict=True)
        )
        return self.fit(width, height, enlarge=False), grid, self.fit(wide, high, enlarge=True)

    def cut(self, image: Image.Image) -> tuple[list[Image.Image], Size | None]:
        """RGB pictures, the overview and then slices row by row; and the grid."""
        whole, grid, size = self.plan(*image.size)
        out = [image.resize(whole, Image.Resampling.BICUBIC)]
        if grid is None or size is None:
            return out, None
        (cols, rows), (w, h) = grid, size
        large = image.resize((cols * w, rows * h), Image.Resampling.BICUBIC)
        for y in range(rows):
            for x in range(cols):
                out.append(large.crop((x * w, y * h, (x + 1) * w, (y + 1) * h)))
        return out, grid

    def patches(self, image: Image.Image) -> tuple[np.ndarray, Size]:
        """float32 ``[h * w, 3 * patch^2]`` of one slice, patches row by row, and ``(h, w)``."""
        x = np.asarray(image, np.uint8).astype(np.float32) / 255
        x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        p, (height, width, channels) = self.patch, x.shape
        h, w = height // p, width // p
        x = x.reshape(h, p, w, p, channels).transpose(0, 2, 4, 1, 3)
        return np.ascontiguousarray(x).reshape(h * w, channels * p * p), (h, w)
