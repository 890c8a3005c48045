"""Preprocess pictures to the tower's square size, with transformers' image processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mquant_jax.errors import ImageError, UserError
from mquant_jax.models import image_settings
from mquant_jax.models.chat import import_transformers
from mquant_jax.models.llava.config import CLIP, DINOV2, SIGLIP, LlavaConfig
from mquant_jax.schema import Field, Schema, flag, real, whole
from mquant_jax.validate import shown

# A tower's default processor, if the folder names none.
_KINDS = {CLIP: "CLIPImageProcessor", SIGLIP: "SiglipImageProcessor", DINOV2: "BitImageProcessor"}
_KNOWN = (*_KINDS.values(), "LlavaImageProcessor")
_SIDE = whole(None, 1, 2**13, null=True)
_SIZE = Schema({"shortest_edge": _SIDE, "height": _SIDE, "width": _SIDE})


def _size(square: bool) -> Field:
    """A size as an object or, in older files, as one number."""

    def convert(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {k: v for k, v in _SIZE.read(value, where).items() if v is not None}
        side = _SIDE.read(value, where)
        return {"height": side, "width": side} if square else {"shortest_edge": side}

    return Field("a size in pixels", convert, None, null=True)


_SETTINGS = Schema(
    {
        "do_resize": flag(True),
        "do_center_crop": flag(None),
        "do_rescale": flag(True),
        "do_normalize": flag(True),
        "do_convert_rgb": flag(True),
        "do_pad": flag(False),
        "rescale_factor": real(1 / 255, 0.0, 1.0, above=True),
        "resample": whole(3, 0, 5),
        "image_mean": image_settings.MEAN,
        "image_std": image_settings.STD,
        "size": _size(square=False),
        "crop_size": _size(square=True),
    }
)


class SquarePictures:
    """Resizes, crops and normalises pictures to the tower's size.

    Args:
        settings: contents of preprocessor_config.json, or empty.
        path: that file, for messages.
        config: the model's config.

    Raises:
        UserError: settings of the wrong type, out of range, or of an unknown processor.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path, config: LlavaConfig):
        self.path, self.side = path, config.image_size
        kind = _kind(settings, path, config.tower)
        read = _SETTINGS.read(settings, str(path))
        whole_square, crops = {"height": self.side, "width": self.side}, kind != _KINDS[SIGLIP]
        read["size"] = read["size"] or ({"shortest_edge": self.side} if crops else whole_square)
        read["crop_size"] = read["crop_size"] or whole_square
        _check_size(read["size"], f"{path}: size", {"shortest_edge"}, set(whole_square))
        _check_size(read["crop_size"], f"{path}: crop_size", set(whole_square))
        self.pads = read["do_pad"] and kind == _KNOWN[-1]
        self.shortest = read["size"].get("shortest_edge") if read["do_resize"] else None
        # Leave out unset values: transformers would take null as a value. In other processors,
        # do_pad means another kind of padding.
        read["do_pad"] = True if self.pads else None
        read["crop_size"] = read["crop_size"] if crops or read["do_center_crop"] else None
        given = {key: value for key, value in read.items() if value is not None}
        self.processor = getattr(import_transformers(), f"{kind}Pil")(**given)

    def pixels(self, image: Image.Image, name: str) -> np.ndarray:
        """Return float32 ``[3, side, side]`` of an RGB picture.

        Raises:
            ImageError: the picture is too long and narrow to resize.
            UserError: the settings give pictures of another size than the tower's.
        """
        self._check_shape(image, name)
        out = self.processor(images=[image], return_tensors="np")["pixel_values"][0]
        if out.shape != (3, self.side, self.side):
            raise UserError(f"{self.path}: resizes {name} to {out.shape[2]} x {out.shape[1]} "
                            f"pixels; config.json has {self.side} x {self.side}, and "
                            "other sizes are not supported")  # fmt: skip
        return np.asarray(out, np.float32)

    def _check_shape(self, image: Image.Image, name: str) -> None:
        """Refuse pictures for which an intermediate step would be enormous."""
        short, long = sorted(image.size)
        pixels = long * long if self.pads else 0
        if self.shortest and not self.pads:
            pixels = self.shortest * (self.shortest * long // short)
        if pixels > image_settings.MOST_PIXELS:
            raise ImageError(f"{name}: {image.size[0]} x {image.size[1]} pixels would be resized "
                             f"to {pixels}; expected at most {image_settings.MOST_PIXELS}, crop "
                             "the picture first")  # fmt: skip


def _kind(settings: Mapping[str, Any], path: Path, tower: str) -> str:
    """The name of the image processor, without its speed suffix.

    Raises:
        UserError: an unknown image processor.
    """
    found = settings.get("image_processor_type")
    if found is None:
        return _KINDS[tower]
    if not isinstance(found, str) or (name := found.removesuffix("Fast")) not in _KNOWN:
        raise UserError(f"{path}: image_processor_type {shown(found)} is not supported; known: "
                        f"{', '.join(_KNOWN)}")  # fmt: skip
    return name


def _check_size(size: Mapping[str, int], where: str, *forms: set[str]) -> None:
    """
    Raises:
        UserError: the size has none of the accepted forms.
    """
    if set(size) not in forms:
        known = " or ".join(" and ".join(sorted(form)) for form in forms)
        raise UserError(f"{where} {shown(size)}: expected {known}")
