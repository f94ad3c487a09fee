"""A trajectory as turns of a conversation, in words that a template gives.

`full()` is the whole conversation; the source, target and direct views (docs/training.md) use its parts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from string import Template as Words
from typing import Any, ClassVar, Literal

from pearl.errors import PearlError
from pearl.records import EncodedImage, Step, Trajectory

Role = Literal["system", "user", "assistant"]
Supervision = Literal["all", "answer"]


class TemplateError(PearlError, ValueError):
    """A template that cannot be used; the message says which entry and why."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Where an image stands in a turn: an index into the conversation's distinct images."""

    index: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Who speaks, and text and images in their order. `supervised`: the model is to learn to say it."""

    role: Role
    parts: tuple[str | ImagePart, ...]
    supervised: bool = False


@dataclass(frozen=True)
class Template:
    """The words around what a trajectory holds; `$name` stands for its parts.

    Attributes:
        question: The first user turn's text; `$question`, `$choices`.
        choices: What `$choices` becomes where there are options; `$choices` is their list.
        step: An assistant turn; `$thought`, `$call` (JSON), `$tool`, `$box` (its first box, or nothing).
        observation: The text of a tool's turn, before its image; `$text`.
        conclusion: The last assistant turn; `$conclusion`, `$answer`.
        direct: The answer straight after the question; `$answer`.
        supervise: Which assistant turns are learned: all, or the one with the answer.
        system: A system turn's text; none when empty.
    """

    question: str
    choices: str
    step: str
    observation: str
    conclusion: str
    direct: str
    supervise: Supervision = "all"
    system: str = ""

    _NAMES: ClassVar[dict[str, set[str]]] = {
        "question": {"question", "choices"},
        "choices": {"choices"},
        "step": {"thought", "call", "tool", "box"},
        "observation": {"text"},
        "conclusion": {"conclusion", "answer"},
        "direct": {"answer"},
        "system": set[str](),
    }

    def __post_init__(self) -> None:
        for entry, names in self._NAMES.items():
            words = Words(getattr(self, entry))
            if not words.is_valid() or (unknown := set(words.get_identifiers()) - names):
                there = ", ".join(f"${name}" for name in sorted(names)) or "nothing"
                said = "a $ that starts no name" if not words.is_valid() else f"${', $'.join(sorted(unknown))}"
                raise TemplateError(f"template entry {entry!r} uses {said}; it may use {there}")
        if self.supervise not in ("all", "answer"):
            raise TemplateError(f"template entry 'supervise' is {self.supervise!r}; expected 'all' or 'answer'")


def template_names() -> list[str]:
    folder = files("pearl.trainer") / "templates"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_template(name: str) -> Template:
    """A template that ships with the package, by name, or a JSON file of the same entries, by path.

    Raises:
        TemplateError: there is none, it is no JSON object, or an entry is missing, unknown or wrong.
    """
    shipped = name in template_names()
    path = files("pearl.trainer") / "templates" / f"{name}.json" if shipped else Path(name)
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TemplateError(
            f"no template {name!r}: {error}; there are {', '.join(template_names())}, or give a JSON file"
        ) from error
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise TemplateError(f"the template {name} is not a JSON object of texts")
    known = {entry.name for entry in fields(Template)}
    if unknown := entries.keys() - known:
        raise TemplateError(f"the template {name} has unknown entries: {', '.join(sorted(unknown))}")
    try:
        return Template(**entries)
    except TypeError as error:
        raise TemplateError(f"the template {name}: {error}") from error


class Conversation:
    """The turns of one trajectory, and its distinct images.

    Attributes:
        images: The original image first; an image that stands several times is kept once.
        of_step: For each step, the index of its observation's image, or None.
    """

    def __init__(self, trajectory: Trajectory, template: Template) -> None:
        self.trajectory, self.template = trajectory, template
        self.images: list[EncodedImage] = [trajectory.image]
        known = {trajectory.image.data: 0}
        self.of_step: list[int | None] = []
        for step in trajectory.steps:
            image = step.observation.image
            if image is not None and image.data not in known:
                known[image.data] = len(self.images)
                self.images.append(image)
            self.of_step.append(None if image is None else known[image.data])

    def full(self, *, asked: bool = True) -> tuple[Turn, ...]:
        """The whole conversation; without the question unless `asked`."""
        return (*self.question(asked=asked), *self.steps(), self.conclusion())

    def question(self, suffix: str = "", *, asked: bool = True) -> tuple[Turn, ...]:
        """The system turn, if any, and the user's: the image, then the question unless not `asked`, then `suffix`."""
        system = [Turn("system", (self.template.system,))] if self.template.system else []
        text = (self._question() if asked else "") + suffix
        return (*system, Turn("user", (ImagePart(0), text) if text else (ImagePart(0),)))

    def steps(self) -> tuple[Turn, ...]:
        """For each step the assistant's turn and the tool's."""
        turns: list[Turn] = []
        for step, image in zip(self.trajectory.steps, self.of_step, strict=True):
            turns.append(Turn("assistant", (self.thought(step),), self.template.supervise == "all"))
            text = _filled(self.template.observation, text=step.observation.text)
            turns.append(Turn("user", (*([text] if text else []), *([] if image is None else [ImagePart(image)]))))
        return tuple(turns)

    def thought(self, step: Step) -> str:
        arguments = step.call.arguments
        boxes = arguments.get("boxes")
        box = arguments.get("box") or (boxes[0] if isinstance(boxes, list | tuple) and boxes else None)
        call = json.dumps({"name": step.call.tool, "arguments": dict(arguments)}, ensure_ascii=False)
        place = "" if box is None else json.dumps(box)
        return _filled(self.template.step, thought=step.thought, call=call, tool=step.call.tool, box=place)

    def conclusion(self) -> Turn:
        said = _filled(self.template.conclusion, conclusion=self.trajectory.conclusion, answer=self.trajectory.answer)
        return Turn("assistant", (said,), True)

    def direct(self) -> Turn:
        return Turn("assistant", (_filled(self.template.direct, answer=self.trajectory.answer),), True)

    def _question(self) -> str:
        options = ", ".join(self.trajectory.choices)
        choices = _filled(self.template.choices, choices=options, strip=False) if options else ""
        return _filled(self.template.question, question=self.trajectory.question, choices=choices)


def _filled(words: str, *, strip: bool = True, **values: str) -> str:
    """Chat templates may strip what they are given, so it is stripped here, where labels are made too."""
    text = Words(words).substitute(values)
    return text.strip() if strip else text
