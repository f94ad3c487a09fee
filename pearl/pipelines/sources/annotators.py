"""Images that nobody annotated, annotated by tools: what is found where, outlines, lines of text, nearness.

Every region says in its attributes what made it: `annotator`, `model` and `score`, and of further annotators
`mask_model` and `mask_agreement`, `nearness_model` and `nearness`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pearl.boxes import intersection_over_union, overlap, rounded, shorter_side
from pearl.images import Picture
from pearl.pipelines.sources.base import AnnotationOptions, SourceError
from pearl.pipelines.sources.box_questions import AnnotatedImage
from pearl.records import Box, Region
from pearl.tools import Tool, Toolbox, ToolError
from pearl.tools.base import MIN_BOX_SIDE
from pearl.tools.depth import SENSOR, Depth, read_box
from pearl.tools.detect import Detect
from pearl.tools.ocr import Ocr
from pearl.tools.segment import Segment

SAME, PROBABLY_SAME = 0.8, 0.5
"""Two boxes of one label with at least this intersection over union are the same thing: the first if both are sure, the
second if one is unsure."""
ENTANGLED = 0.5
"""Two boxes of one label may hold one thing twice where they share so much of the smaller one."""
AGREED = 0.5
"""The least intersection over union of a detected box and that of the mask inside it."""

T = TypeVar("T", bound=Tool)


class Annotators:
    """The tools that annotate. Their models are loaded with the first picture.

    Raises:
        SourceError: the depth is to come from a sensor.
        ToolUnavailable: a package or a model is missing; the message says which option brings it.
    """

    def __init__(self, annotation: AnnotationOptions) -> None:
        self.annotation = annotation
        self.toolbox = Toolbox(annotation.annotators, annotation.settings)
        depth = self._tool("depth", Depth)
        if depth is not None and depth.model == SENSOR:
            raise SourceError("--annotate depth: images of a folder have no sensor depth; name another --depth-model")

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the annotations besides the images."""
        one = self.annotation
        settings = {"labels": list(one.labels), "scores": {"detect": asdict(one.detect), "ocr": asdict(one.ocr)}}
        return {"tools": self.toolbox.fingerprint(), **settings}

    def annotate(self, picture: Picture) -> AnnotatedImage:
        """The regions of a picture that are sure and the lines of text, and the labels that are not to be trusted.

        Raises:
            SourceError: a label does not suit the detector.
            ToolUnavailable: a model does not load.
        """
        things, unsure = self._things(picture)
        lines, doubtful = self._lines(picture)
        regions = self._with_nearness(picture, [*things, *lines])
        return AnnotatedImage(tuple(regions), unsure | doubtful, frozenset(line.label for line in lines))

    def _things(self, picture: Picture) -> tuple[list[Region], frozenset[str]]:
        tool, asked = self._tool("detect", Detect), self.annotation
        if tool is None:
            return [], frozenset()
        try:
            found = tool.find(picture, asked.labels, asked.detect.least)
        except ToolError as error:
            raise SourceError(f"--labels: {error}") from error
        regions = [self._region(one["label"], one["box"], "detect", one["score"]) for one in found]
        sure, unsure = settled(regions, asked.detect.sure)
        outlined = [self._outlined(picture, region) for region in sure]
        loose = (region.label for region, refined in zip(sure, outlined, strict=True) if refined is None)
        return [refined for refined in outlined if refined is not None], unsure.union(loose)

    def _outlined(self, picture: Picture, region: Region) -> Region | None:
        """The region with the box of the mask inside it; None where mask and box do not agree."""
        tool = self._tool("segment", Segment)
        if tool is None:
            return region
        try:
            box = rounded(mask_box(tool.mask(picture, region.box)))
        except ToolError:
            return None
        agreement = intersection_over_union(box, region.box)
        if agreement < AGREED or not _is_usable(box):
            return None
        more = {"mask_model": self._models["segment"], "mask_agreement": f"{agreement:.2f}"}
        return replace(region, box=box, attributes={**region.attributes, **more})

    def _lines(self, picture: Picture) -> tuple[list[Region], frozenset[str]]:
        """All lines of text, each with a label that quotes it, and the labels of those that may be misread."""
        tool, scores = self._tool("ocr", Ocr), self.annotation.ocr
        if tool is None:
            return [], frozenset()
        lines = []
        for one in tool.lines(picture):
            text = " ".join(one["text"].split())
            if one["score"] >= scores.least and text:
                lines.append(self._region(f"text “{text}”", one["box"], "ocr", one["score"], text=text))
        spoken = Counter(line.label.casefold() for line in lines)
        doubtful = (
            line.label
            for line in lines
            if score_of(line) < scores.sure
            or not _is_usable(line.box)
            or not re.search(r"[^\W_]", line.attributes["text"])
            or spoken[line.label.casefold()] > 1
        )
        return lines, frozenset(doubtful)

    def _with_nearness(self, picture: Picture, regions: Sequence[Region]) -> list[Region]:
        tool = self._tool("depth", Depth)
        nearness = tool.estimate([picture])[0] if tool is not None and regions else None
        if nearness is None:
            return list(regions)
        model = self._models["depth"]
        read = ({"nearness_model": model, "nearness": f"{read_box(nearness, region.box):.3f}"} for region in regions)
        return [replace(r, attributes={**r.attributes, **more}) for r, more in zip(regions, read, strict=True)]

    def _region(self, label: str, box: Box, annotator: str, score: float, **more: str) -> Region:
        made = {"annotator": annotator, "model": self._models[annotator], "score": f"{score:.3f}"}
        return Region(label, rounded(box), {**made, **more})

    @cached_property
    def _models(self) -> dict[str, str]:
        """By tool the name of its model with its revision, without the folder where it lies."""
        return {name: _model(self.toolbox[name]) for name in self.annotation.annotators}

    def _tool(self, name: str, kind: type[T]) -> T | None:
        if name not in self.toolbox.names:
            return None
        tool = self.toolbox[name]
        assert isinstance(tool, kind)
        return tool


def settled(found: Sequence[Region], sure: float) -> tuple[list[Region], frozenset[str]]:
    """The regions that are there, and the labels of which there may be more or fewer: one of their regions has a lower
    score than `sure`, may be another one seen twice, or bears a second label, so that it is left out.

    Args:
        found: Best first.
    """
    kept: list[Region] = []
    for one in found:
        alike = PROBABLY_SAME if score_of(one) < sure else SAME
        rivals = (other for other in kept if other.label == one.label)
        if all(intersection_over_union(one.box, other.box) < alike for other in rivals):
            kept.append(one)
    certain = [one for one in kept if score_of(one) >= sure and _is_usable(one.box)]
    unsure = {one.label for one in kept if score_of(one) < sure or not _is_usable(one.box)}
    disputed: list[Region] = []
    for one, other in combinations(certain, 2):
        if one.label == other.label and overlap(one.box, other.box) > ENTANGLED:
            unsure.add(one.label)
        elif one.label != other.label and intersection_over_union(one.box, other.box) >= SAME:
            disputed += (one, other)
    unsure |= {one.label for one in disputed}
    return [one for one in certain if one not in disputed], frozenset(unsure)


def score_of(region: Region) -> float:
    """The annotator's score of a region, in 0..1."""
    return float(region.attributes["score"])


def mask_box(mask: np.ndarray) -> Box:
    """The box around what a mask, bool (H, W) and not empty, holds."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        float(columns[0] / width), float(rows[0] / height),
        float((columns[-1] + 1) / width), float((rows[-1] + 1) / height),
    )  # fmt: skip


def _is_usable(box: Box) -> bool:
    """Whether a tool takes it."""
    return shorter_side(box) >= MIN_BOX_SIDE


def _model(tool: Tool) -> str:
    revision = dict(tool.fingerprint())
    named = getattr(tool, "model", None)
    if named is None:
        return ", ".join(f"{package} {version}" for package, version in revision.items())
    content = revision.get("sha256") or revision.get("revision")
    name = Path(named).name if Path(named).is_dir() else named
    return f"{name}@{content[:12]}" if content else name
