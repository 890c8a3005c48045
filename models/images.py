"""Decode callers' pictures to 8-bit RGB.

Files are opened by content, and only in one of :data:`FORMATS`, because Pillow passes some formats
to other programs (EPS to Ghostscript), whatever the file's name.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mquant_jax.errors import ImageError
from mquant_jax.validate import kind, listed, shortened

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_EXPECTED = (
    "a PIL image, a path, the bytes of a picture, a binary file, a data: URL, or an array "
    "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8 or of floats in 0..1"
)
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_MOST_BYTES = 1 << 30  # bytes of one encoded picture
# The inverse of each value of the EXIF tag Orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # premultiplied modes, and what they convert to
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
# Pillow scales grey PNGs with few bits to 8, but not the transparent grey in tRNS.
_PNG_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}


def load_encoded(url: str, name: str, most_pixels: int) -> Image.Image:
    """:func:`load_image` for an untrusted ``data:`` URL, with bounded size.

    Args:
        most_pixels: maximum number of pixels; larger pictures are not decoded.

    Raises:
        ImageError: another URL or a path; not a picture; too many pixels.
    """
    label = f"{shortened(url, 40)} ({name})"
    if url[:5].lower() != "data:":
        raise ImageError(f"{label}: only data: URLs are accepted, nothing is downloaded; send "
                         "data:image/png;base64,...")  # fmt: skip
    return _opened(io.BytesIO(_url_bytes(url, name)), label, most_pixels)


def load_image(image: Any, name: str) -> Image.Image:
    """An upright 8-bit RGB picture; of an animation, the first frame.

    Transparency is composited on white. Grey values of 9 to 16 bits keep their high 8 bits
    (transformers clips them to white). The EXIF orientation is also applied to PIL images.

    Args:
        image: a PIL image, a path, the bytes of a picture, a binary file, a ``data:`` URL, or an
            array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]``, uint8 or float in 0..1.
        name: its name in error messages.

    Raises:
        ImageError: no such file, not one of :data:`FORMATS`, damaged, or values of unknown range;
            the message names it.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, name)
    if isinstance(image, str) and image[:5].lower() == "data:":
        return _opened(io.BytesIO(_url_bytes(image, name)), f"{shortened(image, 40)} ({name})")
    if isinstance(image, str | os.PathLike):
        label = f"{shortened(os.fspath(image))} ({name})"
        with _regular_file(image, name) as file:
            return _opened(file, label)
    if isinstance(image, bytes | bytearray | memoryview):
        return _opened(io.BytesIO(image), name)
    if callable(getattr(image, "read", None)):
        return _opened(io.BytesIO(_file_bytes(image, name)), name)
    return _rgb(Image.fromarray(_pixels(image, name)), name)


def load_frames(video: Any, name: str) -> list[Image.Image]:
    """The frames of a clip as upright RGB pictures.

    Args:
        video: a list, another iterable, or an array ``[frames, H, W, channels]``.
        name: its name in error messages.

    Raises:
        ImageError: not a sequence of frames, an empty one, or a frame cannot be read.
    """
    frames = listed(video, name, "frames", ndim=4)
    if not frames:
        raise ImageError(f"{name}: expected a sequence of frames, at least one")
    return [load_image(frame, f"{name}, frame {i}") for i, frame in enumerate(frames)]


@contextlib.contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Turn all exceptions into one, because decoders of damaged data raise almost any type.

    Only Pillow's own work and reads of the caller's file belong inside.

    Raises:
        ImageError: instead of any other exception.
    """
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as e:
        known = ", ".join(FORMATS)
        raise ImageError(f"{label}: not a readable image; expected one of {known}") from e
    except Exception as e:
        what = shortened(e) or type(e).__name__
        raise ImageError(f"{label}: not a readable image: {what}") from e


def _opened(file: BinaryIO, label: str, most_pixels: int | None = None) -> Image.Image:
    with _decoding(label):
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is optional
        with Image.open(file, formats=known) as image:
            if most_pixels is not None and (pixels := image.width * image.height) > most_pixels:
                raise ImageError(
                    f"{label}: {image.width} x {image.height} are {pixels} pixels; expected "
                    f"at most {most_pixels}, send a smaller picture"
                )
            return _rgb(image, label)


def _regular_file(path: str | os.PathLike, name: str) -> BinaryIO:
    """Open a file; reading a device or a FIFO might never end.

    Raises:
        ImageError: no such file, not a regular file, or a URL.
    """
    label = shortened(os.fspath(path))
    if isinstance(path, str) and _URL.match(path):
        raise ImageError(f"{label}: URLs are not downloaded ({name}); save the picture and give "
                         "its path")  # fmt: skip
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
        if is_file:
            return open(path, "rb")
    except FileNotFoundError as e:
        raise ImageError(f"{label}: no such file ({name})") from e
    except (OSError, ValueError) as e:  # names that are too long or contain a NUL
        why = getattr(e, "strerror", None) or e
        raise ImageError(f"{label}: cannot be opened ({name}): {why}") from e
    raise ImageError(f"{label}: not a regular file ({name}); expected a picture")


def _file_bytes(file: Any, name: str) -> bytes:
    with _decoding(name):
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        data = file.read(_MOST_BYTES + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: the file returns {type(data).__name__}; open it in binary mode")
    if len(data) > _MOST_BYTES:
        raise ImageError(f"{name}: the file is larger than {_MOST_BYTES >> 30} GiB")
    return data


def _url_bytes(url: str, name: str) -> bytes:
    """Return the content of a ``data:`` URL; its media type is ignored."""
    header, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if header.lower().endswith(";base64"):
            body = urllib.parse.unquote(body)
            return base64.b64decode("".join(body.split()), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as e:
        raise ImageError(f"{shortened(url, 40)} ({name}): not a data: URL of a picture: {e}; "
                         "expected data:image/png;base64,...") from e  # fmt: skip


def _pixels(image: Any, name: str) -> np.ndarray:
    """Convert an array of any library to uint8 ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``."""
    with _decoding(name):
        x = np.asarray(image) if hasattr(image, "__array__") else np.zeros(())
    shape, floats = x.shape, jnp.issubdtype(x.dtype, jnp.floating)
    channels = shape[2:] in ((), (1,), (3,), (4,))
    if not (floats or x.dtype == np.uint8) or len(shape) < 2 or not channels or 0 in shape:
        raise ImageError(f"{name}: expected {_EXPECTED}, found {kind(image)}")
    if floats:
        dtype = x.dtype
        x = x.astype(np.float64)
        if not (x.min() >= 0 and x.max() <= 1):  # false for NaN
            raise ImageError(f"{name}: expected floats in 0..1, found {dtype} from {x.min():.4g} "
                             f"to {x.max():.4g}; scale them, or give uint8")  # fmt: skip
        x = np.rint(255 * x).astype(np.uint8)
    return np.ascontiguousarray(x[..., 0] if shape[2:] == (1,) else x)


def _rgb(image: Image.Image, label: str) -> Image.Image:
    if image.format == "EPS" and getattr(image, "tile", None):
        raise ImageError(f"{label}: EPS is not supported, it runs another program; use PNG")
    with _decoding(label):
        key = _transparent_key(image)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bits(image, label)
        elif key != image.info.get("transparency"):
            image = image.copy()
            image.info["transparency"] = key
        image = image.convert(_STRAIGHT.get(image.mode, image.mode))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF tag; damaged EXIF data is ignored, as in viewers."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _transparent_key(image: Image.Image) -> Any:
    """Return the transparent colour at 8 bits; a file may declare it at another depth."""
    key, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG":
        return key
    if isinstance(key, int) and tile and tile[0].args in _PNG_GREY_STEPS:
        return key * _PNG_GREY_STEPS[tile[0].args]
    if isinstance(key, tuple) and max(key) > 255:
        return tuple(value >> 8 for value in key)
    return key


def _eight_bits(image: Image.Image, label: str) -> Image.Image:
    """Convert a grey picture of up to 16 bits to 8: L, or LA if a grey is declared transparent.

    Raises:
        ImageError: 32-bit integers or floats, whose range is unknown.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode.startswith("I;16"):
        depth = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        depth = 16  # Pillow scales PPM to this
    else:
        raise ImageError(
            f"{label}: grey values of 32 bits (mode {image.mode}), of unknown range; "
            "scale the picture to 8 bits, or give an array of floats in 0..1"
        )
    x = np.asarray(image)
    grey = Image.fromarray((x >> (depth - 8)).astype(np.uint8))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = grey.point([255 - i for i in range(256)])
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = Image.fromarray(np.where(x == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
