"""Qwen3-VL: chats and pictures in, token ids and patches out, as Qwen2-VL's but for clips.

A clip's budget of pixels is for all of its frames, and each of its temporal patches is a picture
with the time in front.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.models import chat_files
from mquant_jax.models.chat import import_transformers
from mquant_jax.models.qwen2_vl.processor import (
    END,
    PLACED,
    PLACEHOLDERS,
    START,
    Picture,
    Qwen2VLProcessor,
)
from mquant_jax.schema import Schema, flag, whole

# What transformers' video processor takes where no file says otherwise.
_DEFAULTS = {
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
}
_CAP = Schema({"cap_pixels_per_frame": flag(False), "max_video_tokens": whole(768, 1, 2**20)})
_NARROWEST = 200  # longer side to shorter side


class Qwen3VLProcessor(Qwen2VLProcessor):
    """From pictures and text to a ``Batch``, and from tokens back to text; see
    :class:`Qwen2VLProcessor`."""

    SYSTEM = None

    @functools.cached_property
    def _clip_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """How frames are prepared, and what bounds a single one of them."""
        path, settings = self.video_settings
        if not settings:
            path, settings = chat_files.image_settings(self.folder)
        return self.area(path, _DEFAULTS | settings), _CAP.read(settings, str(path))

    @functools.cached_property
    def video_processor(self):
        """The image processor for frames that have their final size."""
        settings, _ = self._clip_settings
        return import_transformers().Qwen2VLImageProcessorPil(**settings | {"do_resize": False})

    def sized(self, frames: list[Image.Image]) -> list[Image.Image]:
        """A clip's frames in the size that the number of them leaves.

        Raises:
            UserError: a side is more than 200 times the other.
        """
        settings, cap = self._clip_settings
        if not settings["do_resize"]:
            return frames
        unit = self.config.patch_size * self.config.merge_size
        least, most = (settings["size"][k] for k in ("shortest_edge", "longest_edge"))
        if cap["cap_pixels_per_frame"]:
            one = min(cap["max_video_tokens"] * unit**2, most // len(frames))
            most = max(one, int(1.05 * least)) * len(frames)
        width, height = frames[0].size
        slots = self.config.temporal_patch_size
        size = clip_size(len(frames), height, width, unit, slots, least, most)
        resample = Image.Resampling(settings["resample"])
        return [frame.resize(size[::-1], resample) for frame in frames]

    def timed(
        self, text: str, clips: list[Picture], frames: Sequence[int]
    ) -> tuple[str, list[Picture]]:
        """A rendered chat, and the temporal patches of its clips, each with a placeholder."""
        video = PLACEHOLDERS["video"]
        self.check_made(text.count(video), "video", clips)
        groups = iter(
            "".join(f"<{time:.1f} seconds>{START}{video}{END}" for time in self._times(count))
            for count in frames
        )
        text = PLACED.sub(lambda m: next(groups) if m[1] == "video" else m[0], text)
        pictures: list[Picture] = []
        for (count, h, w), patches, seconds in clips:
            pictures += [((1, h, w), part, seconds) for part in np.split(patches, count)]
        return text, pictures

    def _times(self, frames: int) -> Iterator[float]:
        """Seconds of the middle of each temporal patch, whose last frame may stand repeated."""
        slots = self.config.temporal_patch_size
        step = self.seconds_per_grid / slots
        for first in range(0, frames, slots):
            last = min(first + slots, frames) - 1
            yield (first * step + last * step) / 2


def clip_size(
    frames: int, height: int, width: int, unit: int, slots: int, least: int, most: int
) -> tuple[int, int]:
    """Height and width of a resized clip, multiples of ``unit``.

    Args:
        frames: how many.
        unit: pixels along a merged token.
        slots: frames of a temporal patch.
        least, most: pixels of all frames together.

    Raises:
        UserError: a side is more than 200 times the other.
    """
    if min(height, width) < unit:
        scale = unit / min(height, width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > _NARROWEST * min(height, width):
        raise UserError(f"a clip's frames have {width} x {height} pixels; expected sides of which "
                        f"none is more than {_NARROWEST} times the other")  # fmt: skip
    frames = max(frames, slots)
    sides = [round(side / unit) * unit for side in (height, width)]
    pixels = round(frames / slots) * slots * sides[0] * sides[1]
    if pixels > most:
        shrink = math.sqrt(frames * height * width / most)
        sides = [max(unit, math.floor(s / shrink / unit) * unit) for s in (height, width)]
    elif pixels < least:
        grow = math.sqrt(least / (frames * height * width))
        sides = [math.ceil(s * grow / unit) * unit for s in (height, width)]
    return sides[0], sides[1]
