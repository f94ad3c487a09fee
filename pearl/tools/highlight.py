"""Highlight: boxes drawn into an image, so that positions can be compared at a glance."""

from __future__ import annotations

from pydantic import Field

from pearl.drawing import draw_boxes
from pearl.images import Picture
from pearl.tools.base import MAX_REGIONS, BoxArgument, PictureTool, ToolArguments, ToolResult


class HighlightArguments(ToolArguments):
    boxes: list[BoxArgument] = Field(min_length=1, max_length=MAX_REGIONS, description="the boxes to draw")


class Highlight(PictureTool):
    name = "highlight"
    description = "Draws coloured boxes into an image."
    Arguments = HighlightArguments

    def apply(self, picture: Picture, arguments: HighlightArguments) -> ToolResult:
        count = len(arguments.boxes)
        text = f"Drew {count} {'box' if count == 1 else 'boxes'} into image {arguments.image}."
        return ToolResult(text, draw_boxes(picture.pixels, arguments.boxes), {"count": count})
