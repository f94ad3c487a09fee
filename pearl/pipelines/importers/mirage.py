"""`mirage`: the JSON lines of Mirage (Machine Mental Imagery, arXiv 2506.17218).

    {"text_input": "<image>\\nWhich path …?", "text_output": "I draw it. <output_image> So it is \\\\boxed{B}.",
     "image_input": "maps/7.png", "image_output": "maps/7_path.png"}

`image_input` may be a list of one path. One helper image a row, which stands where `<output_image>` is, or before the
text: what is said before it is the thought, what comes after concludes. No call is recorded, so the image is kept
under the tool `imagine`.
"""

from __future__ import annotations

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import (
    IMAGE_FOLLOWS,
    IMAGINE,
    Dialogue,
    Importer,
    final_answer,
    only_image,
    text_of,
    without_placeholders,
)
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.replay import RecordedStep
from pearl.records import Observation, ToolCall

MARK = "<output_image>"
IMAGINED = "I picture to myself what helps to answer."
"""The thought of a row that says nothing before its helper image."""


class Mirage(Importer):
    name = "mirage"
    columns = ("text_input", "text_output", "image_input", "image_output")

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        before, *after = text_of(row.get("text_output"), "the output text").split(MARK)
        if len(after) > 1:
            raise Rejected("more than one helper image", str(len(after)))
        thought, last = (before, after[0]) if after else ("", before)
        if row.get("image_output") is None:
            raise Rejected("no helper image")
        conclusion, answer = final_answer(last)
        observation = Observation(IMAGE_FOLLOWS, images.read(only_image(row["image_output"])))
        return Dialogue(
            image=images.read(only_image(row.get("image_input"))),
            question=without_placeholders(text_of(row.get("text_input"), "the question")),
            steps=[RecordedStep(thought.strip() or IMAGINED, ToolCall(IMAGINE, {"image": 0}), observation)],
            conclusion=conclusion,
            answer=answer,
            skill="visual thought",
        )
