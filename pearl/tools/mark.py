"""Mark: labelled points drawn into an image."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pearl.drawing import draw_points
from pearl.images import Picture
from pearl.tools.base import MAX_REGIONS, PictureTool, PointArgument, ToolArguments, ToolResult

Label = Annotated[str, Field(min_length=1, max_length=8, pattern=r"^[ -~]+$")]


class MarkArguments(ToolArguments):
    points: list[PointArgument] = Field(min_length=1, max_length=MAX_REGIONS, description="where to mark")
    labels: list[Label] | None = Field(default=None, description="one short label a point; 1, 2, … when not given")

    @model_validator(mode="after")
    def _one_label_a_point(self) -> MarkArguments:
        if self.labels is not None and len(self.labels) != len(self.points):
            raise ValueError(f"{len(self.points)} points but {len(self.labels)} labels")
        return self


class Mark(PictureTool):
    name = "mark"
    description = "Draws small labelled rings around points of an image."
    Arguments = MarkArguments

    def apply(self, picture: Picture, arguments: MarkArguments) -> ToolResult:
        labels = arguments.labels or [str(i + 1) for i in range(len(arguments.points))]
        text = f"Marked {', '.join(labels)} in image {arguments.image}."
        return ToolResult(text, draw_points(picture.pixels, arguments.points, labels), {"count": len(labels)})
