"""Image bytes to pixels and back. Everything that opens an image goes through `decode`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pearl.errors import PearlError

MAX_PIXELS = 64_000_000
"""A run's default limit (`--max-pixels`)."""
HARD_MAX_PIXELS = 178_000_000
"""What data may hold at most, whatever a run's own limit was; above it Pillow suspects a decompression bomb."""
MIN_SIDE = 2
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""What files of these formats are called, in lower case."""

ImageFormat = Literal["jpeg", "png", "webp"]


class ImageError(PearlError, ValueError):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """A decoded image, uint8 RGB (H, W, 3), with metric depth (H, W) in metres where a sensor gave it."""

    pixels: np.ndarray
    depth: np.ndarray | None = None

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an image file as uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    Palette, grey, 16-bit, float, CMYK and transparent images become RGB; transparency is laid over white.

    Raises:
        ImageError: empty, truncated, no image, an unusual format, too large or too small.
    """
    with _explained(max_pixels):
        image = _open(data, max_pixels)
        image.load()
        turned = ImageOps.exif_transpose(image) if _exif(image) else image
        return np.array(_to_rgb(turned))


def header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as they will be seen (EXIF orientation applied), without decoding the pixels.

    Raises:
        ImageError: as `decode`, as far as the header tells.
    """
    with _explained(max_pixels):
        image = _open(data, max_pixels)
        width, height = image.size
        exif = _exif(image)
        if image.format == "TIFF":  # whose `size` Pillow gives as it will be seen
            width, height = exif.get(ExifTags.Base.ImageWidth, width), exif.get(ExifTags.Base.ImageLength, height)
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = int(width), int(height)  # a damaged TIFF may hold anything there
        return (height, width) if turned else (width, height)


def stored_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height before any EXIF orientation: cheaper than `header`, which reads a PNG file to its end for that.

    Raises:
        ImageError: as `header`.
    """
    with _explained(max_pixels):
        return _open(data, max_pixels).size


def decode_depth(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Metric depth from a 16-bit grey PNG in millimetres: float32 (H, W) in metres, NaN where the sensor read nothing (0).

    Raises:
        ImageError: as `decode`, or it is another kind of image.
    """
    with _explained(max_pixels):
        image = _open(data, max_pixels)
        if image.format != "PNG" or not image.mode.startswith("I"):  # "I;16"; older releases of Pillow say "I"
            raise ImageError(f"depth must be a 16-bit grey PNG in millimetres; this is {image.format}, {image.mode}")
        image.load()
        millimetres = np.asarray(image, dtype=np.float32)
        return np.where(millimetres > 0, millimetres / np.float32(1000), np.float32(np.nan))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("the file is empty")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.size, max_pixels)
    return image


def _exif(image: Image.Image) -> Image.Exif:
    """Its EXIF data; nothing where they are damaged, which is no reason to refuse the picture."""
    try:
        return image.getexif()
    except Exception:  # Pillow raises anything
        return Image.Exif()


@contextmanager
def _explained(max_pixels: int) -> Iterator[None]:
    """Turns what Pillow raises into ImageError; on damaged files that may be any exception at all."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {max_pixels:,} pixels: {error}") from error
    except Exception as error:
        raise ImageError(f"unreadable: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(f"{width}×{height} pixels are more than the limit of {max_pixels:,}")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width}×{height} pixels are too small to look at")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ImageError("no pixel has a finite value")
        low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (finite.min(), finite.max())
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) * (255.0 / max(high - low, 1e-9))
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def encode(pixels: np.ndarray, image_format: ImageFormat = "jpeg") -> bytes:
    """RGB (H, W, 3) as an image file. JPEG at quality 95 without chroma subsampling; PNG and WebP lossless."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    elif image_format == "webp":
        image.save(buffer, "WEBP", lossless=True, method=0)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
