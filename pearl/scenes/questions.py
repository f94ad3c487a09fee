"""Questions about a rendered scene, whose answers need a closer look, depth, or both.

Every family balances its answers by deciding *first* what the answer (or the misleading cue) shall be and then
looking for objects that fit; a scene without any is passed over. `query` is what the expert reads: its numbers are
indices into the regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from pearl.boxes import area, centre
from pearl.records import Point, Region
from pearl.scenes.layout import COLOURS, SHAPES
from pearl.scenes.render import Scene, SeenThing

REFERENCE_SIZE = 384
MIN_PIXELS = 110
MIN_VISIBLE = 0.55
SMALL_SIDE = 0.11
DEPTH_GAP = 1.12
PLACE_GAP = 0.04
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "highest": (1, 1), "lowest": (1, -1)}
"""Axis of the centre, and whether the least (1) or the greatest is meant."""
PLURALS = {shape: shape + "s" for shape in SHAPES}


@dataclass(frozen=True)
class Question:
    """`points` are to be marked in the picture, with the letters of `choices`, before it is shown."""

    skill: str
    text: str
    choices: tuple[str, ...]
    answer: str
    query: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[Point, ...] = ()


class View:
    """What can be asked about a scene: its visible objects, which of them are clear, and their names."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self.seen = scene.seen
        least = MIN_PIXELS * (scene.image.shape[0] / REFERENCE_SIZE) ** 2
        self.clear = [i for i, t in enumerate(self.seen) if t.pixels >= least and t.visible >= MIN_VISIBLE]
        self.doubtful = [i for i in range(len(self.seen)) if i not in self.clear]

    def value(self, index: int, attribute: str) -> str:
        return str(getattr(self.seen[index].thing, attribute))

    def having(self, attribute: str, value: str) -> list[int] | None:
        """All objects with that attribute, if every one of them is clearly visible; else None."""
        found = [i for i in range(len(self.seen)) if self.value(i, attribute) == value]
        return None if any(i in self.doubtful for i in found) else found

    def name(self, index: int, without: str = "") -> str | None:
        """The shortest name that fits this object alone, such as "red cone"; `without` one attribute."""
        forms = (["shape"], ["colour", "shape"], ["material", "shape"], ["colour", "material", "shape"])
        nameless = (["colour"], ["colour", "material"])
        for form in nameless if without == "shape" else forms:
            if without in form or ("material" in form and self.value(index, "material") != "checkered"):
                continue
            values = [self.value(index, attribute) for attribute in form]
            others = (i for i in range(len(self.seen)) if i != index)
            if not any(all(self.value(i, a) == v for a, v in zip(form, values, strict=True)) for i in others):
                return " ".join([*values, "object"] if without == "shape" else values)
        return None

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        return [items[i] for i in self.rng.permutation(len(items))]

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def coin(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def named_pairs(self, without: str = "") -> list[tuple[int, int]]:
        named = [i for i in self.clear if self.name(i, without)]
        return self.shuffled(list(permutations(named, 2)))

    def options(self, attribute: str, answer: str) -> tuple[str, ...]:
        """Four options: the answer, then values that the scene has, then others."""
        here = {self.value(i, attribute) for i in self.clear} - {answer}
        everything = set(COLOURS if attribute == "colour" else SHAPES) - {answer} - here
        return tuple(self.shuffled([answer, *(self.shuffled(sorted(here)) + self.shuffled(sorted(everything)))[:3]]))

    def is_lower(self, first: int, second: int) -> bool:
        return self.seen[first].box[3] > self.seen[second].box[3]

    def is_bigger(self, first: int, second: int) -> bool:
        return area(self.seen[first].box) > area(self.seen[second].box)

    def misleading(self, nearest: int, others: Sequence[int]) -> tuple[bool, bool]:
        """Whether "the lowest is nearest" and "the biggest is nearest" would be wrong."""
        return (
            not all(self.is_lower(nearest, other) for other in others),
            not all(self.is_bigger(nearest, other) for other in others),
        )


def regions(scene: Scene) -> tuple[Region, ...]:
    return tuple(
        Region(
            label=f"{seen.thing.colour} {seen.thing.shape}",
            box=seen.box,
            attributes={"colour": seen.thing.colour, "shape": seen.thing.shape, "material": seen.thing.material},
        )
        for seen in scene.seen
    )


def _is_small(seen: SeenThing) -> bool:
    return max(seen.box[2] - seen.box[0], seen.box[3] - seen.box[1]) <= SMALL_SIDE


def ask_attribute(view: View) -> Question | None:
    return _ask_about_small(view, "attribute", "colour")


def ask_shape(view: View) -> Question | None:
    return _ask_about_small(view, "shape", "shape")


def _ask_about_small(view: View, skill: str, attribute: str) -> Question | None:
    for target in view.shuffled([i for i in view.clear if _is_small(view.seen[i])]):
        if name := view.name(target, without=attribute):
            answer = view.value(target, attribute)
            text = view.pick([f"What {attribute} is the {name}?", f"Which {attribute} does the {name} have?"])
            query = {"targets": [target], "names": [f"the {name}"], "attribute": attribute}
            return Question(skill, text, view.options(attribute, answer), answer, query)
    return None


def ask_outermost(view: View) -> Question | None:
    attribute = "colour" if view.coin() else "shape"
    for word in view.shuffled(list(EXTREMES)):
        axis, sign = EXTREMES[word]
        places = [sign * centre(seen.box)[axis] for seen in view.seen]
        first, *others = sorted(range(len(places)), key=places.__getitem__)
        apart = bool(others) and places[others[0]] - places[first] >= PLACE_GAP
        if apart and first in view.clear and _is_small(view.seen[first]):
            answer = view.value(first, attribute)
            text = f"What {attribute} is the {word} object?"
            query = {"targets": [first], "names": [f"the {word} object"], "attribute": attribute}
            return Question("outermost", text, view.options(attribute, answer), answer, query)
    return None


def ask_existence(view: View) -> Question | None:
    wanted = view.coin()
    colours = {view.value(i, "colour") for i in view.clear}
    for shape in view.shuffled(sorted({view.value(i, "shape") for i in view.clear})):
        candidates = view.having("shape", shape)
        if candidates is None or len(candidates) > 3:
            continue
        present = {view.value(i, "colour") for i in candidates}
        fitting = present if wanted else colours - present
        if fitting:
            colour = view.pick(sorted(fitting))
            matches = [i for i in candidates if view.value(i, "colour") == colour]
            article = "an" if colour[0] in "aeiou" else "a"
            text = view.pick(
                [
                    f"Is there {article} {colour} {shape} in the picture?",
                    f"Does the picture show {article} {colour} {shape}?",
                ]
            )
            query = {"candidates": candidates, "matches": matches, "name": f"{colour} {shape}"}
            return Question("existence", text, ("yes", "no"), "yes" if wanted else "no", query)
    return None


def ask_counting(view: View) -> Question | None:
    wanted = int(view.rng.integers(1, 5))
    values = [("colour", c) for c in COLOURS] + [("shape", s) for s in SHAPES]
    for attribute, value in view.shuffled(values):
        matches = view.having(attribute, value)
        if matches is not None and len(matches) == wanted:
            plural = f"{value} objects" if attribute == "colour" else PLURALS[value]
            text = view.pick([f"How many {plural} are there?", f"How many {plural} does the picture show?"])
            query = {"matches": matches, "plural": plural}
            return Question("counting", text, ("1", "2", "3", "4"), str(wanted), query)
    return None


def ask_relation(view: View) -> Question | None:
    horizontal, positive = view.coin(), view.coin()
    words = ("left", "right") if horizontal else ("above", "below")
    for first, second in view.named_pairs():
        a, b = centre(view.seen[first].box), centre(view.seen[second].box)
        gap = b[0] - a[0] if horizontal else b[1] - a[1]
        if abs(gap) < 0.12 or (gap > 0) != positive:
            continue
        x, y = view.name(first), view.name(second)
        text = (
            f"Is the {x} to the left or to the right of the {y}?"
            if horizontal
            else f"In the picture, is the {x} above or below the {y}?"
        )
        query = {"targets": [first, second], "names": [f"the {x}", f"the {y}"], "axis": "x" if horizontal else "y"}
        return Question("spatial relation", text, words, words[0] if positive else words[1], query)
    return None


def ask_closer(view: View) -> Question | None:
    lower_misleads, size_misleads = view.coin(), view.coin()
    for first, second in view.named_pairs():
        near, far = sorted((first, second), key=lambda i: view.seen[i].depth)
        if view.seen[far].depth / view.seen[near].depth < DEPTH_GAP:
            continue
        if view.misleading(near, [far]) != (lower_misleads, size_misleads):
            continue
        names = [f"the {view.name(first)}", f"the {view.name(second)}"]
        text = view.pick(
            [
                f"Which is closer to the camera, {names[0]} or {names[1]}?",
                f"Which of the two is nearer, {names[0]} or {names[1]}?",
            ]
        )
        query = {"targets": [first, second], "names": names}
        return Question("depth", text, tuple(names), names[0] if near == first else names[1], query)
    return None


def ask_closer_point(view: View) -> Question | None:
    lower_misleads = view.coin()
    points: list[Point] = []
    depths: list[float] = []
    for index in view.shuffled(view.clear):
        x, y = centre(view.seen[index].box)
        size = view.scene.mask.shape[0]
        row, column = min(int(y * size), size - 1), min(int(x * size), size - 1)
        if view.scene.layout.things[view.scene.mask[row, column]] is view.seen[index].thing:
            points.append((round((column + 0.5) / size, 4), round((row + 0.5) / size, 4)))
            depths.append(float(view.scene.depth[row, column]))
    for a, b in permutations(range(len(points)), 2):
        near, far = (a, b) if depths[a] < depths[b] else (b, a)
        apart = abs(points[a][0] - points[b][0]) + abs(points[a][1] - points[b][1])
        if depths[far] / depths[near] < DEPTH_GAP or apart < 0.15:
            continue
        if (points[near][1] < points[far][1]) == lower_misleads:
            text = view.pick(
                ["Which marked point is closer to the camera, A or B?", "Which of the points A and B is nearer?"]
            )
            query = {"points": [points[a], points[b]], "names": ["A", "B"], "marked": True}
            answer = "A" if near == a else "B"
            return Question("relative depth", text, ("A", "B"), answer, query, (points[a], points[b]))
    return None


def ask_nearest(view: View) -> Question | None:
    lower_misleads, size_misleads = view.coin(), view.coin()
    for group, value in _groups(view):
        candidates = view.having(group, value)
        nearest = None if candidates is None else _outstanding(view, candidates, nearest=True)
        if candidates is None or nearest is None or len(candidates) > 5:
            continue
        others = [i for i in candidates if i != nearest]
        asked = "colour" if group == "shape" else "shape"
        answer = view.value(nearest, asked)
        if any(view.value(i, asked) == answer for i in others):
            continue
        if view.misleading(nearest, others) != (lower_misleads, size_misleads):
            continue
        which = value if group == "shape" else f"{value} object"
        text = view.pick(
            [
                f"What {asked} is the {which} that is nearest to the camera?",
                f"What {asked} is the {which} closest to the viewer?",
            ]
        )
        query = {"candidates": candidates, "plural": _plural(group, value), "target": nearest, "attribute": asked}
        return Question("nearest", text, view.options(asked, answer), answer, query)
    return None


def ask_comparison(view: View) -> Question | None:
    return _ask_size(view) if view.coin() else _ask_same_colour(view)


def _ask_size(view: View) -> Question | None:
    for first, second in view.named_pairs():
        a, b = view.seen[first], view.seen[second]
        larger, smaller = (a, b) if area(a.box) > area(b.box) else (b, a)
        if area(larger.box) < 1.6 * area(smaller.box) or larger.pixels < 1.4 * smaller.pixels:
            continue
        names = [f"the {view.name(first)}", f"the {view.name(second)}"]
        text = f"Which takes up more of the picture, {names[0]} or {names[1]}?"
        query = {"targets": [first, second], "names": names, "by": "size"}
        return Question("comparison", text, tuple(names), names[0] if larger is a else names[1], query)
    return None


def _ask_same_colour(view: View) -> Question | None:
    same = view.coin()
    for first, second in view.named_pairs(without="colour"):
        if (view.value(first, "colour") == view.value(second, "colour")) == same:
            names = [f"the {view.name(i, without='colour')}" for i in (first, second)]
            text = view.pick(
                [
                    f"Do {names[0]} and {names[1]} have the same colour?",
                    f"Is {names[0]} of the same colour as {names[1]}?",
                ]
            )
            query = {"targets": [first, second], "names": names, "by": "colour"}
            return Question("comparison", text, ("yes", "no"), "yes" if same else "no", query)
    return None


def ask_chain(view: View) -> Question | None:
    return view.pick([_ask_nearest_and_farthest, _ask_nearest_beside, _ask_how_many_nearer])(view)  # type: ignore[no-any-return]


def _ask_nearest_and_farthest(view: View) -> Question | None:
    same = view.coin()
    for shape in view.shuffled(SHAPES):
        candidates = view.having("shape", shape)
        if candidates is None or not 3 <= len(candidates) <= 6:
            continue
        nearest, farthest = (_outstanding(view, candidates, nearest=flag) for flag in (True, False))
        if nearest is None or farthest is None:
            continue
        if (view.value(nearest, "colour") == view.value(farthest, "colour")) == same:
            text = f"Does the {shape} nearest to the camera have the same colour as the farthest {shape}?"
            query = {"form": "ends", "candidates": candidates, "plural": PLURALS[shape], "targets": [nearest, farthest]}
            return Question("chain", text, ("yes", "no"), "yes" if same else "no", query)
    return None


def _ask_nearest_beside(view: View) -> Question | None:
    side = "left" if view.coin() else "right"
    asked = "colour" if view.coin() else "shape"
    for reference in view.shuffled(view.clear):
        name = view.name(reference)
        x = centre(view.seen[reference].box)[0]
        beyond = [i for i in range(len(view.seen)) if i != reference]
        offsets = {i: (x - centre(view.seen[i].box)[0]) * (1 if side == "left" else -1) for i in beyond}
        if name is None or any(-0.04 < offset < 0.04 for offset in offsets.values()):
            continue
        candidates = [i for i in beyond if offsets[i] > 0]
        if not 2 <= len(candidates) <= 5 or any(i in view.doubtful for i in candidates):
            continue
        nearest = _outstanding(view, candidates, nearest=True)
        if nearest is None or any(
            view.value(i, asked) == view.value(nearest, asked) for i in candidates if i != nearest
        ):
            continue
        answer = view.value(nearest, asked)
        text = f"Of the objects to the {side} of the {name}, what {asked} is the one nearest to the camera?"
        query = {
            "form": "beside", "reference": reference, "name": f"the {name}", "side": side, "candidates": candidates,
            "target": nearest, "attribute": asked,
        }  # fmt: skip
        return Question("chain", text, view.options(asked, answer), answer, query)
    return None


def _ask_how_many_nearer(view: View) -> Question | None:
    wanted = int(view.rng.integers(0, 4))
    for reference in view.shuffled(view.clear):
        name, own = view.name(reference), view.seen[reference].depth
        for shape in view.shuffled(SHAPES):
            candidates = view.having("shape", shape)
            if candidates is None or name is None or reference in candidates or not 2 <= len(candidates) <= 4:
                continue
            ratios = [view.seen[i].depth / own for i in candidates]
            nearer = [i for i, ratio in zip(candidates, ratios, strict=True) if ratio < 1]
            if len(nearer) == wanted and all(max(ratio, 1 / ratio) > DEPTH_GAP for ratio in ratios):
                text = f"How many {PLURALS[shape]} are nearer to the camera than the {name}?"
                query = {
                    "form": "nearer", "reference": reference, "name": f"the {name}", "candidates": candidates,
                    "plural": PLURALS[shape], "matches": nearer,
                }  # fmt: skip
                return Question("chain", text, ("0", "1", "2", "3"), str(wanted), query)
    return None


def _groups(view: View) -> list[tuple[str, str]]:
    return view.shuffled([("shape", s) for s in SHAPES] + [("colour", c) for c in COLOURS])


def _plural(attribute: str, value: str) -> str:
    return PLURALS[value] if attribute == "shape" else f"{value} objects"


def _outstanding(view: View, candidates: Sequence[int], *, nearest: bool) -> int | None:
    """The nearest (or farthest) candidate, if it is so by a clear margin."""
    if len(candidates) < 2:
        return None
    ordered = sorted(candidates, key=lambda i: view.seen[i].depth, reverse=not nearest)
    first, second = view.seen[ordered[0]].depth, view.seen[ordered[1]].depth
    return ordered[0] if max(first, second) / min(first, second) >= DEPTH_GAP else None


FAMILIES: dict[str, tuple[Callable[[View], Question | None], float]] = {
    "attribute": (ask_attribute, 0.08),
    "shape": (ask_shape, 0.06),
    "existence": (ask_existence, 0.09),
    "counting": (ask_counting, 0.09),
    "spatial relation": (ask_relation, 0.07),
    "depth": (ask_closer, 0.18),
    "relative depth": (ask_closer_point, 0.06),
    "nearest": (ask_nearest, 0.18),
    "comparison": (ask_comparison, 0.07),
    "chain": (ask_chain, 0.12),
    "outermost": (ask_outermost, 0.08),
}
"""Each family's question maker and its share of the samples among those that are asked for."""
USUAL = tuple(name for name in FAMILIES if name != "outermost")
"""What is asked for unless something else is. vlm-nano was taught these; the others are there to be learned."""
