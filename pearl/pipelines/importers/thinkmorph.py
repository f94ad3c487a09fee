"""`thinkmorph`: ThinkMorph's four datasets (Visual_Search, Jigsaw_Assembly, Chart_Refocus, Spatial_Navigation).

Parquet with the columns `pid`, `question`, `answer`, `problem_image_0`, `resoning_thought_0` (as they spell it),
`reasoning_image_0`, `resoning_thought_1`, `task`, `full_text_only_thought`. One step: the first thought leads to the
image, the second concludes. No call is recorded, so the image is kept under the tool `imagine`.
"""

from __future__ import annotations

import re

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import IMAGE_FOLLOWS, IMAGINE, Dialogue, Importer, text_of
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.replay import RecordedStep
from pearl.records import Observation, ToolCall

_TAGS = re.compile(r"</?(think|answer|image_start|image_end)>")


class ThinkMorph(Importer):
    name = "thinkmorph"
    columns = (
        "question", "answer", "problem_image_0", "resoning_thought_0", "reasoning_image_0", "resoning_thought_1", "task",
    )  # fmt: skip

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        if row.get("reasoning_image_0") is None:
            raise Rejected("no reasoning image")
        observation = Observation(IMAGE_FOLLOWS, images.read(row["reasoning_image_0"]))
        thought = _untagged(row.get("resoning_thought_0"), "the first thought")
        return Dialogue(
            image=images.read(row.get("problem_image_0")),
            question=text_of(row.get("question"), "the question").replace("<image>", "").strip(),
            steps=[RecordedStep(thought, ToolCall(IMAGINE, {"image": 0}), observation)],
            conclusion=_untagged(row.get("resoning_thought_1"), "the second thought"),
            answer=text_of(row.get("answer"), "the answer").strip(),
            skill=str(row.get("task") or "visual thought").replace("_", " ").lower(),
        )


def _untagged(text: object, what: str) -> str:
    return _TAGS.sub("", text_of(text, what)).strip()
