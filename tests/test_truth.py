"""What trajectories about scenes say, checked by someone who knows the truth.

1. The answer follows from the question's text and the renderer's masks and depth, not from the sample's annotation.
2. Every sentence comes from the phrase bank, and every fact in it is true.
3. No fact is stated before a tool has shown it.
4. Every observation's text says what its picture and the tool say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from pearl.drawing import PALETTE
from pearl.images import Picture, decode
from pearl.pipelines.experts.voice import FINDINGS, INTENTIONS, article
from pearl.pipelines.rollout import Refusal, Rollout
from pearl.records import Box, Point, Sample, Step, ToolCall, Trajectory
from pearl.scenes.layout import COLOURS
from pearl.scenes.render import Scene
from pearl.scenes.samples import scene_sample
from pearl.tools import Toolbox
from pearl.tools.depth import nearness_of_metric, read_box, read_point

COUNT, FEWER = 150, 75
LARGE = ("crop", "zoom", "depth", "highlight", "mark", "edges", "segment")
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "depth-nano": (("crop", "depth"), {"device": "cpu"}, COUNT),
    "sensor": (("crop", "depth"), {"model": "sensor"}, COUNT),
    "large": (LARGE, {"model": "sensor"}, FEWER),
}
REASONS = {
    "the depth readings contradict the answer",
    "the depth readings are too close to each other",
    "the tool refused the call",
}
FULL: Box = (0.0, 0.0, 1.0, 1.0)
SLOTS = {
    "count": r"\d+",
    "number": r"\d+",
    "relation": "to the left of|to the right of|above|below",
    "article": r"an? \w+ \w+",
    "other": r"an? \w+ \w+",
}
ANY_SLOT = r"\d+\.\d+|[^.?:;,()]+?"
WITHOUT_FACTS = {"search on", "count on"}
NOT_ON_SCENES = {"read", "text"}


class Untrue(AssertionError):
    pass


def expect(condition: object, message: str) -> None:
    if not condition:
        raise Untrue(message)


@dataclass(frozen=True)
class Object:
    colour: str
    shape: str
    material: str
    box: Box
    pixels: int
    depth: float

    def is_called(self, word: str) -> bool:
        return word in (self.colour, self.shape, f"{self.shape}s", self.material, "object", "objects")

    @property
    def x(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        return (self.box[1] + self.box[3]) / 2


def depth_of(thing: Object) -> float:
    return thing.depth


class World:
    """What the picture shows, from the renderer's masks and depth alone, and what phrases about it mean."""

    def __init__(self, scene: Scene) -> None:
        self.depth = scene.depth
        self.objects = [self._object(scene, i) for i in range(len(scene.layout.things)) if (scene.mask == i).any()]

    @staticmethod
    def _object(scene: Scene, index: int) -> Object:
        thing, (rows, columns), size = scene.layout.things[index], np.nonzero(scene.mask == index), len(scene.mask)
        box = (columns.min() / size, rows.min() / size, (columns.max() + 1) / size, (rows.max() + 1) / size)
        depth = float(np.median(scene.depth[rows, columns]))
        return Object(thing.colour, thing.shape, thing.material, box, len(rows), depth)

    def many(self, phrase: str) -> list[Object]:
        """ "cones", "red objects", "objects to the left of the cube", "cones and the cube"."""
        if "and the " in phrase:
            group, _, other = phrase.partition(" and the ")
            return [*self.many(group), self.one(other)]
        if found := re.fullmatch("objects to the (left|right) of (.+)", phrase):
            reference, sign = self.one(found[2]), -1 if found[1] == "left" else 1
            return [o for o in self.objects if o is not reference and sign * (o.x - reference.x) > 0]
        words = phrase.removeprefix("the ").split()
        return [o for o in self.objects if all(map(o.is_called, words))]

    def one(self, phrase: str) -> Object:
        found = self.many(phrase)
        expect(len(found) == 1, f"{phrase!r} means {len(found)} objects")
        return found[0]

    def in_view(self, box: Box) -> list[Object]:
        return [o for o in self.objects if overlap(o.box, box) > 0.95 * area(o.box)]

    def subject(self, box: Box) -> Object:
        """The object that a view is made for."""
        found = self.in_view(box)
        expect(found, f"the view {box} shows no whole object")
        return max(found, key=lambda o: overlap(o.box, box) / (area(o.box) + area(box) - overlap(o.box, box)))

    def depth_at(self, point: Sequence[float]) -> float:
        return float(self.depth[int(point[1] * len(self.depth)), int(point[0] * len(self.depth))])


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def placed(box: Box, outer: Box) -> Box:
    """A box within a view of `outer`, in the original's coordinates."""
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    x0, y0, x1, y1 = box
    return outer[0] + x0 * width, outer[1] + y0 * height, outer[0] + x1 * width, outer[1] + y1 * height


# ------------------------------------------------------------------------------------ the answer, from the question


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


def smaller(first: float, second: float, names: tuple[str, str]) -> str:
    return names[0] if first < second else names[1]


def same_colour(first: Object, second: Object) -> str:
    return yes(first.colour == second.colour)


Solver = Callable[..., str]
SOLVERS: dict[str, Solver] = {
    r"What (colour|shape) is the (.+) (?:that is nearest to the camera|closest to the viewer)\?": lambda w, what, which: (
        getattr(min(w.many(which), key=depth_of), what)
    ),
    r"What (colour|shape) is the (.+)\?": lambda w, what, name: getattr(w.one(name), what),
    r"Which (colour|shape) does the (.+) have\?": lambda w, what, name: getattr(w.one(name), what),
    r"Is there an? (.+) in the picture\?": lambda w, name: yes(w.many(name)),
    r"Does the picture show an? (.+)\?": lambda w, name: yes(w.many(name)),
    r"How many (.+) are nearer to the camera than the (.+)\?": lambda w, plural, name: str(
        sum(o.depth < w.one(name).depth for o in w.many(plural))
    ),
    r"How many (.+) (?:are there|does the picture show)\?": lambda w, plural: str(len(w.many(plural))),
    r"Is the (.+) to the left or to the right of the (.+)\?": lambda w, a, b: smaller(
        w.one(a).x, w.one(b).x, ("left", "right")
    ),
    r"In the picture, is the (.+) above or below the (.+)\?": lambda w, a, b: smaller(
        w.one(a).y, w.one(b).y, ("above", "below")
    ),
    r"(?:Which is closer to the camera|Which of the two is nearer), (the .+) or (the .+)\?": lambda w, a, b: smaller(
        w.one(a).depth, w.one(b).depth, (a, b)
    ),
    r"Which takes up more of the picture, (the .+) or (the .+)\?": lambda w, a, b: smaller(
        w.one(b).pixels, w.one(a).pixels, (a, b)
    ),
    r"(?:Do|Is) the (.+) (?:and|of the same colour as) the (.+?)(?: have the same colour)?\?": lambda w, a, b: (
        same_colour(w.one(a), w.one(b))
    ),
    r"Does the (.+) nearest to the camera have the same colour as the farthest \1\?": lambda w, a: same_colour(
        min(w.many(a), key=depth_of), max(w.many(a), key=depth_of)
    ),
    r"Of the (objects to the .+ of the .+), what (colour|shape) is the one nearest to the camera\?": lambda w, which, what: (
        getattr(min(w.many(which), key=depth_of), what)
    ),
}
POINTS = r"Which marked point is closer to the camera, A or B\?|Which of the points A and B is nearer\?"


def true_answer(world: World, question: str, points: Mapping[str, Point]) -> str:
    if re.fullmatch(POINTS, question):
        expect(points, "no depth has been read at A and B")
        return min(points, key=lambda name: world.depth_at(points[name]))
    for pattern, solve in SOLVERS.items():
        if found := re.fullmatch(pattern, question):
            return solve(world, *found.groups())
    raise Untrue(f"no such question is known: {question}")


def marked_points(trajectory: Trajectory) -> dict[str, Point]:
    """A and B of the question's picture: where the depth call reads, if the rings are drawn there."""
    calls = [step.call.arguments for step in trajectory.steps if step.call.arguments.get("points")]
    if trajectory.skill != "relative depth" or not calls:
        return {}
    pixels = decode(trajectory.image.data)
    size = len(pixels)
    angles = np.arange(0, 2 * np.pi, 0.1)
    for (x, y), colour in zip(calls[-1]["points"], PALETTE, strict=False):
        rows = np.clip(y * size + size / 55 * np.sin(angles), 0, size - 1).astype(int)
        columns = np.clip(x * size + size / 55 * np.cos(angles), 0, size - 1).astype(int)
        distance = np.abs(np.median(pixels[rows, columns], axis=0) - colour).max()
        expect(distance < 60, f"no ring of colour {colour} around ({x}, {y})")
    return dict(zip("AB", calls[-1]["points"], strict=True))


# --------------------------------------------------------------------------------------- the sentences, and their facts


@lru_cache
def phrases() -> list[tuple[str, re.Pattern[str]]]:
    """The phrase bank turned round: every sentence as a pattern with named slots."""
    patterns = []
    for key, sentences in {**INTENTIONS, **FINDINGS}.items():
        for sentence in sentences:
            parts = re.split(r"{(\w+)}", sentence)
            pattern, known = "", set[str]()
            for literal, slot in zip(parts[::2], [*parts[1::2], ""], strict=True):
                pattern += re.escape(literal)
                if slot:
                    pattern += f"(?P={slot})" if slot in known else f"(?P<{slot}>{SLOTS.get(slot, ANY_SLOT)})"
                    known.add(slot)
            patterns.append((key, re.compile(pattern + "(?: |$)", re.IGNORECASE)))
    return patterns


def parse(text: str) -> list[tuple[str, dict[str, str]]] | None:
    """The text as phrases with their slots; None if it is anything else."""
    if not text:
        return []
    for key, pattern in phrases():
        if (found := pattern.match(text)) and (rest := parse(text[found.end() :])) is not None:
            return [(key, found.groupdict()), *rest]
    return None


class Reader:
    """Reads one trajectory from its beginning, knowing the truth, and what the tools have shown up to each sentence."""

    def __init__(self, trajectory: Trajectory, scene: Scene) -> None:
        self.trajectory, self.scene, self.world = trajectory, scene, World(scene)
        self.untrue: list[str] = []
        self.points: dict[str, Point] = {}
        self.pictures: list[Box] = [FULL]
        self.sizes: list[tuple[int, int]] = [decode(trajectory.image.data).shape[1::-1]]
        self.shown: list[Object] = []
        self.together: list[Object] = []
        self.regions: list[Object] = []
        self.readings: list[str] = []
        self.call = ToolCall("", {})

    def read(self) -> list[str]:
        """What is not true."""
        with self._noting("the answer"):
            self.points = marked_points(self.trajectory)
            answer = true_answer(self.world, self.trajectory.question, self.points)
            expect(answer == self.trajectory.answer, f"{self.trajectory.answer!r} instead of {answer!r}")
        for step in self.trajectory.steps:
            self.call = step.call
            self._hear(step.thought)
            with self._noting(step.observation.text):
                self._see(step)
        self.call = ToolCall("", {})
        self._hear(self.trajectory.conclusion)
        return self.untrue

    def _noting(self, where: str) -> Noting:
        return Noting(self.untrue, f"{self.trajectory.id}: {where}")

    def _hear(self, text: str) -> None:
        heard = parse(text)
        if heard is None:
            self.untrue.append(f"{self.trajectory.id}: no phrases of the bank: {text}")
        for key, slots in heard or []:
            with self._noting(f"{key} {slots} in {text!r}"):
                if key not in WITHOUT_FACTS:
                    getattr(self, f"hears_{key.replace(' ', '_')}")(**{k: v.casefold() for k, v in slots.items()})

    # Observations.

    def _see(self, step: Step) -> None:
        arguments, tool = step.call.arguments, step.call.tool
        outer = self.pictures[arguments["image"]]
        inside = placed(arguments.get("box", FULL), outer)
        self.pictures.append(inside if tool in ("crop", "zoom", "edges") else outer)
        picture = step.observation.image
        assert picture is not None
        pixels = decode(picture.data)
        self.sizes.append(pixels.shape[1::-1])
        self.together = self.world.in_view(inside)
        getattr(self, f"_see_{tool}")(step.observation.text, pixels, arguments, inside)

    def _see_crop(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        stated = re.search(r": (\d+)×(\d+) pixels\.$", text)
        expect(stated and (int(stated[1]), int(stated[2])) == self.sizes[-1], f"the picture is {self.sizes[-1]}")
        box = "[" + ", ".join(f"{v:.3f}" for v in arguments["box"]) + "]"
        expect(box in text and f"image {arguments['image']}" in text, "another box or image")
        width, height = self.sizes[arguments["image"]]
        across = (arguments["box"][2] - arguments["box"][0]) * width * arguments.get("factor", 1.0)
        down = (arguments["box"][3] - arguments["box"][1]) * height * arguments.get("factor", 1.0)
        slack = 2 * arguments.get("factor", 1.0)
        expect(abs(across - self.sizes[-1][0]) <= slack and abs(down - self.sizes[-1][1]) <= slack, "not of that size")
        if self.together:
            self.shown.append(self.world.subject(inside))

    def _see_zoom(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        self._see_crop(text, pixels, arguments, inside)
        expect(f"{arguments['factor']:.1f} times" in text, "another factor")

    def _see_depth(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        boxes, points = arguments.get("boxes", []), arguments.get("points", [])
        named = [f"region {i + 1}" for i in range(len(boxes))] + [f"point {i + 1}" for i in range(len(points))]
        stated = dict(re.findall(r"((?:region|point) \d+): (\d\.\d\d)", text))
        expect(list(stated) == named, f"readings of {list(stated)}, asked {named}")
        self.readings = list(stated.values())
        self.regions = self.together = [self.world.subject(box) for box in boxes]

    def _see_highlight(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        self.together = [self.world.subject(box) for box in arguments["boxes"]]
        expect(re.match(rf"Drew {len(self.together)} box", text), "another number of boxes")

    def _see_mark(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        self.together = [self._at(point) for point in arguments["points"]]
        expect(text == f"Marked {', '.join(str(i + 1) for i in range(len(self.together)))} in image 0.", "other marks")

    def _see_edges(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        stated = re.search(r"(\d+)% of the pixels lie on an edge", text)
        expect(stated and abs(int(stated[1]) / 100 - np.mean(pixels > 127)) < 0.0051, f"{np.mean(pixels > 127):.3f}")
        self.shown.append(self.world.subject(inside))

    def _see_segment(self, text: str, pixels: np.ndarray, arguments: Mapping[str, Any], inside: Box) -> None:
        stated = re.search(r"covers (\d+\.\d)% of the image", text)
        expect(stated and float(stated[1]) / 100 <= area(arguments["box"]) + 0.006, "it covers more than its box")
        self.shown.append(self.world.subject(inside))

    # What names mean, here and now.

    def _at(self, point: Sequence[float]) -> Object:
        x, y = point
        found = [o for o in self.world.objects if o.box[0] < x < o.box[2] and o.box[1] < y < o.box[3]]
        expect(found, f"nothing is at {point}")
        return min(found, key=lambda o: abs(o.x - x) + abs(o.y - y))

    def _means(self, name: str) -> Object:
        if name in ("the nearest one", "the nearest of them", "the farthest one"):
            expect(self.readings, f"{name!r} before any depth")
            return (max if "farthest" in name else min)(self._asked_about(), key=depth_of)
        return self.world.one(name)

    def _asked_about(self) -> list[Object]:
        """Among whom the question wants the nearest, or the farthest."""
        for pattern in (
            r"What (?:colour|shape) is the (.+) (?:that is nearest to the camera|closest to the viewer)\?",
            r"Does the (.+) nearest to the camera .*",
            r"Of the (.+), what .*",
        ):
            if found := re.fullmatch(pattern, self.trajectory.question):
                return self.world.many(found[1])
        raise Untrue("the question asks for no nearest one")

    def _called_box(self) -> Box:
        return placed(self.call.arguments["box"], self.pictures[self.call.arguments["image"]])

    def _reading(self, value: str, number: str, *, nearest: bool) -> None:
        """A region's reading, which is the highest or lowest, and its object the nearest or farthest."""
        index, values = int(number) - 1, [float(r) for r in self.readings]
        expect(self.readings and self.readings[index] == value, f"the readings are {self.readings}")
        expect(float(value) == (max if nearest else min)(values), "not the extreme reading")
        extreme = (min if nearest else max)(self.regions, key=depth_of)
        expect(self.regions[index] is extreme, "the depth says otherwise")

    # Intentions: the call does what the thought says.

    def hears_look(self, name: str) -> None:
        if name in ("a", "b"):
            (x, y), box = self.points[name.upper()], self._called_box()
            expect(box[0] < x < box[2] and box[1] < y < box[3], f"the view {box} does not show {name}")
        else:
            expect(self.world.subject(self._called_box()) is self._means(name), f"{self._called_box()} shows another")

    hears_look_first = hears_look_also = hears_look_tighter = hears_measure = hears_look
    hears_measure_also = hears_segment = hears_look

    def hears_look_around(self, name: str) -> None:
        expect(self._means(name) in self.world.in_view(self._called_box()), "it is not there")

    def hears_outlines(self, name: str) -> None:
        expect(self._means(name) is self.shown[-1] and self.call.arguments["image"] > 0, "the view is of another")

    def hears_confirm(self, number: str) -> None:
        expect(self.world.subject(self._called_box()) is self.regions[int(number) - 1], "another region is looked at")

    def hears_search(self, article: str) -> None:
        expect(re.search(f" {article}[ ?]", self.trajectory.question), "that was not asked")
        expect(self.world.subject(self._called_box()).shape == article.split()[-1], "a place where it cannot be")

    def hears_count(self, plural: str) -> None:
        expect(f"How many {plural} " in self.trajectory.question, "that was not asked")
        expect(self.world.subject(self._called_box()) in self.world.many(plural), "the first view is of none of them")

    def hears_outline_all(self, plural: str) -> None:
        boxes = self.call.arguments["boxes"]
        expect(f"How many {plural} " in self.trajectory.question, "that was not asked")
        expect(same({*map(self.world.subject, boxes)}, self.world.many(plural)), "the boxes are not all of them")

    def hears_both_in_view(self, a: str, b: str) -> None:
        seen = self.world.in_view(self._called_box())
        expect(self._means(a) in seen and self._means(b) in seen, "the view does not hold both")

    def hears_outline_both(self, a: str, b: str) -> None:
        boxes = self.call.arguments["boxes"]
        expect([self.world.subject(box) for box in boxes] == [self._means(a), self._means(b)], "other boxes")

    def hears_mark(self, a: str, b: str) -> None:
        expect([self._at(p) for p in self.call.arguments["points"]] == [self._means(a), self._means(b)], "other places")

    def hears_depth_of_two(self, a: str, b: str) -> None:
        if "points" in self.call.arguments:
            expect(list(self.points) == [a.upper(), b.upper()], "other points")
        else:
            self.hears_outline_both(a, b)

    def hears_depth_of_many(self, plural: str) -> None:
        found = [self.world.subject(box) for box in self.call.arguments["boxes"]]
        expect(len(found) == len(set(found)) and same(found, self.world.many(plural)), "the regions are others")

    # Findings: a tool has shown it, and it is true.

    def hears_value(self, name: str, value: str) -> None:
        expect(self.shown and self.shown[-1] is self._means(name), "the last view is of another, or none")
        expect(value in (self.shown[-1].colour, article(self.shown[-1].shape)), f"it is {self.shown[-1]}")

    def hears_in_view(self, name: str) -> None:
        if name in ("a", "b"):
            (x, y), box = self.points[name.upper()], self.pictures[-1]
            expect(len(self.pictures) > 1 and box[0] < x < box[2] and box[1] < y < box[3], "it was not in view")
        else:
            expect(self._means(name) in self.together, "it was not in view")

    def hears_identified(self, article: str) -> None:
        _, colour, shape = article.split()
        expect(self.shown and (self.shown[-1].colour, self.shown[-1].shape) == (colour, shape), f"{self.shown[-1:]}")

    def hears_found(self, article: str) -> None:
        self.hears_identified(article)
        expect(re.search(f" {article}[ ?]", self.trajectory.question), "that was not asked")

    def hears_other(self, other: str, article: str) -> None:
        self.hears_identified(other)
        expect(other != article and re.search(f" {article}[ ?]", self.trajectory.question), "that was not asked")

    def hears_none_left(self, article: str) -> None:
        _, colour, shape = article.split()
        expect(not self.world.many(f"{colour} {shape}"), "there is one")
        expect(same(self.shown, self.world.many(shape)), "a candidate has not been looked at")

    def hears_counted(self, count: str) -> None:
        found = re.match(r"How many (.+) (?:are there|does the picture show)\?", self.trajectory.question)
        assert found
        seen = set(self.shown or self.together)
        expect(seen <= set(self.world.many(found[1])) and len(seen) == int(count), f"{len(seen)} have been seen")

    def hears_counted_all(self, count: str) -> None:
        self.hears_counted(count)
        expect(true_answer(self.world, self.trajectory.question, {}) == count, "there are others")

    def hears_relation(self, a: str, b: str, relation: str) -> None:
        first, second = self._means(a), self._means(b)
        expect(first in self.together and second in self.together, "they were not in one view")
        gap = second.y - first.y if relation in ("above", "below") else second.x - first.x
        expect((gap > 0) == (relation in ("above", "to the left of")), "it is the other way round")

    def hears_nearer(self, a: str, b: str, first: str, second: str, near: str) -> None:
        expect([first, second] == self.readings and near in (a, b), f"the readings are {self.readings}")
        expect((float(first) > float(second)) == (near == a), "the readings say otherwise")
        depths = [
            self.world.depth_at(self.points[n.upper()]) if n in ("a", "b") else self._means(n).depth for n in (a, b)
        ]
        expect((depths[0] < depths[1]) == (near == a), f"the depths are {depths}")
        expect(not self.regions or self.regions == [self._means(a), self._means(b)], "other regions were read")

    def hears_nearest(self, plural: str, value: str, number: str) -> None:
        self._reading(value, number, nearest=True)
        expect(same(self.regions, self.world.many(plural)), "other regions were read")

    def hears_farthest(self, value: str, number: str) -> None:
        self._reading(value, number, nearest=False)

    def hears_count_nearer(self, name: str, own: str, plural: str, count: str) -> None:
        expect(self.readings[:1] == [own] and self.regions[0] is self._means(name), f"the readings are {self.readings}")
        expect(same(self.regions[1:], self.world.many(plural)), "other regions were read")
        expect(sum(float(r) > float(own) for r in self.readings[1:]) == int(count), "the readings say otherwise")
        expect(sum(o.depth < self.regions[0].depth for o in self.regions[1:]) == int(count), "the depth says otherwise")

    def hears_confirmed(self, count: str) -> None:
        nearer = [o for o in self.regions[1:] if o.depth < self.regions[0].depth]
        expect(len(nearer) == int(count) and same(nearer, self.shown[1:]), "not all of them have been looked at")

    def hears_larger(self, first: str, second: str, larger: str) -> None:
        (a, b), (x, y) = self.sizes[-2:], self.shown[-2:]
        expect([int(first), int(second)] == [a[0] * a[1], b[0] * b[1]], f"the cuts are {a} and {b}")
        expect(self._means(larger) is (x if x.pixels > y.pixels else y), "it is the smaller one")

    def hears_same(self, value: str) -> None:
        expect([o.colour for o in self.shown[-2:]] == [value, value], f"{self.shown[-2:]}")

    def hears_different(self, first: str, second: str) -> None:
        expect(first != second and [o.colour for o in self.shown[-2:]] == [first, second], f"{self.shown[-2:]}")

    def hears_answer(self, answer: str) -> None:
        expect(answer.casefold() == self.trajectory.answer.casefold(), "not the answer that is given")


def same(some: Sequence[Object] | set[Object], others: Sequence[Object]) -> bool:
    return set(some) == set(others)


class Noting:
    """Notes what is untrue and goes on."""

    def __init__(self, notes: list[str], where: str) -> None:
        self.notes, self.where = notes, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if isinstance(error, Untrue):
            self.notes.append(f"{self.where}: {error}")
        return isinstance(error, Untrue)


# ----------------------------------------------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class Rolled:
    """What came of the samples with one set of tools."""

    toolbox: Toolbox
    kept: list[tuple[Trajectory, Sample, Scene]]
    refused: list[Refusal]


@pytest.fixture(scope="module")
def samples() -> list[tuple[Sample, Scene]]:
    return [scene_sample("test", 20, index, size=384) for index in range(COUNT)]


@pytest.fixture(scope="module", params=SETTINGS)
def rolled(request: pytest.FixtureRequest, samples: list[tuple[Sample, Scene]]) -> Rolled:
    tools, depth, count = SETTINGS[request.param]
    toolbox = Toolbox(tools, {"depth": depth})
    outcomes = Rollout(toolbox, 0, None, 10**7).run([(sample.key, sample) for sample, _ in samples[:count]])
    pairs = list(zip(outcomes, samples, strict=False))
    return Rolled(
        toolbox,
        [(outcome, *sample) for outcome, sample in pairs if isinstance(outcome, Trajectory)],
        [outcome for outcome, _ in pairs if isinstance(outcome, Refusal)],
    )


@pytest.fixture(scope="module")
def untrue(rolled: Rolled) -> dict[str, list[str]]:
    return {trajectory.id: Reader(trajectory, scene).read() for trajectory, _, scene in rolled.kept}


def test_at_least_97_percent_are_right(untrue: dict[str, list[str]]) -> None:
    wrong = [message for messages in untrue.values() for message in messages]
    right = sum(not messages for messages in untrue.values()) / len(untrue)
    assert right >= 0.97, f"{right:.1%} are right; untrue are:\n" + "\n".join(wrong)


def test_rejections_are_known_and_few(rolled: Rolled) -> None:
    assert not [refusal for refusal in rolled.refused if refusal.quarantined or refusal.reason not in REASONS]
    if rolled.toolbox["depth"].fingerprint() == {"model": "sensor"}:
        assert len(rolled.kept) >= 0.6 * (len(rolled.kept) + len(rolled.refused))


def test_depth_readings_are_what_the_tool_reads(rolled: Rolled) -> None:
    reading = [(t, s) for t, s, _ in rolled.kept if t.steps[-1].call.tool == "depth"][:12]
    assert reading
    for trajectory, sample in reading:
        step = trajectory.steps[-1]
        picture = Picture(decode(sample.image.data), sample.depth)
        (result,) = rolled.toolbox.execute([(step.call, [picture])])
        assert step.observation.text == result.text
        if rolled.toolbox["depth"].fingerprint() == {"model": "sensor"} and sample.depth is not None:
            nearness, arguments = nearness_of_metric(sample.depth), step.call.arguments
            values = [read_box(nearness, box) for box in arguments.get("boxes", [])]
            values += [read_point(nearness, point) for point in arguments.get("points", [])]
            assert re.findall(r": (\d\.\d\d)", result.text) == [f"{value:.2f}" for value in values]


def test_the_language_is_clean(rolled: Rolled) -> None:
    for trajectory, _, _ in rolled.kept:
        thoughts = [*(step.thought for step in trajectory.steps), trajectory.conclusion]
        for text in [trajectory.question, *thoughts]:
            assert text[0].isupper(), text
            assert text[-1] in ".?", text
            assert not re.search(
                r"\ba [aeiou]|\ban [^aeiou\W]|  | [.,:;?]|\bthe (it|the|this)\b|\b1 of the \w+ are", text
            ), text
        assert len(set(thoughts)) == len(thoughts), thoughts


def test_every_phrase_can_be_checked() -> None:
    keys = {*INTENTIONS, *FINDINGS} - WITHOUT_FACTS - NOT_ON_SCENES
    assert not [key for key in keys if not hasattr(Reader, f"hears_{key.replace(' ', '_')}")]
    assert parse("It is what it is.") is None


def test_no_phrase_is_mistaken_for_another() -> None:
    like = {"count": "2", "number": "1", "relation": "above", "article": "a red cube", "other": "a red cube"}
    for key, sentences in {**INTENTIONS, **FINDINGS}.items():
        for sentence in sentences:
            slots = {name: like.get(name, "the red cube") for name in re.findall(r"{(\w+)}", sentence)}
            taken = {found for found, pattern in phrases() if pattern.fullmatch(sentence.format(**slots))}
            assert taken == {key}, sentence


def test_lies_are_found(samples: list[tuple[Sample, Scene]]) -> None:
    """The reader is no rubber stamp: it objects to whatever is changed in a true trajectory."""
    found = Counter[str]()
    for sample, scene in samples[:40]:
        (truth,) = Rollout(Toolbox(("crop", "depth"), {"depth": {"model": "sensor"}}), 0, None, 10**7).run(
            [("1", sample)]
        )
        assert isinstance(truth, Trajectory)
        for lie, told in lies(truth):
            assert Reader(told, scene).read(), f"{lie} is believed: {told}"
            found[lie] += 1
    assert len(found) == 5, found
    assert min(found.values()) >= 5, found


def lies(truth: Trajectory) -> Iterator[tuple[str, Trajectory]]:
    other = next(choice for choice in truth.choices if choice != truth.answer)
    yield "another answer", replace(truth, answer=other, conclusion=truth.conclusion.replace(truth.answer, other))
    yield "a conclusion from nothing", replace(truth, steps=())
    first, *rest = truth.steps
    early = replace(first, thought=f"{truth.conclusion} {first.thought}")
    yield "a fact before it is seen", replace(truth, steps=(early, *rest))
    for colour in COLOURS:
        if colour in truth.conclusion:
            wrong = "red" if colour != "red" else "blue"
            yield "a wrong colour", replace(truth, conclusion=truth.conclusion.replace(colour, wrong))
    if re.search(r"\d\.\d\d", truth.conclusion):
        shifted = re.sub(r"\.(\d)", lambda digit: f".{(int(digit[1]) + 1) % 10}", truth.conclusion)
        yield "a wrong reading", replace(truth, conclusion=shifted)
