"""`visual-cot`: Visual-CoT (arXiv 2403.16999), its conversations for LLaVA.

    {"dataset": "docvqa", "split": "train", "question_id": 3,
     "image": ["cot/docvqa/3.png", "cot/docvqa/3.png###[89, 356, 125, 370]"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat …? Please provide the bounding box coordinate of …"},
                       {"from": "gpt", "value": "[0.133, 0.532, 0.187, 0.553]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "…"}]}

The same region stands there twice. After `###`: whole pixels of the image. In the first reply: fractions, with three
decimals, of the image padded to a square, that is of its longer side, where the shorter one has half of the difference
(rounded down) before it. The pixels are cropped; where the two contradict each other the row is rejected, and where
there is no `###` the padding is taken off.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import (
    LOOK_CLOSER,
    Dialogue,
    Importer,
    conversation,
    looked_at,
    numbers,
    size_of,
    text_of,
    whole_pixels,
    without_placeholders,
)
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.replay import RecordedStep

ROUNDING = 0.0005
"""Of the replies' fractions, which have three decimals."""
_INSTRUCTION = re.compile(
    r"\s*Please (think step by step and )?provide the bounding box coordinates? of the region that can help you answer"
    r" the question better\.\s*$",
    re.IGNORECASE,
)


class VisualCot(Importer):
    name = "visual-cot"
    columns = ("dataset", "image", "conversations")

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        turns = conversation(row.get("conversations"))
        if [who for who, _ in turns] != ["user", "assistant"] * 2:
            raise Rejected("not a question, a box, an image and an answer", str(len(turns)))
        path, pixels = _image_and_box(row.get("image"))
        image = images.read(path)
        size = size_of(image)
        square = numbers(_list(turns[1][1]))
        box = whole_pixels(_agreed(pixels, square, size), size)
        return Dialogue(
            image=image,
            question=_INSTRUCTION.sub("", without_placeholders(turns[0][1])),
            steps=[RecordedStep(LOOK_CLOSER, looked_at(0, box))],
            conclusion=turns[3][1].strip(),
            answer=turns[3][1].strip(),
            skill="grounding",
            origin=str(row.get("dataset") or ""),
        )


def _image_and_box(value: Any) -> tuple[str, list[float] | None]:
    """The image's path, and the box in pixels if there is one."""
    entries = value if isinstance(value, list) else [value]
    paths = [text_of(entry, "an image's path") for entry in entries]
    if not 1 <= len(paths) <= 2:
        raise Rejected("not an image and its region", str(len(paths)))
    path, mark, box = paths[-1].partition("###")
    if path != paths[0].partition("###")[0]:
        raise Rejected("more than one input image", str(paths))
    return path, numbers(_list(box)) if mark else None


def _list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Rejected("a box is not four numbers", text[:80]) from None


def off_the_square(box: list[float], size: tuple[int, int]) -> list[float]:
    """A box in fractions of the square that an image of `size` was padded to, in pixels of the image."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return [box[0] * side - left, box[1] * side - top, box[2] * side - left, box[3] * side - top]


def _agreed(pixels: list[float] | None, square: list[float], size: tuple[int, int]) -> list[float]:
    """The box in pixels of the image.

    Raises:
        Rejected: the row's two boxes are not the same region.
    """
    unpadded = off_the_square(square, size)
    tolerance = ROUNDING * max(size) + 1  # the pixels were rounded too
    if pixels is None:
        sides = zip(unpadded, size * 2, strict=True)
        return [min(max(round(v), 0), side) if -tolerance <= v <= side + tolerance else v for v, side in sides]
    if any(abs(a - b) > tolerance for a, b in zip(pixels, unpadded, strict=True)):
        raise Rejected("its two boxes contradict each other", f"{pixels} and {[round(v, 1) for v in unpadded]} pixels")
    return pixels
