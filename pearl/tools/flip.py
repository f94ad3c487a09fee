"""Flip: an image mirrored."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from pearl.images import Picture
from pearl.tools.base import PictureTool, ToolArguments, ToolResult


class FlipArguments(ToolArguments):
    direction: Literal["horizontal", "vertical"] = Field(description="horizontal swaps left and right")


class Flip(PictureTool):
    name = "flip"
    description = "Mirrors an image."
    Arguments = FlipArguments

    def apply(self, picture: Picture, arguments: FlipArguments) -> ToolResult:
        axis = 1 if arguments.direction == "horizontal" else 0
        pixels = np.ascontiguousarray(np.flip(picture.pixels, axis))
        return ToolResult(f"Mirrored image {arguments.image} {arguments.direction}ly.", pixels)
