"""`folder:DIR`: images without annotation, asked about what tools can tell of them.

With annotators, each image is annotated by them, and the questions are made from the boxes as for any annotated image.
Without, the questions are those whose answer is a reading of the expert's own tool: nearness, text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pearl.images import SUFFIXES, ImageError, Picture, decode
from pearl.pipelines.errors import Rejected
from pearl.pipelines.sources.base import (
    BadRecord,
    Item,
    Source,
    SourceError,
    SourceOptions,
    annotated_source,
    listing_hash,
    read_image,
)
from pearl.pipelines.sources.box_questions import SKILLS, AnnotatedImage, questions_from_boxes
from pearl.randomness import generator
from pearl.records import EncodedImage, Sample
from pearl.tools import Toolbox

if TYPE_CHECKING:
    from pearl.pipelines.sources.annotators import Annotators

FROM_READINGS = (("relative depth", "depth"), ("text", "ocr"))
MAX_NAMED = 8
OF_THINGS = ("counting", "existence")
"""What is asked about things found by their names alone, never about lines of text."""


class Folder(Source):
    """One item an image and askable skill; nothing is known of the images' licence.

    Raises:
        SourceError: no such folder, or nothing can be asked with these tools and annotators.
        ToolUnavailable: an annotator's package or model is missing.
    """

    name = "folder"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        self.folder = Path(argument)
        self.options = options
        if not argument or not self.folder.is_dir():
            raise SourceError(f"folder: {argument or '(nothing)'} is no folder; use --source folder:DIR")
        self.annotators = _open_annotators(options)
        self.skills = self._skills()
        if not self.skills:
            raise SourceError(
                "images without annotation need the tool depth or ocr: --tools depth,ocr; or annotators: --annotate ocr"
            )
        self._latest: tuple[str, _Asked] | None = None

    def _skills(self) -> list[str]:
        used = self.options.annotation.annotators
        if not used:
            return [skill for skill, tool in FROM_READINGS if tool in self.options.tools]
        left_out = {*(() if "detect" in used else OF_THINGS), *(() if "ocr" in used else ("text",))}
        return [skill for skill in SKILLS if skill not in left_out]

    def items(self) -> Iterator[Item]:
        found = False
        for name in self._names():
            found = True
            yield from (Item(f"{name}#{skill}", {"image": name, "skill": skill}) for skill in self.skills)
        if not found:
            raise SourceError(f"{self.folder} holds no image ({', '.join(SUFFIXES)})")

    def _names(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path.relative_to(self.folder).as_posix()

    def read(self, item: Item) -> Sample:
        """The sample of an image and skill.

        Raises:
            BadRecord: the image cannot be read.
            Rejected: what the annotators found allows no question of this skill.
        """
        image = read_image(self.folder, item.record["image"], self.options.max_pixels)
        if self.annotators is not None:
            return self._annotated(item, image, self.annotators)
        return self._unannotated(item, image)

    def _annotated(self, item: Item, image: EncodedImage, annotators: Annotators) -> Sample:
        used, skill = self.options.annotation.annotators, item.record["skill"]
        found, questions = self._asked(item.record["image"], image, annotators)
        if skill not in questions:
            detail = f"{skill}; found: {_some(r.label for r in found.regions)}; unsure: {_some(sorted(found.crowded))}"
            raise Rejected("what was found allows no such question", detail)
        asked = questions[skill]
        return Sample(
            item.key, image, asked["question"], tuple(asked["choices"]), asked["answer"], found.regions, skill,
            annotated_source(self.name, used), "unknown", asked["query"],
        )  # fmt: skip

    def _asked(self, name: str, image: EncodedImage, annotators: Annotators) -> _Asked:
        """What was found in an image, and its questions by skill. The latest is kept: an image's items follow one another."""
        content = hashlib.sha256(image.data).hexdigest()
        if self._latest is None or self._latest[0] != content:
            try:
                picture = Picture(decode(image.data, self.options.max_pixels))
            except ImageError as error:
                raise BadRecord(f"{name}: {error}") from error
            found = annotators.annotate(picture)
            labels = self.options.annotation.labels
            questions = questions_from_boxes(found, labels, self.options.seed, content)
            self._latest = content, (found, {asked["skill"]: asked for asked in questions})
        return self._latest[1]

    def _unannotated(self, item: Item, image: EncodedImage) -> Sample:
        skill = item.record["skill"]
        rng = generator("folder", self.options.seed, hashlib.sha256(image.data).hexdigest())
        if skill == "relative depth":
            first, second = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.9, 2)
            places = [f"({x:.2f}, {y:.2f})" for x, y in (first, second)]
            question = (
                f"Which point is closer to the camera, A at {places[0]} or B at {places[1]}"
                " (fractions of the width and height)?"
            )
            points = [[round(float(v), 2) for v in point] for point in (first, second)]
            choices: tuple[str, ...] = ("A", "B")
            query: dict[str, Any] = {"points": points, "names": ["A", "B"]}
        else:
            question, choices, query = "What text can be read in the picture?", (), {}
        return Sample(item.key, image, question, choices, "", (), skill, self.name, "unknown", query)

    def adopt(self, toolbox: Toolbox) -> None:
        if self.annotators is not None:
            self.annotators.toolbox.adopt(toolbox)

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "folder": self.folder.name,
            "images": listing_hash(self.folder, self._names()),
            "seed": self.options.seed,
            "skills": self.skills,
            **({"annotators": self.annotators.fingerprint()} if self.annotators else {}),
        }


_Asked = tuple[AnnotatedImage, Mapping[str, Mapping[str, Any]]]


def _some(labels: Iterable[str]) -> str:
    """Labels for a message; the first ones where there are many."""
    listed = list(labels)
    return ", ".join([*listed[:MAX_NAMED], *(["…"] if len(listed) > MAX_NAMED else [])]) or "nothing"


def _open_annotators(options: SourceOptions) -> Annotators | None:
    if not options.annotation.annotators:
        return None
    from pearl.pipelines.sources.annotators import Annotators

    return Annotators(options.annotation)
