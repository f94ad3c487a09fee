"""What vlm-nano is asked about a scene: the families of `pearl.scenes.questions`, and objects of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pearl.records import Box, Point
from pearl.scenes.layout import Split, scene_rng
from pearl.scenes.questions import FAMILIES, USUAL, Question, View
from pearl.scenes.render import Scene

ANY_COLOUR, ANY_SHAPE = "colour of any", "shape of any"
COUNTS = {
    ANY_COLOUR: 12, ANY_SHAPE: 12, "attribute": 8, "shape": 8, "existence": 12, "counting": 16, "spatial relation": 12,
    "depth": 20, "relative depth": 4, "nearest": 16, "comparison": 16, "chain": 20,
}  # fmt: skip
"""How often each family is tried on one training scene; what comes out twice is kept once."""


@dataclass(frozen=True)
class Asked:
    """One question about one scene.

    Attributes:
        kind: What must be as frequent as its alternatives within the family, so that no shortcut pays: the answer,
            or which of the cues "lower is nearer" and "bigger is nearer" mislead.
        target: The box of the one object that the question is about, where there is one.
        points: To be marked in the picture with the letters of `choices`.
    """

    skill: str
    text: str
    choices: tuple[str, ...]
    answer: str
    kind: str = ""
    target: Box | None = None
    points: tuple[Point, ...] = ()

    def record(self) -> list[Any]:
        return [self.skill, self.text, self.choices, self.answer, self.kind, self.target, self.points]

    @classmethod
    def read(cls, record: list[Any]) -> Asked:
        skill, text, choices, answer, kind, target, points = record
        box = None if target is None else (target[0], target[1], target[2], target[3])
        return cls(skill, text, tuple(choices), answer, kind, box, tuple((x, y) for x, y in points))

    def mirrored(self) -> Asked:
        """The same about the picture with left and right exchanged."""
        sides = {"left": "right", "right": "left"}
        beside = {f"Of the objects to the {side}": f"Of the objects to the {sides[side]}" for side in sides}
        start = next((start for start in beside if self.text.startswith(start)), None)
        text = self.text if start is None else beside[start] + self.text.removeprefix(start)
        target = (
            None if self.target is None else (1 - self.target[2], self.target[1], 1 - self.target[0], self.target[3])
        )
        points = tuple((1 - x, y) for x, y in self.points)
        answer = sides.get(self.answer, self.answer)
        return Asked(self.skill, text, self.choices, answer, self.kind, target, points)


def asked(question: Question, view: View) -> Asked:
    targets = question.query.get("targets", ())
    target = view.seen[targets[0]].box if len(targets) == 1 else None
    kind = _kind(question, view)
    return Asked(question.skill, question.text, question.choices, question.answer, kind, target, question.points)


def _kind(question: Question, view: View) -> str:
    query = question.query
    if question.skill == "depth":
        near, far = sorted(query["targets"], key=lambda i: view.seen[i].depth)
        return str(view.misleading(near, [far]))
    if question.skill == "nearest":
        return str(view.misleading(query["target"], [i for i in query["candidates"] if i != query["target"]]))
    if question.skill == "relative depth":
        near = query["names"].index(question.answer)
        return str(query["points"][near][1] < query["points"][1 - near][1])
    if query.get("attribute"):
        return str(query.get("form", ""))
    return f"{query.get('form', query.get('by', ''))} {question.answer if len(question.answer) < 6 else ''}"


def ask_measure(name: str, measure: str, level: int) -> Asked:
    """Where an object is, in the tenths in which a tool call says it, or how far away: what it takes to say "left of",
    "closer" and boxes."""
    text = f"How far away is {name}?" if measure == "far" else f"Where is the {measure} of {name}?"
    return Asked(measure, text, (), f"0.{level}")


def _ask_any(attribute: str) -> Callable[[View], Question | None]:
    def ask(view: View) -> Question | None:
        for target in view.shuffled(view.clear):
            if name := view.name(target, without=attribute):
                answer = view.value(target, attribute)
                text = view.pick([f"What {attribute} is the {name}?", f"Which {attribute} does the {name} have?"])
                skill = ANY_COLOUR if attribute == "colour" else ANY_SHAPE
                query = {"targets": [target], "attribute": attribute}
                return Question(skill, text, view.options(attribute, answer), answer, query)
        return None

    return ask


ASKS: dict[str, Callable[[View], Question | None]] = {
    ANY_COLOUR: _ask_any("colour"),
    ANY_SHAPE: _ask_any("shape"),
    **{name: FAMILIES[name][0] for name in USUAL},
}


def ask_all(scene: Scene, split: Split, seed: int, index: int) -> list[Asked]:
    """Every distinct question that the tries of `COUNTS` give on this scene."""
    view = View(scene, scene_rng(split, seed, index, "vlm-nano"))
    found = {}
    for family, tries in COUNTS.items():
        for _ in range(tries):
            question = ASKS[family](view)
            if question is not None:
                found[question.text, question.choices if question.points else ()] = asked(question, view)
    return list(found.values())
