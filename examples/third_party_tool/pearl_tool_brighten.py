"""A tool of a third party: brightens dark pictures."""

import numpy as np
from pearl.images import Picture
from pearl.tools import PictureTool, ToolArguments, ToolResult
from pydantic import Field


class BrightenArguments(ToolArguments):
    gamma: float = Field(default=2.0, gt=1, le=5, allow_inf_nan=False, description="how much; 1 changes nothing")


class Brighten(PictureTool):
    name = "brighten"
    description = "Brightens the dark parts of an image."
    Arguments = BrightenArguments

    def apply(self, picture: Picture, arguments: BrightenArguments) -> ToolResult:
        lighter = 255 * (picture.pixels / 255) ** (1 / arguments.gamma)
        return ToolResult(f"Brightened image {arguments.image}.", np.rint(lighter).astype(np.uint8))
