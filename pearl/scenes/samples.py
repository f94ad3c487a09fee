"""Samples from scenes: sample `index` of (split, seed) is a function of these three, whoever asks, in any order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from pearl.drawing import draw_points
from pearl.images import ImageFormat, encode
from pearl.records import EncodedImage, Sample
from pearl.scenes.layout import Split, draw_layout, scene_rng
from pearl.scenes.questions import FAMILIES, USUAL, Question, View, regions
from pearl.scenes.render import Scene, render

MAX_ATTEMPTS = 60
LICENSE = "CC0-1.0"


class NoFittingScene(LookupError):
    """None of the scenes that were tried fits the family of questions that is due."""


def family_due(split: Split, seed: int, index: int, among: Collection[str] = USUAL) -> str:
    """The family of questions, of those that are asked for, that `index` asks, without rendering anything."""
    names = [name for name in FAMILIES if name in among]
    weights = np.array([FAMILIES[name][1] for name in names])
    return names[int(scene_rng(split, seed, index, "family").choice(len(names), p=weights / weights.sum()))]


def scene_sample(
    split: Split,
    seed: int,
    index: int,
    size: int = 384,
    image_format: ImageFormat = "jpeg",
    among: Collection[str] = USUAL,
) -> tuple[Sample, Scene]:
    """Renders scenes until one fits the family that `index` is due, and asks about it.

    Raises:
        NoFittingScene: none of `MAX_ATTEMPTS` scenes fits.
    """
    family = family_due(split, seed, index, among)
    ask, _ = FAMILIES[family]
    for attempt in range(MAX_ATTEMPTS):
        scene = render(draw_layout(scene_rng(split, seed, index, f"layout-{attempt}")), size)
        question = ask(View(scene, scene_rng(split, seed, index, "question")))
        if question is not None:
            return _sample(scene, question, f"{split}/{seed}/{index:07d}", image_format), scene
    raise NoFittingScene(f"none of {MAX_ATTEMPTS} scenes fits a question of the family {family!r}")


def _sample(scene: Scene, question: Question, key: str, image_format: ImageFormat) -> Sample:
    picture = scene.image
    if question.points:
        picture = draw_points(picture, question.points, question.choices)
    name = key.replace("/", "-")
    extension = {"jpeg": "jpg"}.get(image_format, image_format)
    sample = Sample(
        key=key,
        image=EncodedImage(encode(picture, image_format), f"{name}.{extension}"),
        question=question.text,
        choices=question.choices,
        answer=question.answer,
        regions=regions(scene),
        skill=question.skill,
        source="scenes",
        license=LICENSE,
        query=question.query,
    )
    return replace(sample, depth=scene.depth)
