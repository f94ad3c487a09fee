"""Questions made from annotated boxes: counting, presence, left or right, larger, closer, text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from pearl.boxes import area, overlap, shorter_side
from pearl.randomness import generator
from pearl.records import Box, Region
from pearl.tools.depth import SURE

MIN_SIDE = 0.03
LARGER, LARGER_BY_BOX = 1.6, 3.2
"""How many times larger one box must be than the other to call its object larger: the first where masks are known or the
regions are text; the second where only boxes are, since an object may fill a third of its box or all of it."""
LARGER_ITSELF = 1.4
MAX_COUNTED = 4
MAX_LOOKED_AT = 4
MAX_QUOTED = 32
"""A longer text is no name for the place where it stands."""
SKILLS = ("counting", "existence", "spatial relation", "comparison", "depth", "text")
"""In the order in which they are asked."""


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's boxes, and what cannot be asked about them.

    Attributes:
        regions: Those with an attribute `text` are lines of text; an attribute `nearness`, from 0 (farthest) to 1, says
            which of two is closer; an attribute `area`, in the unit of the others, how much of the picture the object
            itself takes up.
        crowded: Labels about which nothing can be asked, because a crowd of them is there or it is unsure which regions
            bear them.
        uncounted: Labels that name a region, but that no question of number or presence is about.
    """

    regions: tuple[Region, ...]
    crowded: frozenset[str]
    uncounted: frozenset[str] = frozenset()


def questions_from_boxes(
    image: AnnotatedImage, categories: Sequence[str], seed: int, image_key: str
) -> Iterator[dict[str, Any]]:
    """At most one question a skill, as the fields of a sample. The same image, seed and key give the same questions.

    The answer of "closer" is empty where no nearness is annotated: boxes do not tell, a depth estimate must.
    """
    rng = generator("box-questions", seed, image_key)
    for ask in (_counting, _presence, _left_or_right, _larger, _closer, _text):
        asked = ask(image, categories, rng)
        if asked is not None:
            yield asked


def _counting(image: AnnotatedImage, _: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    """The number is drawn before the label, as ones are the commonest."""
    counts = Counter(region.label for region in image.regions)
    closed = image.crowded | image.uncounted
    hidden = {region.label for region in image.regions if not _is_visible(region.box)}
    fitting = sorted(n for n, k in counts.items() if k <= MAX_COUNTED and n not in closed | hidden)
    if not fitting:
        return None
    count = int(rng.choice(sorted({counts[name] for name in fitting})))
    name = str(rng.choice([name for name in fitting if counts[name] == count]))
    matches = [i for i, region in enumerate(image.regions) if region.label == name]
    query = {"matches": matches, "plural": f"instances of “{name}”"}
    choices = [str(n) for n in range(1, MAX_COUNTED + 1)]
    return _asked("counting", f"How many instances of “{name}” are there?", choices, str(count), query)


def _presence(image: AnnotatedImage, categories: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    """Only where both answers are possible, so that being asked says nothing."""
    here = {region.label for region in image.regions} | image.crowded
    present = [i for i, region in enumerate(image.regions) if region.label not in image.uncounted]
    looked_at = [i for i in present if _is_visible(image.regions[i].box)]
    absent = [name for name in categories if name not in here]
    certain = [i for i in looked_at if image.regions[i].label not in image.crowded]
    if not (absent and certain and len(looked_at) == len(present) <= MAX_LOOKED_AT):
        return None
    if rng.random() < 0.5:
        matches = candidates = _shuffled(rng, certain)[:1]
        name, answer = image.regions[matches[0]].label, "yes"
    else:
        name, answer, candidates, matches = str(rng.choice(absent)), "no", looked_at, []
    query = {"candidates": candidates, "matches": matches, "name": name}
    return _asked("existence", f"Can “{name}” be seen in the picture?", ["yes", "no"], answer, query)


def _left_or_right(image: AnnotatedImage, _: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    for first, second in _pairs(image, rng):
        a, b = image.regions[first], image.regions[second]
        gap = (b.box[0] + b.box[2] - a.box[0] - a.box[2]) / 2
        if abs(gap) > 0.12:
            text = f"Is the {a.label} to the left or to the right of the {b.label}?"
            query = {**_two(image, first, second), "axis": "x"}
            return _asked("spatial relation", text, ["left", "right"], "left" if gap > 0 else "right", query)
    return None


def _larger(image: AnnotatedImage, _: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    for first, second in _pairs(image, rng):
        if _is_larger(image.regions[first], image.regions[second]):
            larger = 0
        elif _is_larger(image.regions[second], image.regions[first]):
            larger = 1
        else:
            continue
        query = {**_two(image, first, second), "by": "size"}
        names = query["names"]
        text = f"Which takes up more of the picture, {names[0]} or {names[1]}?"
        return _asked("comparison", text, names, names[larger], query)
    return None


def _is_larger(one: Region, other: Region) -> bool:
    """For certain: by its box, and itself. Lines of text fill their boxes."""
    by_box = area(one.box) / area(other.box)
    known = one.attributes.keys() & other.attributes.keys()
    if "area" in known:
        return by_box > LARGER and float(one.attributes["area"]) > LARGER_ITSELF * float(other.attributes["area"])
    return by_box > (LARGER if "text" in known else LARGER_BY_BOX)


def _closer(image: AnnotatedImage, _: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    for first, second in _pairs(image, rng):
        query = _two(image, first, second)
        names = query["names"]
        if (answer := _nearer(image, (first, second), names)) is not None:
            return _asked("depth", f"Which is closer to the camera, {names[0]} or {names[1]}?", names, answer, query)
    return None


def _nearer(image: AnnotatedImage, pair: tuple[int, int], names: Sequence[str]) -> str | None:
    """The name of the nearer one; empty where no nearness is annotated, None where it is too close to call."""
    readings = [image.regions[i].attributes.get("nearness") for i in pair]
    if None in readings:
        return ""
    first, second = (float(reading) for reading in readings if reading is not None)
    return None if abs(first - second) < SURE else names[0 if first > second else 1]


def _text(image: AnnotatedImage, _: Sequence[str], rng: np.random.Generator) -> dict[str, Any] | None:
    lines = [i for i, region in enumerate(image.regions) if "text" in region.attributes]
    certain = [i for i in lines if image.regions[i].label not in image.crowded]
    asked = [(i, name) for i in certain for name in _places(image, lines, i)]
    for index, name in _shuffled(rng, asked):
        query = {"targets": [index], "names": [name]}
        return _asked("text", f"What does {name} say?", [], image.regions[index].attributes["text"], query)
    return None


def _places(image: AnnotatedImage, lines: Sequence[int], line: int) -> Iterator[str]:
    """What a line of text can be called by its place alone, so that no other line is meant."""
    box, others = image.regions[line].box, [image.regions[i].box for i in lines if i != line]
    if not others:
        yield "the text in the picture"
    elif all(box[3] <= other[1] for other in others):
        yield "the topmost line of text"
    elif all(box[1] >= other[3] for other in others):
        yield "the lowest line of text"
    counts = Counter(region.label for region in image.regions)
    for region in image.regions:
        unique = counts[region.label] == 1 and region.label not in image.crowded | image.uncounted
        if unique and _inside(box, region.box) and all(overlap(other, region.box) == 0 for other in others):
            yield f"the text on the {region.label}"


def _pairs(image: AnnotatedImage, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of objects that are each the only one of their category, and lie apart."""
    counts = Counter(region.label for region in image.regions)
    single = [
        i
        for i, region in enumerate(image.regions)
        if counts[region.label] == 1 and region.label not in image.crowded and _is_visible(region.box)
        if len(region.attributes.get("text", "")) <= MAX_QUOTED
    ]
    pairs = [pair for pair in permutations(single, 2) if overlap(*(image.regions[i].box for i in pair)) < 0.3]
    return _shuffled(rng, pairs)


def _two(image: AnnotatedImage, first: int, second: int) -> dict[str, Any]:
    return {"targets": [first, second], "names": [f"the {image.regions[i].label}" for i in (first, second)]}


def _asked(skill: str, question: str, choices: list[str], answer: str, query: dict[str, Any]) -> dict[str, Any]:
    return {"skill": skill, "question": question, "choices": choices, "answer": answer, "query": query}


def _shuffled(rng: np.random.Generator, items: Sequence[Any]) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def _is_visible(box: Box) -> bool:
    return shorter_side(box) >= MIN_SIDE


def _inside(box: Box, outer: Box) -> bool:
    """Whether nearly all of a smaller box lies in another."""
    return area(box) < area(outer) and overlap(box, outer) > 0.9
