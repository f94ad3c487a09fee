"""OCR: the text in an image, by RapidOCR (its models are part of the package; nothing is downloaded)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydantic import Field

from pearl.boxes import pixel_box
from pearl.drawing import draw_boxes
from pearl.images import Picture
from pearl.records import Box
from pearl.tools.base import FULL, BoxArgument, PictureTool, ToolArguments, ToolResult, ToolUnavailable, as_text

MAX_LINES = 40


class OcrArguments(ToolArguments):
    box: BoxArgument = Field(default=FULL, description="which part: [x0, y0, x1, y1] in 0..1; all when not given")


class Ocr(PictureTool):
    name = "ocr"
    description = "Reads the text in an image or a part of it: each line with its box and confidence."
    Arguments = OcrArguments

    def missing(self) -> str | None:
        absent = [package for package in ("rapidocr", "onnxruntime") if find_spec(package) is None]
        return f"{' and '.join(absent)} not installed: pip install rapidocr onnxruntime" if absent else None

    def fingerprint(self) -> Mapping[str, Any]:
        return {} if self.missing() else {"rapidocr": version("rapidocr"), "onnxruntime": version("onnxruntime")}

    def apply(self, picture: Picture, arguments: OcrArguments) -> ToolResult:
        lines = self.lines(picture, arguments.box)[:MAX_LINES]
        if not lines:
            return ToolResult(
                f"No text found in {as_text(arguments.box)} of image {arguments.image}.", None, {"lines": []}
            )
        listed = "\n".join(f"{line['text']} {as_text(line['box'])} ({line['score']:.2f})" for line in lines)
        drawn = draw_boxes(picture.pixels, [line["box"] for line in lines])
        return ToolResult(f"Text in image {arguments.image}:\n{listed}", drawn, {"lines": lines})

    def lines(self, picture: Picture, within: Box = FULL) -> list[dict[str, Any]]:
        """All lines of text in a part of a picture, in reading order, as `text`, `box` and `score`.

        Raises:
            ToolUnavailable: the package is missing.
        """
        left, top, right, bottom = pixel_box(within, picture.width, picture.height)
        found = self._engine(np.ascontiguousarray(picture.pixels[top:bottom, left:right, ::-1]))
        lines: list[dict[str, Any]] = []
        if found.txts is None:
            return lines
        for text, corners, score in zip(found.txts, found.boxes, found.scores, strict=True):
            (x0, y0), (x1, y1) = np.min(corners, axis=0), np.max(corners, axis=0)
            box: Box = (
                float(np.clip((left + x0) / picture.width, 0, 1)), float(np.clip((top + y0) / picture.height, 0, 1)),
                float(np.clip((left + x1) / picture.width, 0, 1)), float(np.clip((top + y1) / picture.height, 0, 1)),
            )  # fmt: skip
            lines.append({"text": str(text), "box": box, "score": float(score)})
        return lines

    @cached_property
    def _engine(self) -> Any:
        if reason := self.missing():
            raise ToolUnavailable(f"ocr: {reason}")
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        return RapidOCR(
            params={"EngineConfig.onnxruntime.intra_op_num_threads": 1, "Global.log_level": "error"}
        )  # fmt: skip
