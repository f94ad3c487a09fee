"""Sample pictures for the card: the original and what the tools showed, side by side, as a small JPEG."""

from __future__ import annotations

import io

from PIL import Image

from pearl.images import HARD_MAX_PIXELS, decode
from pearl.records import EncodedImage, Trajectory

HEIGHT = 224
"""Pixels; every image of a strip has this height."""
MAX_WIDTH = 4 * HEIGHT
MAX_IMAGES = 5
GAP = 8
QUALITY = 82


def strip(trajectory: Trajectory) -> bytes:
    """A JPEG of the trajectory's images from left to right, at most `MAX_IMAGES`, each at most `MAX_WIDTH` wide."""
    images = [trajectory.image, *(step.observation.image for step in trajectory.steps)]
    shown = [_small(image) for image in images if image is not None][:MAX_IMAGES]
    width = sum(picture.width for picture in shown) + GAP * (len(shown) - 1)
    canvas = Image.new("RGB", (width, HEIGHT), "white")
    left = 0
    for picture in shown:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def _small(image: EncodedImage) -> Image.Image:
    picture = Image.fromarray(decode(image.data, HARD_MAX_PIXELS))
    width = max(1, min(MAX_WIDTH, round(picture.width * HEIGHT / picture.height)))
    return picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)
