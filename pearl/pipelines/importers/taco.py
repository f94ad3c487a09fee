"""`taco`: TACO's chains of thought and action (CoTA, arXiv 2412.05479), in either of its two forms.

    {"id": "7", "images": ["7/image-0.jpg", "7/image-1.jpg"], "conversation": [
      {"role": "user", "content": "<image>\\n# USER REQUEST #:\\nWhat …?\\nNow please generate your response:"},
      {"role": "assistant", "content": "{\\"thought\\": \\"…\\", \\"actions\\": [{\\"name\\": \\"Crop\\", \\"arguments\\":
        {\\"image\\": \\"image-0\\", \\"bbox\\": [0.3, 0.2, 0.5, 0.4]}}]}"},
      {"role": "user", "content": "OBSERVATION:\\n{'image': 'image-1'}\\nThe OBSERVATION can be incomplete …"},
      {"role": "assistant", "content": "{\\"thought\\": \\"…\\", \\"actions\\": [{\\"name\\": \\"Terminate\\",
        \\"arguments\\": {\\"answer\\": \\"red\\"}}]}"}]}

or `sample_id`, `image` and `conversations` with `from` and `value`. An observation is the `repr` of a Python dict on one
line; it is read as a literal, never evaluated. `image-N` counts the input images, then those that tools made, and is
the N-th of `images`, or the one with that name. Boxes are fractions. Their `Crop` takes half of the box's size more
around it, and draws the box; `ZoomIn` enlarges that. These two become our `crop` and `zoom`, with the box that was
cropped; every other tool keeps its name, its arguments and what it said.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import (
    IMAGE_FOLLOWS,
    Dialogue,
    Importer,
    Numbering,
    conversation,
    looked_at,
    numbers,
    whole_pixels,
    without_placeholders,
)
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.replay import RecordedStep
from pearl.records import Box, Observation, ToolCall

MARGIN = 0.5
MAX_LITERAL = 100_000
"""Characters of an observation."""
_PREFIX = "OBSERVATION:\n"
_NAMED = re.compile(r"^image-(\d+)\b")
_REQUEST = re.compile(r"# USER REQUEST #:\s*(.*?)\s*(?:Now please generate your response:\s*)?$", re.DOTALL)


class Taco(Importer):
    name = "taco"
    columns = ("images", "image", "conversation", "conversations")
    tools = ("crop", "zoom")

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        turns = [
            turn for turn in conversation(row.get("conversation") or row.get("conversations")) if turn[0] != "system"
        ]
        speakers = [who for who, _ in turns]
        if speakers != ["user", "assistant"] * (len(turns) // 2):
            raise Rejected("the turns do not alternate", ", ".join(speakers)[:80])
        files = row.get("images") or row.get("image") or []
        files = files if isinstance(files, list) else [files]
        observations = [observed(text) for _, text in turns[2::2]]
        _check_inputs(files, observations)
        image = images.read(_file(files, 0))
        known = Numbering("image-0", image)
        steps: list[RecordedStep] = []
        for (_, said), observation in zip(turns[1:-1:2], observations, strict=True):
            thought, tool, arguments = action(said)
            steps.append(self._step(thought, tool, arguments, observation, known, files, images))
            if (name := _image_name(observation)) is not None:
                recorded = steps[-1].observation
                known.add(name, len(steps), recorded.image if recorded else None)
        thought, tool, arguments = action(turns[-1][1])
        if tool != "Terminate" or arguments.get("answer") in (None, ""):
            raise Rejected("the last turn gives no answer", tool)
        return Dialogue(
            image=image,
            question=_question(turns[0][1]),
            steps=steps,
            conclusion=thought,
            answer=str(arguments["answer"]).strip(),
            skill="tool use",
        )

    def _step(
        self, thought: str, tool: str, arguments: Mapping[str, Any], observation: Mapping[str, Any], known: Numbering,
        files: Sequence[Any], images: Images,
    ) -> RecordedStep:  # fmt: skip
        ours = _our_call(tool, arguments, known)
        call = ours or ToolCall(tool, _renumbered(arguments, known))
        name = _image_name(observation)
        if name is None:
            if ours is not None:
                raise Rejected("a crop shows no image", _said(observation)[:80])
            return self.recorded(thought, call, Observation(_said(observation)), known=False)
        file = _file(files, int(name.removeprefix("image-")))
        shown = None if file is None else Observation(_said(observation), images.read(file))
        return self.recorded(thought, call, shown, known=ours is not None)


def action(text: str) -> tuple[str, str, Mapping[str, Any]]:
    """An assistant turn: the thought, the tool's name, its arguments.

    Raises:
        Rejected: it is not JSON, or has not one action.
    """
    try:
        said = json.loads(text)
        thought, actions = said["thought"], said["actions"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise Rejected("an assistant turn is not JSON with a thought and actions", text[:80]) from None
    if not isinstance(actions, list) or len(actions) != 1:
        raise Rejected("a turn has not one action", str(actions)[:80])
    only = actions[0] if isinstance(actions[0], Mapping) else {}
    name, arguments = only.get("name"), only.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise Rejected("an action lacks its name or arguments", str(actions[0])[:80])
    return str(thought or "").strip(), name, arguments


def observed(text: str) -> Mapping[str, Any]:
    """What a tool returned, from the `repr` of a dict.

    Raises:
        Rejected: it is something else: mostly a message that the call failed.
    """
    start = text.find(_PREFIX)
    literal = text[start + len(_PREFIX) :].partition("\n")[0].strip()
    if start < 0:
        raise Rejected("a turn is no observation", text[:80])
    if len(literal) > MAX_LITERAL:
        raise Rejected("an observation is too long", f"{len(literal):,} characters")
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Rejected("an observation is no Python literal", literal[:80]) from None
    if not isinstance(value, Mapping) or not value:
        raise Rejected("an observation is no dict", literal[:80])
    return value


def _question(text: str) -> str:
    requests = text.rpartition("# USER REQUEST #:")
    found = _REQUEST.search("".join(requests[1:])) if requests[1] else None
    return without_placeholders(found[1] if found else text)


def _check_inputs(files: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> None:
    """A trajectory begins with one image: the first that a tool made must be image-1."""
    made = [int(name.removeprefix("image-")) for one in observations if (name := _image_name(one)) is not None]
    inputs = min(made, default=len(files))
    if inputs != 1:
        raise Rejected("no image" if inputs == 0 else "more than one input image", str(inputs))


def _image_name(observation: Mapping[str, Any]) -> str | None:
    """`image-N`, which may be followed by where the file lay."""
    found = _NAMED.match(str(observation.get("image") or ""))
    return None if found is None else found[0]


def _file(files: Sequence[Any], number: int) -> Any:
    """The file of `image-N`: the one of that name, else the N-th; None where there is neither."""
    wanted = f"image-{number}"
    if named := [file for file in files if _stem(file) == wanted]:
        return named[0]
    return files[number] if number < len(files) and not _NAMED.fullmatch(_stem(files[number])) else None


def _stem(file: Any) -> str:
    path = file.get("path") if isinstance(file, Mapping) else file
    return PurePosixPath(path).stem if isinstance(path, str) else ""


def _said(observation: Mapping[str, Any]) -> str:
    """The observation's text: JSON of what it says besides its image."""
    rest = {key: value for key, value in observation.items() if key != "image"}
    return json.dumps(rest, ensure_ascii=False, default=str) if rest else IMAGE_FOLLOWS


def _renumbered(value: Any, known: Numbering) -> Any:
    """Arguments with `image-N` in our numbers."""
    if isinstance(value, Mapping):
        return {str(key): _renumbered(one, known) for key, one in value.items()}
    if isinstance(value, list):
        return [_renumbered(one, known) for one in value]
    found = _NAMED.fullmatch(value) if isinstance(value, str) else None
    return known.number(value) if found else value


def _our_call(tool: str, arguments: Mapping[str, Any], known: Numbering) -> ToolCall | None:
    """The call of our tool that shows the same part of the image; None where we have no such tool."""
    if tool not in ("Crop", "ZoomIn"):
        return None
    name = arguments.get("image")
    number, size = known.number(name), known.size(name)
    if size is None:
        raise Rejected("a recorded image is missing", str(name))
    call = looked_at(number, carried_out(_box(arguments.get("bbox")), size))
    factor = arguments.get("zoom_factor", 2)
    if tool == "Crop":
        return call
    if not isinstance(factor, int | float) or not 1 <= factor <= 8:
        return None
    return ToolCall("zoom", {**call.arguments, "factor": factor})


def _box(value: Any) -> list[float]:
    if isinstance(value, str) and len(value) < 200:
        try:
            value = json.loads(value)
        except ValueError:
            raise Rejected("a box is not four numbers", value) from None
    box = numbers(value)
    if not all(0 <= corner <= 1 for corner in box):
        raise Rejected("a box is inverted, empty or outside the image", str(box))
    return box


def carried_out(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The box that was cropped when the model said `box`, in fractions of an image of `size`.

    Raises:
        Rejected: nothing is left of it.
    """
    width, height = size
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    across, down = (right - left) * MARGIN / 2, (bottom - top) * MARGIN / 2
    corners = max(0, left - across), max(0, top - down), min(width, right + across), min(height, bottom + down)
    return whole_pixels(corners, size)
