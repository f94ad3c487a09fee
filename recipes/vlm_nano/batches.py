"""Draws training batches: which scenes, which of their questions, mirrored or not, with which crop in context."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from pearl.boxes import padded, pixel_box
from pearl.drawing import draw_points
from pearl.pipelines.experts.voice import Voice, article
from pearl.records import Box
from pearl.tools.base import as_text
from recipes.vlm_nano.asks import ASKS, Asked, ask_measure
from recipes.vlm_nano.data import Arrays, Questions, open_arrays
from recipes.vlm_nano.model import MIN_PIXELS, PATCH, SIZE, TOKEN
from recipes.vlm_nano.packing import PackedScene, Packer, Turn
from recipes.vlm_nano.things import KINDS, MEASURES, MIN_SEEN, cell_features, levels, measured, patch_labels

SEED = 11
HELD_OUT = 150
SMALL = ("attribute", "shape")
"""Families about objects that one visual token covers: a crop is of these where there are any."""
CROP_TOKENS = 25
CROP_SIDES = (2, 3, 4)
WITH_CHOICES, WITH_POINTS, WITH_OPENING = 0.5, 0.3, 0.25
OPENING = "Answer:"
"""Behind which a model that has learned whole trajectories answers at once."""
WEIGHTS = {
    "colour of any": 0.5, "shape of any": 0.5, "attribute": 0.7, "shape": 0.7, "existence": 1.5, "depth": 1.2,
    "spatial relation": 1.5, "comparison": 2.5, "counting": 2.0, "chain": 0.8,
}  # fmt: skip
FAMILIES = (*ASKS, *MEASURES)
MEASURING = 0.25
"""Of the questions that a scene has at most, so many are about where something is or how far."""
NAMED = re.compile(r"(?:What|Which) (?:colour|shape) (?:is|does) (?P<name>the (?:(?! that ).)+?)(?: have)?\?")


@dataclass(frozen=True)
class Rows:
    """`PackedScene`s of B scenes, stacked; `positions` are (3, B, T)."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    image_at: Tensor
    crop_at: Tensor
    mask: Tensor
    families: Tensor

    @classmethod
    def stack(cls, scenes: list[PackedScene]) -> Self:
        def gather(name: str) -> Tensor:
            axis = 1 if name == "positions" else 0
            return torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes], axis))

        return cls(**{field.name: gather(field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Crops:
    """N crops of single objects, all of one size.

    Attributes:
        patches: (N, P, K) uint8 in the processor's order; `places` (N, P, 2).
        kinds: (N, 3) colour, shape, material.
    """

    patches: Tensor
    places: Tensor
    kinds: Tensor

    def to(self, device: str) -> Crops:
        moved: Crops = _each(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin_memory(self) -> Crops:
        pinned: Crops = _each(self, Tensor.pin_memory)
        return pinned


@dataclass(frozen=True)
class Batch:
    """B scenes.

    Attributes:
        images: (B, patches, K) uint8; with `crops`, each of one object: (B, 4 * CROP_TOKENS, K), their `places`, which
            of them are `real`, and the object's colour, shape and material (`crop_kinds`, -1 where there is no crop).
            None where a stage looks at no pictures.
        more: Further crops, of other scenes.
        cells: (B, cells, F) what a true visual token would say (`things.cell_features`).
        levels: (B, cells, M) of the object there.
        patches: (B, patches, 3) colour, shape (-1: none) and depth in metres of each patch.
    """

    rows: Rows
    cells: Tensor
    levels: Tensor
    patches: Tensor
    images: Tensor | None = None
    crops: Tensor | None = None
    crop_places: Tensor | None = None
    crop_real: Tensor | None = None
    crop_kinds: Tensor | None = None
    more: Crops | None = None

    def to(self, device: str) -> Batch:
        moved: Batch = _each(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin_memory(self) -> Batch:
        pinned: Batch = _each(self, Tensor.pin_memory)
        return pinned


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a part of one, with every tensor changed."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else change(value)
    return replace(value, **{field.name: _each(getattr(value, field.name), change) for field in fields(value)})


@dataclass(frozen=True)
class Cut:
    """A crop as the model gets it: patches (n, K), places (n, 2), grid of tokens; its box, its own size in pixels."""

    patches: np.ndarray
    places: np.ndarray
    grid: tuple[int, int]
    box: Box
    size: tuple[int, int]


class Stock:
    """What `data.py` made, and how readily each question is asked (`weights`, logarithms)."""

    def __init__(self, folder: Path) -> None:
        self.arrays: Arrays = open_arrays(folder)
        self.questions = Questions(folder)
        kinds = [[(a.skill, a.kind) for a in asked] for asked in self.questions]
        counts = Counter(kind for scene in kinds for kind in scene)
        alternatives = Counter(skill for skill, _ in counts)
        weights = {kind: WEIGHTS.get(kind[0], 1) / (alternatives[kind[0]] * count) for kind, count in counts.items()}
        self.weights = [np.log([weights[kind] for kind in scene]) for scene in kinds]


class Batches:
    """A batch is a function of the step and the rank. `seeing`: with images and crops; `measuring`: with
    questions about where things are and how far; `cropping`: how many scenes' crops stand in a conversation; `more`:
    with crops of other scenes; `told`: of so many batches one comes without images; `questions`: at most, of a scene."""

    def __init__(
        self, stock: Stock, tokenizer: Any, size: int, rank: int = 0, *, seeing: bool = False, measuring: bool = True, cropping: float = 0,
        more: bool = False, told: int = 0, questions: int = 20,
    ) -> None:  # fmt: skip
        self.arrays, self.questions, self.weights = stock.arrays, stock.questions, stock.weights
        self.packer = Packer(tokenizer)
        self.size, self.rank, self.seeing, self.cropping = size, rank, seeing, cropping
        self.more, self.told, self.most = more, told, questions
        self.measures = int(MEASURING * questions) if measuring else 0

    def __len__(self) -> int:
        return len(self.questions)

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng([SEED, step, self.rank])
        picks = rng.integers(0, len(self) - HELD_OUT, self.size)
        seeing = self.seeing and (not self.told or step % self.told > 0)
        batch = self.collate([self._scene(int(pick), rng, seeing) for pick in picks], seeing)
        return replace(batch, more=self.draw_crops(step, share=0.5)) if self.more else batch

    def held_out(self, start: int) -> Batch:
        """`size` of the last scenes, from the `start`th on, which are not trained on."""
        rng = np.random.default_rng([SEED, start])
        first = len(self) - HELD_OUT + start
        picks = range(first, first + self.size)
        return self.collate([self._scene(pick, rng, self.seeing, plain=True) for pick in picks], self.seeing)

    def _scene(self, index: int, rng: np.random.Generator, seeing: bool, plain: bool = False) -> dict[str, Any]:
        mirrored = not plain and rng.random() < 0.5
        asked = [a.mirrored() if mirrored else a for a in self.questions[index]]
        keys = self.weights[index] + rng.gumbel(size=len(asked))
        asked = [asked[i] for i in np.argsort(-keys)]
        marked = next((a for a in asked if a.points), None) if rng.random() < WITH_POINTS else None
        image = self.arrays.images[index][:, ::-1] if mirrored else self.arrays.images[index]
        image = _recoloured(image, rng) if seeing and not plain else image
        if marked is not None and seeing:
            image = draw_points(np.ascontiguousarray(image), marked.points, marked.choices)
        plainly = [a for a in asked if not a.points]
        targeted = [a for a in plainly if a.target] if seeing and rng.random() < self.cropping else []
        about = next((a for a in targeted if a.skill in SMALL), targeted[0] if targeted else None)
        first = [a for a in (about, marked if seeing else None) if a is not None]
        table = self.arrays.objects[index]
        measures = ask_measures(plainly, table, mirrored, rng)[: self.measures]
        chosen = list(dict.fromkeys([*first, *measures, *plainly[: self.most]]))
        turns = [
            Turn(
                a.text, a.choices if rng.random() < WITH_CHOICES else (), a.answer,
                opening=OPENING if rng.random() < WITH_OPENING else "",
            )
            for a in chosen
        ]  # fmt: skip
        cut, kinds = None, np.full(len(KINDS), -1)
        if seeing:
            box, kinds = _boxed(table, mirrored, about.target if about else None, rng)
            cut = cut_out(image, box, float(rng.uniform(0.05, 0.4)))
        if about and cut:
            turns[0] = _shown(turns[0], cut, rng)
        cells, known = cell_features(table, mirrored)
        return {
            "packed": self.packer.pack(turns, [FAMILIES.index(a.skill) for a in chosen]),
            "cells": cells, "levels": known,
            "patches": patch_labels(
                table, self.arrays.patch_objects[index], self.arrays.patch_depths[index], mirrored
            ),
            "image": image, "cut": cut, "crop_kinds": kinds if cut else np.full(len(KINDS), -1),
        }  # fmt: skip

    def draw_crops(self, step: int, *, held_out: bool = False, share: float = 1.0) -> Crops:
        """Crops of `CROP_SIDES` tokens a side, as many as have this share of the patches of `size` images."""
        rng = np.random.default_rng([SEED, step, self.rank, 7])
        side = int(rng.choice(CROP_SIDES))
        count = int(share * self.size * SIZE**2 / (side * TOKEN) ** 2)
        first, last = (len(self) - HELD_OUT, len(self)) if held_out else (0, len(self) - HELD_OUT)
        patches, kinds = list[np.ndarray](), list[np.ndarray]()
        while len(patches) < count:
            index = int(rng.integers(first, last))
            image = _recoloured(self.arrays.images[index], rng)
            table = self.arrays.objects[index]
            for row in table[(table[:, 0] >= 0) & (table[:, 7] >= MIN_SEEN)]:
                mirrored, margin = rng.random() < 0.5, float(rng.uniform(0.0, 0.6))
                x0, y0, x1, y1 = (float(value) for value in row[3:7])
                left, top, right, bottom = pixel_box(padded((x0, y0, x1, y1), margin), SIZE, SIZE)
                pixels = image[top:bottom, left:right]
                pixels = pixels[:, ::-1] if mirrored else pixels
                pixels = cv2.resize(
                    np.ascontiguousarray(pixels), (side * TOKEN, side * TOKEN), interpolation=cv2.INTER_LINEAR
                )
                patches.append(as_patches(pixels))
                kinds.append(row[:3].astype(np.int64))
        where = np.tile(places(side, side), (count, 1, 1))
        found = (np.stack(patches[:count]), where, np.stack(kinds[:count]))
        return Crops(*(torch.from_numpy(part) for part in found))

    def collate(self, scenes: list[dict[str, Any]], seeing: bool) -> Batch:
        rows = Rows.stack([scene["packed"] for scene in scenes])
        cells, known, patches = (
            torch.from_numpy(np.stack([scene[name] for scene in scenes])) for name in ("cells", "levels", "patches")
        )
        if not seeing:
            return Batch(rows, cells, known, patches)
        images = torch.from_numpy(np.stack([as_patches(scene["image"]) for scene in scenes]))
        crops = np.zeros((len(scenes), 4 * CROP_TOKENS, 3 * PATCH * PATCH), np.uint8)
        places, real = np.zeros((len(scenes), 4 * CROP_TOKENS, 2), np.int64), np.zeros(crops.shape[:2], bool)
        real[:, 0] = True
        for index, scene in enumerate(scenes):
            if cut := scene["cut"]:
                count = len(cut.patches)
                crops[index, :count], places[index, :count], real[index, :count] = cut.patches, cut.places, True
        kinds = np.stack([scene["crop_kinds"] for scene in scenes])
        made = [torch.from_numpy(part) for part in (crops, places, real, kinds)]
        return Batch(rows, cells, known, patches, images, made[0], made[1], made[2], made[3])


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A little brighter or darker, of more or less contrast."""
    gain, shift = rng.uniform(0.85, 1.15), rng.uniform(-15, 15)
    changed: np.ndarray = np.clip(image * np.float32(gain) + np.float32(shift), 0, 255).astype(np.uint8)
    return changed


def cut_out(image: np.ndarray, box: Box, margin: float) -> Cut | None:
    """The crop around a box, enlarged as the processor would; None when it has more than `CROP_TOKENS` tokens."""
    view = padded(box, margin)
    left, top, right, bottom = pixel_box(view, SIZE, SIZE)
    height, width = bottom - top, right - left
    scale = max((MIN_PIXELS / (height * width)) ** 0.5, 1.0)
    rows, columns = (int(np.ceil(round(side * scale / TOKEN, 6))) for side in (height, width))
    if rows * columns > CROP_TOKENS:
        return None
    pixels = cv2.resize(
        np.ascontiguousarray(image[top:bottom, left:right]), (columns * TOKEN, rows * TOKEN),
        interpolation=cv2.INTER_CUBIC,
    )  # fmt: skip
    return Cut(as_patches(pixels), places(rows, columns), (rows, columns), view, (width, height))


def as_patches(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) as (N, 3 * PATCH²), in the processor's order: four patches of a token next to each other."""
    height, width, _ = pixels.shape
    split = pixels.reshape(height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH, 3)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


def places(rows: int, columns: int) -> np.ndarray:
    """(row, column) of each patch of a grid of `rows` × `columns` tokens, in the processor's order."""
    grid = np.stack(np.meshgrid(np.arange(2 * rows), np.arange(2 * columns), indexing="ij"), -1)
    return grid.reshape(rows, 2, columns, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def ask_measures(asked: list[Asked], table: np.ndarray, mirrored: bool, rng: np.random.Generator) -> list[Asked]:
    """One measure of each object that a question is about by its name."""
    measures, made = measured(table, mirrored), list[Asked]()
    for one in asked:
        named = NAMED.fullmatch(one.text)
        if one.target and named:
            which = int(rng.integers(len(MEASURES)))
            level = levels(measures[_row(measures, one.target)])[which]
            made.append(ask_measure(named["name"], MEASURES[which], int(level)))
    return made


def _boxed(table: np.ndarray, mirrored: bool, wanted: Box | None, rng: np.random.Generator) -> tuple[Box, np.ndarray]:
    """The box of the wanted object, or of any, and its kinds."""
    measures = measured(table, mirrored)
    row = int(rng.integers(len(measures))) if wanted is None else _row(measures, wanted)
    x0, y0, x1, y1 = (float(value) for value in measures[row, :4])
    return (x0, y0, x1, y1), table[table[:, 0] >= 0][row, :3].astype(np.int64)


def _row(measures: np.ndarray, box: Box) -> int:
    """Which object has that box."""
    return int(np.abs(measures[:, :4] - np.array(box)).sum(1).argmin())


def _shown(turn: Turn, cut: Cut, rng: np.random.Generator) -> Turn:
    """The turn with the crop in context, with or without the words that `pearl-gen` puts around it."""
    voice, call, said, conclusion = Voice(rng), "", "", ""
    name = (found := NAMED.fullmatch(turn.question)) and found["name"]
    thought = voice.say("look", name=name or "it") if voice.chance(0.8) else ""
    if thought and voice.chance(0.7):
        arguments = {"image": 0, "box": [round(side, 4) for side in cut.box]}
        call = "\n<tool_call>\n" + json.dumps({"name": "crop", "arguments": arguments}) + "\n</tool_call>"
        said = f"Cropped image 0 to {as_text(cut.box)}: {cut.size[0]}×{cut.size[1]} pixels."
    if name and voice.chance(0.6):
        value = turn.answer if "colour" in turn.question else article(turn.answer)
        conclusion = f"{voice.say('value', name=name, value=value)} {voice.say('answer', answer=turn.answer)}\n"
    return replace(
        turn, crop=cut.grid, thought=thought + call, said=said, conclusion=conclusion,
        opening=OPENING if conclusion else turn.opening,
    )  # fmt: skip
