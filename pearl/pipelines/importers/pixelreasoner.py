"""`pixelreasoner`: PixelReasoner-SFT-Data (arXiv 2505.15966), JSON or Parquet with an image folder.

    {"message_list": [
      {"role": "system", "content": [{"text": "…tools…", "image": null, "video": null}]},
      {"role": "user", "content": [{"text": "What …?"}, {"image": "images/7.jpg"}]},
      {"role": "assistant", "content": [{"text": "I look closer. <tool_call>\\n{\\"name\\": \\"crop_image_normalized\\",
        \\"arguments\\": {\\"bbox_2d\\": [0.1, 0.2, 0.3, 0.4], \\"target_image\\": 1}}\\n</tool_call>"}]},
      {"role": "user", "content": [{"text": "Here is the cropped image:"}, {"image": "images/7_crop.jpg"}]},
      {"role": "assistant", "content": [{"text": "It is \\\\boxed{red}."}]}]}

Keys that a part does not have may be null. `target_image` counts the images of the conversation from 1. A box is
in fractions if its four numbers are below 1, else in pixels; the crop that was carried out is larger by 0.1 of the
image on each side, at most 600 pixels, cut off to whole pixels. That larger box is what the step's call says, so that
our `crop` shows what theirs showed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import (
    IMAGE_FOLLOWS,
    Dialogue,
    Importer,
    Numbering,
    final_answer,
    looked_at,
    numbers,
    only_image,
    whole_pixels,
    without_placeholders,
)
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.replay import RecordedStep
from pearl.records import Box, Observation, ToolCall

CROPS = ("crop_image_normalized", "crop_image", "zoom_in")
"""Names of one and the same tool."""
PADDING, MOST_PADDING = 0.1, 600.0
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    role: str
    text: str
    images: Sequence[Any]


class PixelReasoner(Importer):
    name = "pixelreasoner"
    columns = ("message_list", "answer")

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        asked, *turns = [message for message in _messages(row.get("message_list")) if message.role != "system"]
        if asked.role != "user" or not turns or turns[-1].role != "assistant":
            raise Rejected("the conversation does not lead from a question to an answer")
        if len(turns) % 2 == 0:
            raise Rejected("the turns do not alternate", str(len(turns)))
        image = images.read(only_image(list(asked.images)))
        known = Numbering(1, image)
        steps: list[RecordedStep] = []
        for said, shown in zip(turns[:-1:2], turns[1::2], strict=True):
            steps.append(self._step(said, shown, known, images))
            if (observation := steps[-1].observation) is not None and observation.image is not None:
                known.add(known.count + 1, len(steps), observation.image)
        if _CALL.search(turns[-1].text):
            raise Rejected("the last turn is a call")
        conclusion, answer = final_answer(turns[-1].text)
        return Dialogue(
            image=image,
            question=without_placeholders(asked.text),
            steps=steps,
            conclusion=conclusion,
            answer=str(row.get("answer") or answer).strip(),
            skill="visual search",
        )

    def _step(self, said: Message, shown: Message, known: Numbering, images: Images) -> RecordedStep:
        if (said.role, shown.role) != ("assistant", "user"):
            raise Rejected("the turns do not alternate", f"{said.role}, {shown.role}")
        thought, tool, arguments = _called(said.text)
        if len(shown.images) > 1:
            raise Rejected("an observation has more than one image", str(len(shown.images)))
        picture = images.read(shown.images[0]) if shown.images else None
        observation = Observation(without_placeholders(shown.text) or IMAGE_FOLLOWS, picture)
        target = _target(arguments)
        if tool not in CROPS:
            kept = {key: value for key, value in arguments.items() if value is not None and key != "target_image"}
            return self.recorded(thought, ToolCall(tool, {**kept, "image": known.number(target)}), observation, False)
        if picture is None:
            raise Rejected("a crop shows no image", shown.text[:80])
        size = known.size(target)
        assert size is not None, "every image of this format is recorded"
        call = looked_at(known.number(target), carried_out(numbers(arguments.get("bbox_2d")), size))
        return self.recorded(thought, call, observation, known=True)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Rejected("there is no conversation")
    return [_message(one) for one in value]


def _message(value: Any) -> Message:
    content = value.get("content") if isinstance(value, Mapping) else None
    if isinstance(content, str):
        content = [{"text": content}]
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Rejected("a message is not a list of parts", str(value)[:80])
    parts = [(kind, part[kind]) for part in content for kind in part if part[kind] is not None]
    if any(kind == "video" for kind, _ in parts):
        raise Rejected("video")
    text = "".join(str(given) for kind, given in parts if kind == "text")
    return Message(str(value.get("role")), text, [given for kind, given in parts if kind == "image"])


def _called(text: str) -> tuple[str, str, Mapping[str, Any]]:
    """The thought before the call, the tool's name, its arguments."""
    calls = _CALL.findall(text)
    if len(calls) != 1:
        raise Rejected("a turn has not one call", str(len(calls)))
    try:
        call = json.loads(calls[0])
        name, arguments = call["name"], call["arguments"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise Rejected("a call is not JSON", calls[0].strip()[:80]) from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise Rejected("a call is not JSON", calls[0].strip()[:80])
    return text.partition("<tool_call>")[0].strip(), name, arguments


def _target(arguments: Mapping[str, Any]) -> int:
    """Which image of the conversation, counted from 1; the first where it is not said."""
    try:
        return int(arguments.get("target_image") or 1)
    except (ValueError, TypeError, OverflowError):
        raise Rejected("a call names an image that is not there", str(arguments["target_image"])[:80]) from None


def carried_out(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The box that was cropped when the model said `box`, in fractions of an image of `size`.

    Raises:
        Rejected: nothing is left of it.
    """
    scale = (1.0, 1.0) if all(value < 1 for value in box) else size
    corners = []
    for place, sign in ((0, -1), (1, -1), (2, 1), (3, 1)):
        side = size[place % 2]
        padded = box[place] / scale[place % 2] + sign * min(PADDING, MOST_PADDING / side)
        corners.append(int(min(max(padded, 0.0), 1.0) * side))
    return whole_pixels(corners, size)
