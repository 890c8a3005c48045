"""Cut a picture of any shape into square tiles and a thumbnail, normalised (NumPy and PIL only)."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How pictures are cut into tiles.

    Attributes:
        size: side of a tile in pixels.
        least, most: number of tiles of a picture, not counting the thumbnail.
        thumbnail: whether the whole picture follows its tiles, if there are several.
        mean, std: colour normalisation, for values between 0 and 1.
    """

    size: int
    least: int
    most: int
    thumbnail: bool
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of tiles: the aspect ratio nearest to the picture's.

        Of equally near ones, a larger one is chosen if the picture has more than half its pixels.
        """
        shapes = [
            (cols, rows)
            for cols in range(1, self.most + 1)
            for rows in range(1, self.most + 1)
            if self.least <= cols * rows <= self.most
        ]
        best, least = (1, 1), float("inf")
        for cols, rows in sorted(shapes, key=_area):
            difference = abs(width / height - cols / rows)
            enough = width * height > 0.5 * self.size**2 * cols * rows
            if difference < least or (difference == least and enough):
                best, least = (cols, rows), difference
        return best

    def whole(self) -> Tiling:
        """Pictures in one tile each."""
        return dataclasses.replace(self, least=1, most=1)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return RGB tiles, row by row, and the thumbnail."""
        size = self.size
        cols, rows = self.grid(*image.size)
        whole = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
        tiles = [
            whole.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
            for y in range(rows)
            for x in range(cols)
        ]
        if self.thumbnail and len(tiles) > 1:
            tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
        return tiles

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return float32 ``[tiles, 3, size, size]`` of an RGB picture."""
        tiles = np.stack([np.asarray(tile, np.uint8) for tile in self.cut(image)])
        x = (tiles / 255).astype(np.float32) - np.asarray(self.mean, np.float32)
        scaled = x / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _area(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
