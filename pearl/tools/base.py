"""What a tool is: a name, a description, validated arguments, and one batched method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pearl.errors import PearlError
from pearl.images import ImageFormat, Picture
from pearl.records import Box

MIN_BOX_SIDE = 0.002
MAX_REGIONS = 16
FULL: Box = (0.0, 0.0, 1.0, 1.0)
"""The box of a whole image."""


class ToolError(ValueError):
    """A call that cannot be done as asked. The message goes to whoever asked, as an observation."""


class ToolUnavailable(PearlError, RuntimeError):
    """A tool whose package or model is missing; the message says what brings it."""


def _ordered(box: Box) -> Box:
    x0, y0, x1, y1 = box
    if x1 - x0 < MIN_BOX_SIDE or y1 - y0 < MIN_BOX_SIDE:
        raise ValueError(f"[x0, y0, x1, y1] needs x0 < x1 and y0 < y1 by at least {MIN_BOX_SIDE}")
    return box


Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BoxArgument = Annotated[
    tuple[Fraction, Fraction, Fraction, Fraction],
    AfterValidator(_ordered),
    Field(description="[x0, y0, x1, y1] in 0..1 of the image"),
]
PointArgument = Annotated[tuple[Fraction, Fraction], Field(description="[x, y] in 0..1 of the image")]


class ToolArguments(BaseModel):
    """The arguments that every tool has. Unknown ones are refused; bounds are part of the type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: int = Field(default=0, ge=0, le=64, description="which image: 0 is the original, i the output of step i")


@dataclass(frozen=True)
class ToolResult:
    """What a call gave, before it is encoded and recorded as an observation.

    Attributes:
        text: For the model; says everything that `numbers` says.
        pixels: uint8 RGB (H, W, 3), where the tool makes an image.
        numbers: The readings, for an expert that branches on them; not recorded.
        failed: The call was refused; `text` says why.
    """

    text: str
    pixels: np.ndarray | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False


class Tool(ABC):
    """A tool. Settings (a model's folder, a device) are its constructor's keyword arguments.

    It is deterministic, and does not use the network unless its model was named by a Hub id.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    Arguments: ClassVar[type[ToolArguments]] = ToolArguments
    image_format: ClassVar[ImageFormat] = "jpeg"

    def missing(self) -> str | None:
        """What is missing and which command brings it; None when the tool is ready. Must be quick."""
        return None

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides this tool's output besides its input: settings, model revision."""
        return {}

    @abstractmethod
    def run(self, pictures: Sequence[Picture], arguments: Sequence[Any]) -> list[ToolResult]:
        """One result a call, in order. A call that cannot be done gives `refused(…)`, and never harms its neighbours."""


class PictureTool(Tool):
    """A tool that looks at one picture at a time: override `apply`."""

    def run(self, pictures: Sequence[Picture], arguments: Sequence[Any]) -> list[ToolResult]:
        return [self._guarded(picture, one) for picture, one in zip(pictures, arguments, strict=True)]

    def _guarded(self, picture: Picture, arguments: Any) -> ToolResult:
        try:
            return self.apply(picture, arguments)
        except ToolError as error:
            return refused(str(error))

    @abstractmethod
    def apply(self, picture: Picture, arguments: Any) -> ToolResult:
        """What a call gives: from one picture and its validated arguments, text with pixels or numbers.

        Raises:
            ToolError: it cannot be done as asked; the message becomes the observation.
        """


def refused(reason: str) -> ToolResult:
    """The result of a call that is not carried out; the reason is what the caller reads."""
    return ToolResult(text=f"Error: {reason}", failed=True)


def spec(tool: type[Tool] | Tool) -> dict[str, Any]:
    """The function-calling specification (the form that chat templates and OpenAI-style servers read)."""
    parameters = tool.Arguments.model_json_schema()
    parameters.pop("title", None)
    parameters.pop("description", None)
    for argument in parameters["properties"].values():
        argument.pop("title", None)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def as_text(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"
