"""Rendered scenes: the same every time, exact in what they state, and asked about without giveaways."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pearl.boxes import area, centre
from pearl.randomness import generator
from pearl.scenes.layout import (
    SPLITS,
    Camera,
    Layout,
    Light,
    Room,
    Split,
    Surface,
    Thing,
    draw_layout,
    scene_rng,
)
from pearl.scenes.questions import DEPTH_GAP, EXTREMES, FAMILIES, PLACE_GAP, Question, View
from pearl.scenes.render import Scene, render
from pearl.scenes.samples import family_due, scene_sample

SIZE = 224
Asked = tuple[View, Question]


def layouts(split: Split, count: int) -> Iterator[Layout]:
    return (draw_layout(scene_rng(split, 0, index)) for index in range(count))


def scenes(count: int) -> list[Scene]:
    return [render(layout, SIZE) for layout in layouts("test", count)]


@pytest.fixture(scope="module")
def pool() -> list[Scene]:
    return scenes(150)


@pytest.fixture(scope="module")
def asked(pool: list[Scene]) -> dict[str, list[Asked]]:
    return ask(pool, 120)


def ask(pool: list[Scene], count: int) -> dict[str, list[Asked]]:
    """`count` questions a family, each made as `scene_sample` does: scene after scene, until one fits what was drawn."""
    found: dict[str, list[Asked]] = {}
    for family, (maker, _) in FAMILIES.items():
        for number in range(count):
            for index in generator("order", family, number).permutation(len(pool)):
                view = View(pool[index], generator("question", family, number))
                question = maker(view)
                if question is not None:
                    found.setdefault(kind(question), []).append((view, question))
                    break
            else:
                raise AssertionError(f"no scene of {len(pool)} fits the family {family}, question {number}")
    return found


def kind(question: Question) -> str:
    """The family; its parts, where they have answers of their own."""
    part = question.query.get("by") or question.query.get("form")
    return f"{question.skill}: {part}" if part else question.skill


# Rendering.


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.depth.tobytes() + scene.mask.tobytes()).hexdigest()


def test_the_same_layout_gives_the_same_bytes(pool: list[Scene]) -> None:
    assert [digest(render(scene.layout, SIZE)) for scene in pool[:3]] == [digest(scene) for scene in pool[:3]]


def test_another_process_gives_the_same_bytes(pool: list[Scene]) -> None:
    program = "import test_scenes as t; print(*[t.digest(scene) for scene in t.scenes(3)])"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert printed.stdout.split() == [digest(scene) for scene in pool[:3]]


def test_a_sample_depends_on_its_index_alone() -> None:
    first, _ = scene_sample("val", 5, 3, SIZE)
    assert scene_sample("val", 5, 3, SIZE)[0] == first
    assert scene_sample("val", 5, 4, SIZE)[0].image != first.image


def test_families_keep_their_shares_among_those_that_are_asked_for() -> None:
    among = ("shape", "attribute")
    due = Counter(family_due("val", 0, index, among) for index in range(2000))
    assert set(due) == set(among)
    assert due["attribute"] / due["shape"] == pytest.approx(8 / 6, abs=0.15)


def test_splits_share_no_scene() -> None:
    seen = [repr(layout) for split in SPLITS for layout in layouts(split, 300)]
    assert len(set(seen)) == 3 * 300


def test_scenes_have_3_to_12_objects() -> None:
    counts = Counter(len(layout.things) for layout in layouts("train", 300))
    assert (min(counts), max(counts)) == (3, 12)


def test_boxes_and_pixels_are_the_masks(pool: list[Scene]) -> None:
    for scene in pool:
        present = np.unique(scene.mask[scene.mask >= 0])
        assert [scene.layout.things[i] for i in present] == [seen.thing for seen in scene.seen]
        for index, seen in zip(present, scene.seen, strict=True):
            rows, columns = np.nonzero(scene.mask == index)
            bounds = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / SIZE
            assert seen.box == pytest.approx(bounds)
            assert seen.pixels == len(rows)
            assert seen.depth == pytest.approx(np.median(scene.depth[rows, columns]))
            assert 0 < seen.visible <= 1


def test_a_balls_depth_is_what_the_camera_projects(pool: list[Scene]) -> None:
    checked = 0
    for scene in pool:
        for index, thing in enumerate(scene.layout.things):
            x, y, depth = scene.layout.camera.project(np.array(thing.position))
            row, column = int((1 - y) / 2 * SIZE), int((x + 1) / 2 * SIZE)
            window = scene.mask[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            if thing.shape == "ball" and window.size and (window == index).all():
                distance = float(np.linalg.norm(np.array(thing.position) - scene.layout.camera.position))
                assert scene.depth[row, column] == pytest.approx(depth * (1 - thing.radius / distance), rel=0.02)
                checked += 1
    assert checked >= 20


def test_known_geometry() -> None:
    """A ball 3 m and a cube 4 m away, before a wall at 10 m, seen from 1 m above the floor."""
    plain = Surface("flat", (0.6, 0.6, 0.6), (0.5, 0.5, 0.5), 1.0)
    ball = Thing("ball", "red", "matte", (0.8, 0.1, 0.1), (0.0, 3.0, 1.0), 0.3, 0.0, "rod")
    cube = replace(ball, shape="cube", colour="blue", position=(1.0, 4.0, 1.0), radius=0.5)
    room = Room(5.0, 10.0, None, True, plain, plain, plain, (0.5, 0.5, 0.5), 0.4, None)
    light = Light((0.0, 0.0, 3.0), 0.6, shadows=True, attenuated=False)
    scene = render(Layout((ball, cube), Camera(1.0, 0.0, 60.0), room, (light,)), SIZE)
    assert scene.depth[scene.mask == 0].min() == pytest.approx(2.7, rel=0.002)
    assert scene.depth[scene.mask == 1].min() == pytest.approx(4 - 0.8 * 0.5, rel=0.002)
    assert scene.depth[SIZE // 2, SIZE // 8] == pytest.approx(10, rel=0.002)
    assert scene.depth[-1, SIZE // 2] == pytest.approx(1 / math.tan(math.radians(30)), rel=0.02)
    assert scene.seen[0].visible == pytest.approx(1, abs=0.02)


# Questions.


def test_choices_are_2_to_4_and_hold_the_answer(asked: dict[str, list[Asked]]) -> None:
    assert {name.partition(":")[0] for name in asked} == set(FAMILIES)
    for _, question in everything(asked):
        assert 2 <= len(set(question.choices)) == len(question.choices) <= 4, question
        assert question.answer in question.choices, question


def test_wrong_options_are_in_the_scene(asked: dict[str, list[Asked]]) -> None:
    for view, question in everything(asked):
        attribute = question.query.get("attribute")
        if attribute and question.skill != "counting":
            here = {view.value(i, attribute) for i in view.clear} - {question.answer}
            assert len(here.intersection(question.choices)) == min(3, len(here)), question
        if question.skill == "existence":
            wanted_colour, wanted_shape = question.query["name"].split()
            assert any(t.thing.colour == wanted_colour for t in view.seen), question
            assert any(t.thing.shape == wanted_shape for t in view.seen), question


def test_what_lies_outermost_is_asked_only_by_name_and_is_so(asked: dict[str, list[Asked]]) -> None:
    assert "outermost" not in {family_due("val", 0, index) for index in range(500)}
    assert family_due("val", 0, 0, ("outermost",)) == "outermost"
    words = Counter[str]()
    for view, question in asked["outermost"]:
        [target], word = question.query["targets"], question.text.split()[-2]
        words[word] += 1
        axis = 0 if word in ("leftmost", "rightmost") else 1
        places = [centre(seen.box)[axis] for seen in view.seen]
        end = min(places) if word in ("leftmost", "highest") else max(places)
        assert places[target] == end
        assert sum(abs(place - end) < PLACE_GAP for place in places) == 1, question
    assert set(words) == set(EXTREMES)


def test_depths_that_are_compared_differ_clearly(asked: dict[str, list[Asked]]) -> None:
    for view, question in everything(asked):
        if question.skill == "depth":
            first, second = (view.seen[i].depth for i in question.query["targets"])
            assert max(first, second) / min(first, second) >= DEPTH_GAP


def everything(asked: dict[str, list[Asked]]) -> Iterator[Asked]:
    return (pair for pairs in asked.values() for pair in pairs)


def slack(count: int, bar: float) -> float:
    """Two standard errors of a share."""
    return 2 * math.sqrt(bar * (1 - bar) / count)


def test_no_answer_prevails(asked: dict[str, list[Asked]]) -> None:
    check_balance(asked, slack)


def test_neither_place_nor_size_gives_depth_away(asked: dict[str, list[Asked]]) -> None:
    check_cues(asked, slack)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_balance_of_thousands() -> None:
    asked = ask(scenes(1000), 600)
    for line in table(asked):
        print(line)
    check_balance(asked, lambda count, bar: slack(count, bar) if count < 100 else 0)
    check_cues(asked, lambda count, bar: 0)


def majority(pairs: list[Asked], read: Callable[[Question], Any]) -> float:
    return Counter(read(question) for _, question in pairs).most_common(1)[0][1] / len(pairs)


def position(question: Question) -> int:
    return question.choices.index(question.answer)


def chance(pairs: list[Asked]) -> float:
    return sum(1 / len(question.choices) for _, question in pairs) / len(pairs)


def check_balance(asked: dict[str, list[Asked]], allowed: Callable[[int, float], float]) -> None:
    """Neither the commonest answer nor the commonest place among the choices is right 10 points above chance."""
    for name, pairs in asked.items():
        bar = chance(pairs) + 0.1
        bar += allowed(len(pairs), bar)
        assert majority(pairs, lambda question: question.answer) <= bar, (name, len(pairs))
        assert majority(pairs, position) <= bar, (name, len(pairs))


def check_cues(asked: dict[str, list[Asked]], allowed: Callable[[int, float], float]) -> None:
    for name, cues in right_by_cue(asked).items():
        for cue, right in cues.items():
            assert sum(right) / len(right) <= 0.6 + allowed(len(right), 0.6), (name, cue)


def right_by_cue(asked: dict[str, list[Asked]]) -> dict[str, dict[str, list[bool]]]:
    """For each family that needs depth, whether the lowest, and the biggest, of the candidates is the nearest."""
    cues: dict[str, dict[str, list[bool]]] = {}
    for name, pairs in asked.items():
        for view, question in pairs:
            if question.skill == "relative depth":
                first, second = question.points
                lowest = "A" if first[1] > second[1] else "B"
                cues.setdefault(name, {}).setdefault("lower", []).append(lowest == question.answer)
            elif question.skill in ("depth", "nearest"):
                candidates = question.query.get("candidates") or question.query["targets"]
                nearest = min(candidates, key=lambda i: view.seen[i].depth)
                for cue, measure in CUES.items():
                    best = max(candidates, key=lambda i: measure(view, i))
                    cues.setdefault(name, {}).setdefault(cue, []).append(best == nearest)
    return cues


CUES: dict[str, Callable[[View, int], float]] = {
    "lower": lambda view, i: view.seen[i].box[3],
    "lower centre": lambda view, i: centre(view.seen[i].box)[1],
    "bigger": lambda view, i: area(view.seen[i].box),
    "more pixels": lambda view, i: view.seen[i].pixels,
}


def table(asked: dict[str, list[Asked]]) -> Iterator[str]:
    cues = right_by_cue(asked)
    for name, pairs in asked.items():
        shares = "  ".join(f"{cue} {np.mean(right):.2f}" for cue, right in cues.get(name, {}).items())
        yield (
            f"{name:20} n {len(pairs):4}  chance {chance(pairs):.2f}  answer"
            f" {majority(pairs, lambda question: question.answer):.2f}  place {majority(pairs, position):.2f}  {shares}"
        )
