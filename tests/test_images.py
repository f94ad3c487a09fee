"""Image files of every kind, whole and broken: what `decode` and `header` make of them, and that encoding is faithful."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pearl.errors import PearlError
from pearl.images import (
    FORMATS,
    MAX_PIXELS,
    ImageError,
    ImageFormat,
    Picture,
    decode,
    decode_depth,
    encode,
    header,
    stored_size,
)

RNG = np.random.default_rng(0)
COLOURS = np.kron(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
"""32×48 pixels in patches of 8×8, which JPEG's blocks keep apart."""


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A few bytes that promise a picture of this size."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_exact_pixels(kind: str) -> None:
    data = saved(COLOURS, kind)
    np.testing.assert_array_equal(decode(data), COLOURS)
    assert header(data) == (48, 32)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"quality": 95})])
def test_lossy_formats_give_nearly_the_pixels(kind: str, options: dict[str, Any]) -> None:
    grey = COLOURS[..., :1].repeat(3, 2)  # WebP smears colours over 2×2 pixels
    data = saved(grey, kind, **options)
    assert distance(decode(data), grey) < 3
    assert header(data) == (48, 32)


def test_gif_gives_its_first_frame_with_its_palette() -> None:
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    data = saved(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data), np.full((10, 20, 3), (255, 0, 0), np.uint8))


def test_decoded_pixels_are_a_writable_array_of_their_own() -> None:
    pixels = decode(saved(COLOURS, "PNG"))
    assert pixels.dtype == np.uint8
    assert pixels.flags["WRITEABLE"]
    assert pixels.flags["C_CONTIGUOUS"]


def test_the_content_decides_the_format_not_the_name() -> None:
    """`decode` sees no name, so a PNG called .jpg is a PNG and a text called .jpg is nothing."""
    assert decode(saved(COLOURS, "PNG")).shape == COLOURS.shape
    for decoder in (decode, header):
        with pytest.raises(ImageError, match="not an image of a known format"):
            decoder(b"dear diary, this is no photograph")


def test_the_stored_size_is_that_before_any_turn() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        data = saved(COLOURS, kind, exif=exif)
        assert stored_size(data) == header(data)[::-1] == (48, 32)


def test_an_empty_file_is_refused() -> None:
    for decoder in (decode, header, stored_size):
        with pytest.raises(ImageError, match="the file is empty"):
            decoder(b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    noise = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    data = saved(noise, kind)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA"])
def test_unusual_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="known format"):
        decode(saved(COLOURS, kind))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    for size in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (9_000, 9_000)):
        assert size[0] * size[1] > MAX_PIXELS
        for decoder in (decode, header):
            with pytest.raises(ImageError, match="pixels"):
                decoder(png_header(*size))


def test_the_limit_of_pixels_is_inclusive_and_an_option() -> None:
    data = saved(COLOURS, "PNG")
    assert decode(data, max_pixels=48 * 32).shape == (32, 48, 3)
    for decoder in (decode, header):
        with pytest.raises(ImageError, match="48×32 pixels are more than the limit of 1,535"):
            decoder(data, max_pixels=48 * 32 - 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_a_picture_of_one_pixel_a_side_is_refused(size: tuple[int, int]) -> None:
    for decoder in (decode, header):
        with pytest.raises(ImageError, match=f"{size[0]}×{size[1]} pixels are too small"):
            decoder(saved(Image.new("RGB", size), "PNG"))


def test_cmyk_becomes_rgb() -> None:
    data = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert distance(decode(data), np.full((16, 16, 3), (255, 0, 0))) < 4


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16).repeat(4, 0).repeat(4, 1)
    expected = np.array([[0, 100], [200, 255]], np.uint8).repeat(4, 0).repeat(4, 1)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(saved(values, kind)), expected[..., None].repeat(3, 2))


def test_float_grey_spans_the_range_of_its_values() -> None:
    values = np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30)
    pixels = decode(saved(values, "TIFF"))
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)
    assert (np.diff(pixels[..., 0].ravel().astype(int)) >= 0).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_float_grey_without_a_number_in_some_pixels_keeps_the_others() -> None:
    values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    values[0, 0], values[0, 1] = np.nan, np.inf
    pixels = decode(saved(values, "TIFF"))
    assert (pixels[0, 0, 0], pixels[0, 1, 0], pixels[-1, -1, 0]) == (0, 255, 255)
    assert 120 < pixels[10, 0, 0] < 135
    with pytest.raises(ImageError, match="no pixel has a finite value"):
        decode(saved(np.full((4, 4), np.nan, np.float32), "TIFF"))


def test_one_bit_and_grey_become_rgb() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (8, 4))
    for mode in ("1", "L"):
        np.testing.assert_array_equal(
            decode(saved(Image.fromarray(stripes).convert(mode), "PNG")), stripes[..., None].repeat(3, 2)
        )


def test_transparency_is_laid_over_white() -> None:
    alpha = np.tile(np.array([0, 255, 128, 255], np.uint8), (8, 2))
    for colour, mode in (((200, 0, 0), "RGBA"), ((40, 40, 40), "LA")):
        ink = np.full((8, 8, 3), colour, np.uint8)
        image = Image.fromarray(np.dstack([ink, alpha])).convert(mode)
        pixels = decode(saved(image, "PNG"))
        np.testing.assert_array_equal(pixels[:, 0], np.full((8, 3), 255))
        assert distance(pixels[:, 1], ink[:, 1]) <= 1
        assert distance(pixels[:, 2], (ink[:, 2].astype(int) + 255) // 2) <= 1


def test_palette_with_a_transparent_colour_is_laid_over_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30] + [0] * 762)
    image.paste(0, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        pixels = decode(saved(image, kind, transparency=0))
        np.testing.assert_array_equal(pixels[:, :4], np.full((8, 4, 3), 255))
        np.testing.assert_array_equal(pixels[:, 4:], np.full((8, 4, 3), (10, 200, 30)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_pixels_are_turned_as_exif_says_and_the_header_agrees(kind: str, orientation: int) -> None:
    turns: dict[int, Any] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = saved(COLOURS, kind, exif=exif, **options.get(kind, {}))
    pixels, expected = decode(data), turns[orientation](COLOURS)
    assert pixels.shape == expected.shape
    assert distance(pixels, expected) < (3 if kind == "JPEG" else 1e-9)
    assert header(data) == (pixels.shape[1], pixels.shape[0])


def test_exif_that_is_no_exif_changes_nothing() -> None:
    np.testing.assert_array_equal(decode(saved(COLOURS, "PNG", exif=b"Exif\0\0no such thing")), COLOURS)


WHOLE = {kind: saved(COLOURS, kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_give_pixels_or_an_image_error(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE[kind])
    for position, value in changes:
        data[position % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode(bytes(data)).shape[2] == 3


@pytest.mark.parametrize("error", [TypeError("a str, not bytes"), KeyError(3), RuntimeError("odd"), MemoryError()])
def test_whatever_pillow_raises_becomes_an_image_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("pearl.images.Image.open", fail)
    for read in (decode, header, decode_depth):
        with pytest.raises(ImageError, match="unreadable") as raised:
            read(WHOLE["TIFF"])
        assert isinstance(raised.value, PearlError)


def test_depth_is_millimetres_in_16_bit_grey() -> None:
    depth = decode_depth(saved(np.array([[0, 1000, 1], [65535, 2500, 0]], np.uint16), "PNG"))
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [[np.nan, 1, 0.001], [65.535, 2.5, np.nan]], rtol=1e-6)


@pytest.mark.parametrize("data", [saved(COLOURS, "PNG"), saved(COLOURS[..., 0], "PNG"), saved(COLOURS, "JPEG")])
def test_other_images_are_no_depth(data: bytes) -> None:
    with pytest.raises(ImageError, match="depth must be a 16-bit grey PNG in millimetres; this is "):
        decode_depth(data)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_png_and_webp_round_trips_are_exact(image_format: ImageFormat) -> None:
    noise = RNG.integers(0, 256, (31, 17, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode(noise, image_format)), noise)


def test_a_jpeg_round_trip_is_close_in_colour_too() -> None:
    """One red pixel in two would be smeared by chroma subsampling."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2] = (255, 0, 0)
    assert distance(decode(encode(pixels, "jpeg")), pixels) < 6
    assert distance(decode(encode(COLOURS)), COLOURS) < 2


def test_encoding_is_deterministic() -> None:
    for image_format in ("jpeg", "png", "webp"):
        assert encode(COLOURS, image_format) == encode(COLOURS.copy(), image_format)


def test_a_picture_knows_its_size() -> None:
    picture = Picture(COLOURS)
    assert (picture.width, picture.height) == (48, 32)
