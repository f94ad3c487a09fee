"""Edges: the outlines of an image, by Canny's detector with thresholds from the picture's own contrast."""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from pearl.boxes import pixel_box
from pearl.images import Picture
from pearl.tools.base import FULL, BoxArgument, PictureTool, ToolArguments, ToolResult, as_text

SHORTEST_SIDE = 160


class EdgesArguments(ToolArguments):
    box: BoxArgument = Field(default=FULL, description="which part: [x0, y0, x1, y1] in 0..1; all when not given")
    sensitivity: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.5, description="0 finds only strong edges, 1 finds faint ones too"
    )


class Edges(PictureTool):
    name = "edges"
    description = "Draws the outlines in an image or a part of it, white on black; small parts are enlarged."
    Arguments = EdgesArguments
    image_format = "png"

    def apply(self, picture: Picture, arguments: EdgesArguments) -> ToolResult:
        left, top, right, bottom = pixel_box(arguments.box, picture.width, picture.height)
        grey = cv2.cvtColor(picture.pixels[top:bottom, left:right], cv2.COLOR_RGB2GRAY)
        scale = min(8.0, SHORTEST_SIDE / min(grey.shape))
        if scale > 1:
            grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        grey = cv2.GaussianBlur(grey, (5, 5), 0)
        gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        high = max(20.0, float(np.quantile(gradient, 0.97 - 0.15 * arguments.sensitivity)))
        outline = cv2.Canny(grey, 0.4 * high, high)
        share = float(np.mean(outline > 0))
        text = f"Outlines of {as_text(arguments.box)} of image {arguments.image}; {share:.0%} of the pixels lie on an edge."
        return ToolResult(text, cv2.cvtColor(outline, cv2.COLOR_GRAY2RGB), {"share": share})
