"""Boxes and labelled points drawn into pictures, in colours that stand out from what lies beneath."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pearl.boxes import pixel_box
from pearl.records import Box, Point

PALETTE = ((255, 40, 40), (40, 120, 255), (30, 200, 60), (255, 190, 0), (200, 60, 255), (0, 200, 200))


def draw_boxes(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy of RGB (H, W, 3) with the outline of each box in the next colour of `PALETTE`."""
    height, width = pixels.shape[:2]
    canvas = pixels.copy()
    thickness = max(2, round(min(width, height) / 200))
    for index, box in enumerate(boxes):
        left, top, right, bottom = pixel_box(box, width, height)
        cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), PALETTE[index % len(PALETTE)], thickness)
    return canvas


def draw_points(pixels: np.ndarray, points: Sequence[Point], labels: Sequence[str]) -> np.ndarray:
    """A small ring around each point, so that what it marks stays visible, with its label beside it."""
    height, width = pixels.shape[:2]
    canvas = pixels.copy()
    radius = max(4, round(min(width, height) / 55))
    scale = min(width, height) / 640 + 0.2
    for index, (point, label) in enumerate(zip(points, labels, strict=True)):
        x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
        colour = PALETTE[index % len(PALETTE)]
        cv2.circle(canvas, (x, y), radius, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.circle(canvas, (x, y), radius, colour, 2, cv2.LINE_AA)
        (text_width, text_height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
        across = x + radius + 4 if x + radius + 4 + text_width < width else x - radius - 4 - text_width
        baseline = min(max(y + text_height // 2, text_height + 1), height - 3)
        for ink, thickness in (((0, 0, 0), 5), (colour, 2)):
            cv2.putText(
                canvas, label, (across, baseline), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thickness, cv2.LINE_AA
            )  # fmt: skip
    return canvas
