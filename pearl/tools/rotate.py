"""Rotate: by any angle; the canvas grows so that nothing is cut off."""

from __future__ import annotations

import math

import cv2
import numpy as np
from pydantic import Field

from pearl.images import MAX_PIXELS, Picture
from pearl.tools.base import PictureTool, ToolArguments, ToolError, ToolResult


class RotateArguments(ToolArguments):
    degrees: float = Field(ge=-360, le=360, allow_inf_nan=False, description="counter-clockwise, in degrees")


class Rotate(PictureTool):
    name = "rotate"
    description = "Turns an image counter-clockwise; corners that appear are grey."
    Arguments = RotateArguments

    def apply(self, picture: Picture, arguments: RotateArguments) -> ToolResult:
        turns, rest = divmod(arguments.degrees, 90)
        if rest == 0:
            pixels = np.ascontiguousarray(np.rot90(picture.pixels, int(turns)))
        else:
            pixels = _turn(picture.pixels, arguments.degrees)
        text = f"Turned image {arguments.image} by {arguments.degrees:g} degrees: {pixels.shape[1]}×{pixels.shape[0]} pixels."
        return ToolResult(text, pixels)


def _turn(pixels: np.ndarray, degrees: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    new_width, new_height = math.ceil(width * cos + height * sin), math.ceil(width * sin + height * cos)
    if new_width * new_height > MAX_PIXELS:
        raise ToolError(f"the turned image would have {new_width}×{new_height} pixels, more than {MAX_PIXELS:,} in all")
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    matrix[:, 2] += ((new_width - width) / 2, (new_height - height) / 2)
    return cv2.warpAffine(
        pixels, matrix, (new_width, new_height), flags=cv2.INTER_LINEAR, borderValue=(128, 128, 128)
    )  # fmt: skip
