"""Pictures of every mode and input type become the same 8-bit RGB, or raise one clear error."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps
from transformers import Qwen2VLImageProcessorPil

import mquant_jax as mq
from mquant_jax.models.images import load_frames, load_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (5, 7), np.uint16)


def pixels(image) -> np.ndarray:
    return np.asarray(load_image(image, "image 0"))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, rows: list[bytes], width: int, *extra: bytes) -> bytes:
    """A PNG with these packed rows; the chunks ``extra`` come before its data."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(bits: int, data: bytes, width: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian greyscale TIFF with one row."""
    tags = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(data)),
            (339, 3, sample_format)]  # fmt: skip
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        out += struct.pack("<HHII", tag, kind, 1, value)
    return out + struct.pack("<I", 0)


def on_white(image: Image.Image) -> np.ndarray:
    """Composite on white: ``alpha * colour + (1 - alpha) * 255``."""
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    return alpha * rgba[..., :3] + (1 - alpha) * 255


def transparent(mode: str) -> Image.Image:
    """A picture with many colours and opacities."""
    rgba = Image.fromarray(np.dstack([RGB, GREY]), "RGBA")
    if mode in ("LA", "La"):
        return rgba.convert("LA").convert(mode)
    if mode == "PA":
        return Image.merge("LA", (rgba.convert("L"), rgba.getchannel("A"))).convert("PA")
    return rgba.convert(mode)


# --- input types ----------------------------------------------------------------------------


def test_every_form_of_one_picture(tmp_path) -> None:
    image = Image.fromarray(RGB)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    stream = io.BytesIO(data)
    stream.read(3)  # the file position does not matter
    forms = [
        image, tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data),
        memoryview(data), stream, stream, url, url.replace("data:image/png", "DATA:"), RGB,
        np.asfortranarray(RGB), jnp.asarray(RGB), Image.open(tmp_path / "a.png"),
    ]  # fmt: skip
    with (tmp_path / "a.png").open("rb") as file:
        for form in (*forms, file):
            np.testing.assert_array_equal(pixels(form), RGB)


def test_a_name_says_nothing_about_the_format(tmp_path) -> None:
    for kind in ("PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "MPO", "JPEG2000"):
        path = tmp_path / f"{kind}.txt"
        path.write_bytes(encoded(Image.fromarray(RGB), kind))
        assert pixels(path).shape == RGB.shape


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_floats_between_0_and_1(dtype) -> None:
    x = (GREY / 255).astype(dtype)
    expected = np.rint(255 * np.asarray(x, np.float64)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(x), np.repeat(expected[..., None], 3, -1))
    if dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(expected, GREY)


class Arraylike:
    """Stands in for another library's array."""

    dtype, shape = "its own", (5, 7, 3)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return RGB


def test_arrays_of_other_libraries() -> None:
    np.testing.assert_array_equal(pixels(Arraylike()), RGB)


def test_arrays_of_one_and_four_channels() -> None:
    for grey in (GREY, GREY[..., None], GREY / 255.0, jnp.asarray(GREY)[..., None]):
        np.testing.assert_array_equal(pixels(grey), np.repeat(GREY[..., None], 3, -1))
    rgba = np.dstack([RGB, GREY])
    for array in (rgba, rgba / 255.0):
        assert np.abs(pixels(array) - on_white(Image.fromarray(rgba))).max() <= 1


# --- colour ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes(mode) -> None:
    image = Image.fromarray(RGB).convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_lab() -> None:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    red = Image.new("RGB", (3, 2), (200, 30, 40))
    image = ImageCms.profileToProfile(red, srgb, lab, outputMode="LAB")
    assert np.abs(pixels(image).astype(int) - np.asarray(red, int)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_composited_on_white(mode) -> None:
    image = transparent(mode)
    straight = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    assert np.abs(pixels(image) - on_white(image.convert(straight))).max() <= 1


def test_colours_that_files_declare_transparent() -> None:
    two = struct.pack(">H", 2)
    palette = chunk(b"PLTE", bytes([9, 9, 9, 50, 60, 70])) + chunk(b"tRNS", b"\x00\x80")
    cases = [
        (png(8, 0, [b"\x02\x07"], 2, chunk(b"tRNS", two)), [255, 7]),
        (png(4, 0, [b"\x2f"], 2, chunk(b"tRNS", two)), [255, 255]),
        (png(2, 0, [b"\xb0"], 2, chunk(b"tRNS", two)), [255, 255]),
        (png(1, 0, [b"\x40"], 2, chunk(b"tRNS", b"\0\0")), [255, 255]),
        (png(1, 0, [b"\x40"], 2, chunk(b"tRNS", b"\0\1")), [0, 255]),
        (png(16, 0, [struct.pack(">HH", 2, 0x5678)], 2, chunk(b"tRNS", two)), [255, 0x56]),
        (png(8, 2, [b"\1\2\3\4\5\6"], 2, chunk(b"tRNS", b"\0\1\0\2\0\3")), [255, 4]),
        (png(16, 2, [struct.pack(">6H", *[0x1234] * 3, 1, 2, 3)], 2,
             chunk(b"tRNS", b"\x12\x34" * 3)), [255, 0]),
        (png(8, 3, [b"\0\1"], 2, palette), [255, 152]),
    ]  # fmt: skip
    for data, reds in cases:
        got = pixels(data)[0, :, 0].astype(int)
        assert np.abs(got - reds).max() <= 1, (got, reds)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_greys_keep_their_high_bits(mode) -> None:
    image = Image.frombytes(mode, (7, 5), GREY16.astype(">u2" if mode[-1] == "B" else "<u2"))
    expected = np.repeat((GREY16 >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(pixels(image), expected)


def test_16_bit_greys_in_files() -> None:
    high = (GREY16 >> 8).astype(np.uint8)
    image = Image.fromarray(GREY16)
    for data in (encoded(image), encoded(image, "TIFF"), encoded(image, "JPEG2000"),
                 b"P5 7 5 65535\n" + GREY16.astype(">u2").tobytes()):  # fmt: skip
        np.testing.assert_array_equal(pixels(data)[..., 0], high)


def test_the_declared_depth_decides() -> None:
    two = struct.pack("<HH", 65535, 256)
    assert pixels(tiff(16, two, 2))[0, :, 0].tolist() == [255, 1]
    assert pixels(tiff(16, two, 2, photometric=0))[0, :, 0].tolist() == [0, 254]  # white is 0
    assert pixels(tiff(12, b"\xff\xf0\x10", 2))[0, :, 0].tolist() == [255, 1]
    assert pixels(b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("I", (2, 2), 70000), Image.new("F", (2, 2), 0.5),
        tiff(16, b"\0\0\0\1", 2, sample_format=2), encoded(Image.new("I", (2, 2)), "TIFF"),
        encoded(Image.new("F", (2, 2)), "TIFF"),
    ],
    ids=["I", "F", "signed", "int tiff", "float tiff"],
)  # fmt: skip
def test_greys_of_an_unknown_range_are_refused(image) -> None:
    with pytest.raises(mq.ImageError, match="image 0.*unknown range"):
        load_image(image, "image 0")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA"])
def test_like_the_published_processor(mode) -> None:
    x = np.repeat(np.repeat(RGB, 12, 0), 12, 1)
    image = Image.fromarray(x).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(np.ascontiguousarray(x[..., 0])))
    processor = Qwen2VLImageProcessorPil()
    got, expected = (
        processor(i, return_tensors="np")["pixel_values"] for i in (load_image(image, ""), image)
    )
    np.testing.assert_array_equal(got, expected)


# --- orientation ----------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(turn, tmp_path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    data = encoded(Image.fromarray(RGB), exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(opened))
    url = "data:;base64," + base64.b64encode(data).decode()
    for form in (tmp_path / "a.png", data, io.BytesIO(data), url, Image.open(io.BytesIO(data)),
                 Image.open(io.BytesIO(data)).convert("RGB")):  # fmt: skip
        np.testing.assert_array_equal(pixels(form), expected)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(upright), expected)  # not rotated twice


def test_orientation_of_deep_greys_and_of_tiff() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    expected = np.rot90(GREY16 >> 8, -1)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(GREY16), kind, exif=exif)
        np.testing.assert_array_equal(pixels(data)[..., 0], expected)


def test_damaged_exif_is_no_orientation() -> None:
    data = encoded(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(data), RGB)


def test_the_first_frame_of_an_animation() -> None:
    second = Image.fromarray(255 - RGB)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        first = Image.fromarray(np.full_like(RGB, 255))
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert pixels(data).min() == 255, kind


# --- refused input --------------------------------------------------------------------------


def test_no_other_program_is_started(tmp_path, monkeypatch) -> None:
    eps = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
           b"showpage\n%%Trailer\n%%EOF\n")  # fmt: skip
    (tmp_path / "a.png").write_bytes(eps)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    for form in (tmp_path / "a.png", eps, io.BytesIO(eps), Image.open(io.BytesIO(eps))):
        with pytest.raises(mq.ImageError, match="EPS|not a readable image"):
            load_image(form, "image 0")


def test_paths_that_are_no_files(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        tmp_path / "none.png": "none.png: no such file",
        tmp_path: "not a regular file",
        tmp_path / "pipe": "pipe: not a regular file",
        "/dev/zero": "/dev/zero: not a regular file",
        tmp_path / ("x" * 300): "too long",
        "a\0b.png": r"a\\x00b.png: cannot be opened",
        "\ud800.png": "cannot be opened",
        "https://example.com/a.png": "URLs are not downloaded",
        Path("http://example.com/a.png"): "no such file",
        tmp_path / "text.png": "text.png.*not a readable image",
        tmp_path / "empty.png": "not a readable image",
        "data:image/png,": "not a readable image",
        "data:image/png;base64": "not a data: URL",
        "data:image/png;base64,@@@@": "not a data: URL",
    }
    for path, words in cases.items():
        with pytest.raises(mq.ImageError, match=words) as caught:
            load_image(path, "image 3")
        assert "image 3" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "NoneType"), (3, "int"), ([[1, 2], [3, 4]], "list"), (io.StringIO("x"), "binary"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"), (np.zeros(4, np.uint8), "uint8"),
        (np.zeros((3, 40, 40), np.uint8), r"\[3, 40, 40\]"), (np.zeros((2, 4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), np.uint8), "uint8"), (np.zeros((4, 4), bool), "bool"),
        (np.zeros((4, 4), np.int32), "int32"), (np.zeros((4, 4), np.uint16), "uint16"),
        (np.full((4, 4), 1.01), "0..1, found float64 from 1.01"), (np.full((4, 4), -0.1), "0..1"),
        (np.full((4, 4), np.nan), "0..1"), (np.full((4, 4), np.inf), "0..1"), (b"", "not a read"),
        (np.array([[object()]]), "object"), (np.zeros((4, 4), complex), "complex"),
    ],
)  # fmt: skip
def test_values_that_are_no_pictures(image, words) -> None:
    with pytest.raises(mq.ImageError, match=words):
        load_image(image, "image 0")


def test_damaged_files_are_one_clear_error(tmp_path) -> None:
    rng = np.random.default_rng(0)
    originals = [
        encoded(Image.fromarray(np.tile(RGB, (4, 4, 1))).convert(mode), kind)
        for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"),
                           ("WEBP", "RGB"), ("TIFF", "RGB"), ("BMP", "RGB"), ("PPM", "L"))
    ]  # fmt: skip
    refused = 0
    for i in range(240):
        data = bytearray(originals[i % len(originals)])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        del data[len(data) if i % 3 else rng.integers(1, len(data)) :]
        try:
            assert load_image(bytes(data), "image 0").mode == "RGB"
        except mq.ImageError as e:
            refused += 1
            assert "image 0" in str(e) and "\n" not in str(e)
    assert refused > 40


def test_bombs() -> None:
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * (4 << 20)))
    with pytest.raises(mq.ImageError, match="image 0: not a readable image"):
        load_image(png(8, 0, [b"\1"], 1, text), "image 0")
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    with pytest.raises(mq.ImageError, match="decompression bomb"):
        load_image(bomb, "image 0")


def test_clips() -> None:
    clip = np.stack([RGB, 255 - RGB])
    for form in (clip, list(clip), (Image.fromarray(f) for f in clip), jnp.asarray(clip)):
        frames = load_frames(form, "video 0")
        np.testing.assert_array_equal(np.stack([np.asarray(f) for f in frames]), clip)
    for bad in (RGB, "clip.mp4", Path("clip.mp4"), Image.fromarray(RGB), None, {}, b"x", 3, []):
        with pytest.raises(mq.ImageError, match="video 0: expected a sequence of frames"):
            load_frames(bad, "video 0")
    with pytest.raises(mq.ImageError, match="video 0, frame 1"):
        load_frames([RGB, None], "video 0")
