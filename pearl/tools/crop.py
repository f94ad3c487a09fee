"""Crop: the part of an image inside a box, at its own resolution."""

from __future__ import annotations

from pydantic import Field

from pearl.boxes import pixel_box
from pearl.images import Picture
from pearl.tools.base import BoxArgument, PictureTool, ToolArguments, ToolResult, as_text


class CropArguments(ToolArguments):
    box: BoxArgument = Field(description="what to keep: [x0, y0, x1, y1] in 0..1 of the image")


class Crop(PictureTool):
    name = "crop"
    description = "Cuts a box out of an image, so that only this part is looked at."
    Arguments = CropArguments

    def apply(self, picture: Picture, arguments: CropArguments) -> ToolResult:
        left, top, right, bottom = pixel_box(arguments.box, picture.width, picture.height)
        pixels = picture.pixels[top:bottom, left:right].copy()
        text = f"Cropped image {arguments.image} to {as_text(arguments.box)}: {right - left}×{bottom - top} pixels."
        return ToolResult(text, pixels, {"width": right - left, "height": bottom - top})
