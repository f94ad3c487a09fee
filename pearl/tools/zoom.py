"""Zoom: crop and upsample, so that a small object covers many of a model's visual tokens."""

from __future__ import annotations

import cv2
from pydantic import Field

from pearl.boxes import pixel_box
from pearl.images import Picture
from pearl.tools.base import BoxArgument, PictureTool, ToolArguments, ToolError, ToolResult, as_text

MAX_SIDE = 1024


class ZoomArguments(ToolArguments):
    box: BoxArgument = Field(description="what to enlarge: [x0, y0, x1, y1] in 0..1 of the image")
    factor: float = Field(default=2.0, ge=1.0, le=8.0, allow_inf_nan=False, description="how many times larger")


class Zoom(PictureTool):
    name = "zoom"
    description = f"Cuts a box out of an image and enlarges it, to at most {MAX_SIDE} pixels a side."
    Arguments = ZoomArguments

    def apply(self, picture: Picture, arguments: ZoomArguments) -> ToolResult:
        left, top, right, bottom = pixel_box(arguments.box, picture.width, picture.height)
        longest = max(right - left, bottom - top)
        if longest > MAX_SIDE:
            raise ToolError(f"the box is {longest} pixels long already, more than {MAX_SIDE}; choose a smaller one")
        factor = min(arguments.factor, MAX_SIDE / longest)
        size = (max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor)))
        pixels = cv2.resize(picture.pixels[top:bottom, left:right], size, interpolation=cv2.INTER_CUBIC)
        text = f"Zoomed into {as_text(arguments.box)} of image {arguments.image}, {factor:.1f} times: {size[0]}×{size[1]} pixels."
        return ToolResult(text, pixels, {"width": size[0], "height": size[1]})
