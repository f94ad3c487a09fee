"""Geometry of boxes, `[x0, y0, x1, y1]` in 0..1 of an image; y grows downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pearl.records import Box, Point

DECIMALS = 4
"""Of a box as models and people read it."""


def as_box(value: Any) -> Box | None:
    """What a record or a call holds, if it is a box: four numbers in 0..1, of positive width and height."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in value):
        return None
    x0, y0, x1, y1 = map(float, value)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def centre(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def longer_side(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])


def shorter_side(box: Box) -> float:
    return min(box[2] - box[0], box[3] - box[1])


def intersection(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def overlap(a: Box, b: Box) -> float:
    """The intersection's share of the smaller box."""
    return intersection(a, b) / max(min(area(a), area(b)), 1e-12)


def intersection_over_union(a: Box, b: Box) -> float:
    shared = intersection(a, b)
    return shared / max(area(a) + area(b) - shared, 1e-12)


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them."""
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def padded(box: Box, margin: float = 0.2, least: float = 0.085) -> Box:
    """The box with `margin` of its sides around it, at least `least` of the image on each side, inside the image."""
    sides = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        half = max((high - low) * (0.5 + margin), least / 2)
        middle = min(max((low + high) / 2, half), 1 - half) if half < 0.5 else 0.5
        half = min(half, 0.5)
        sides.append((round(middle - half, DECIMALS), round(middle + half, DECIMALS)))
    (x0, x1), (y0, y1) = sides
    return max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)


def rounded(box: Box) -> Box:
    """To `DECIMALS`."""
    x0, y0, x1, y1 = (round(corner, DECIMALS) for corner in box)
    return x0, y0, x1, y1


def rounded_outwards(box: Box) -> Box:
    """To `DECIMALS`, so that the box keeps covering what it covered."""
    x0, y0, x1, y1 = (
        min(max(round(corner + shift, DECIMALS), 0.0), 1.0)
        for corner, shift in zip(box, (-5e-5, -5e-5, 5e-5, 5e-5), strict=True)
    )
    return x0, y0, x1, y1


def seen_in(frame: Box, box: Box) -> Box:
    """`box` in the coordinates of a picture that shows `frame` alone, cut off at its borders; to `DECIMALS`."""
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    corners = (
        (box[0] - frame[0]) / width, (box[1] - frame[1]) / height,
        (box[2] - frame[0]) / width, (box[3] - frame[1]) / height,
    )  # fmt: skip
    x0, y0, x1, y1 = (round(min(max(corner, 0.0), 1.0), DECIMALS) for corner in corners)
    return x0, y0, x1, y1


def out_of(frame: Box, box: Box) -> Box:
    """The reverse of `seen_in`: a box of a picture that shows `frame` alone, in the coordinates that `frame` has."""
    (x, y, far_x, far_y), (left, top, right, bottom) = frame, box
    wide, tall = far_x - x, far_y - y
    return x + left * wide, y + top * tall, x + right * wide, y + bottom * tall


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The smallest whole pixels that cover `box`: left, top, right, bottom (exclusive), at least 1×1."""
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    right = max(left + 1, min(width, math.ceil(box[2] * width)))
    bottom = max(top + 1, min(height, math.ceil(box[3] * height)))
    return left, top, right, bottom
