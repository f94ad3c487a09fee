"""`coco:FILE`: any COCO instances file, with a file of questions, or with questions made from its boxes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pearl.images import ImageError, header
from pearl.pipelines.sources.base import BadRecord, Item, Source, SourceError, SourceOptions, read_image
from pearl.pipelines.sources.box_questions import Annotated, questions_from_boxes
from pearl.records import Region, Sample

WITH_ANSWER = ("attribute", "fine detail", "counting", "spatial relation", "depth", "comparison", "existence", "text")


class Coco(Source):
    """COCO instances.

    Boxes become fractions of the image's own size as the file states it. Crowd regions (`iscrowd`) stand for no single
    object: nothing is asked about their category in that image. Masks (polygons, RLE) are not needed and not read.
    """

    name = "coco"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if not argument:
            raise SourceError("coco needs the annotation file: --source coco:instances.json")
        self.file = Path(argument)
        self.images = Path(options.images) if options.images else self.file.parent
        self.questions = Path(options.questions) if options.questions else None
        self.options = options
        self.label = self.name
        self.licenses: Mapping[str, str] = {}

    def items(self) -> Iterator[Item]:
        if not self.images.is_dir():
            raise SourceError(f"the images' folder {self.images} is not there; give it with --images")
        index = CocoIndex(self.file)
        yield from index.problems
        yield from self._given(index) if self.questions else self._made(index)

    def _made(self, index: CocoIndex) -> Iterator[Item]:
        names = sorted(set(index.categories.values()))
        for image_id, image in index.images.items():
            annotated = Annotated(tuple(index.regions(image_id).values()), frozenset(index.crowded[image_id]))
            for number, asked in enumerate(questions_from_boxes(annotated, names, self.options.seed, str(image_id))):
                yield Item(f"{image_id}-{number}", _record(image, annotated.regions, asked))

    def _given(self, index: CocoIndex) -> Iterator[Item]:
        assert self.questions is not None
        seen: Counter[str] = Counter()
        for number, line in enumerate(_lines(self.questions), start=1):
            if not line.strip():
                continue
            where = f"{self.questions.name} line {number}"
            try:
                question = _parse_question(line)
                key = str(question["id"])
                seen[key] += 1
                if seen[key] > 1:
                    raise BadRecord(f"the id {key!r} stands there already")
                yield Item(key, index.resolve(question))
            except BadRecord as error:
                yield Item(f"line-{number}", problem=f"{where}: {error}")

    def read(self, item: Item) -> Sample:
        record = item.record
        image = read_image(self.images, record["image"], self.options.max_pixels)
        try:
            size = header(image.data, self.options.max_pixels)
        except ImageError as error:
            raise BadRecord(f"{record['image']}: {error}") from error
        if list(size) != record["size"]:
            stated = "×".join(map(str, record["size"]))
            raise BadRecord(f"{record['image']} is {size[0]}×{size[1]} pixels, but {self.file.name} says {stated}")
        return Sample(
            key=item.key,
            image=image,
            question=record["question"],
            choices=tuple(record["choices"]),
            answer=record["answer"],
            regions=tuple(Region(label, tuple(box)) for label, box in record["regions"]),
            skill=record["skill"],
            source=self.label,
            license=self.licenses.get(record["image"], record["license"]),
            query=record["query"],
        )

    def fingerprint(self) -> Mapping[str, Any]:
        files = [self.file, *([self.questions] if self.questions else [])]
        return {"seed": self.options.seed, "files": [hashlib.sha256(_bytes(file)).hexdigest() for file in files]}


class CocoIndex:
    """The parsed annotation file: images, categories, good boxes, crowds, and what is wrong with it."""

    def __init__(self, file: Path) -> None:
        self.problems: list[Item] = []
        self.images: dict[Any, dict[str, Any]] = {}
        self.categories: dict[Any, str] = {}
        self.crowded: dict[Any, set[str]] = defaultdict(set)
        self._regions: dict[Any, dict[Any, Region]] = defaultdict(dict)
        self._bad: dict[Any, str] = {}
        document = _load_json(file)
        licenses = {one.get("id"): str(one.get("name", "")) for one in _rows(document, "licenses")}
        for category in _required(document, "categories", file):
            self.categories[category.get("id")] = str(category.get("name"))
        for image in _required(document, "images", file):
            self._add_image(image, licenses)
        for annotation in _required(document, "annotations", file):
            self._add_annotation(annotation)

    def regions(self, image_id: Any) -> dict[Any, Region]:
        """The image's boxes by annotation id, in the file's order."""
        return self._regions[image_id]

    def resolve(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """A line of the questions file with its image and boxes.

        Raises:
            BadRecord: it names an image or annotation that is not there.
        """
        image = next((i for i in self.images.values() if i["file_name"] == question["image"]), None)
        if image is None:
            raise BadRecord(f"the image {question['image']!r} is not in the annotation file")
        regions = self.regions(image["id"])
        for wanted in question["annotation_ids"]:
            if wanted in self._bad:
                raise BadRecord(self._bad[wanted])
            if wanted not in regions:
                raise BadRecord(f"the annotation {wanted!r} is not one of image {question['image']!r}")
        targets = list(range(len(question["annotation_ids"])))
        chosen = [regions[wanted] for wanted in question["annotation_ids"]]
        return _record(image, chosen, {**question, "query": {"targets": targets}})

    def _add_image(self, image: Mapping[str, Any], licenses: Mapping[Any, str]) -> None:
        key, name, size = image.get("id"), image.get("file_name"), (image.get("width"), image.get("height"))
        if key in self.images:
            self._problem(f"image-{key}-again", f"the image id {key!r} stands there twice ({name})")
        elif not isinstance(name, str) or not all(isinstance(side, int) and side > 0 for side in size):
            self._problem(f"image-{key}", f"the image {key!r} lacks a file_name, or a width and height in pixels")
        else:
            license_name = licenses.get(image.get("license"), "unknown")
            self.images[key] = {"id": key, "file_name": name, "size": list(size), "license": license_name}

    def _add_annotation(self, annotation: Mapping[str, Any]) -> None:
        key, image_id = annotation.get("id"), annotation.get("image_id")
        try:
            if image_id not in self.images:
                raise BadRecord(f"annotation {key!r} is of an image id that is not there: {image_id!r}")
            if annotation.get("category_id") not in self.categories:
                raise BadRecord(f"annotation {key!r} has an unknown category id: {annotation.get('category_id')!r}")
            name = self.categories[annotation["category_id"]]
            if annotation.get("iscrowd"):
                self.crowded[image_id].add(name)
            elif key in self._regions[image_id]:
                raise BadRecord(f"the annotation id {key!r} stands there twice")
            else:
                box = _fractions(annotation.get("bbox"), self.images[image_id]["size"], key)
                self._regions[image_id][key] = Region(name, box)
        except BadRecord as error:
            self._bad[key] = str(error)
            self._problem(f"annotation-{key}", str(error))

    def _problem(self, key: str, problem: str) -> None:
        taken = sum(item.key == key or item.key.startswith(f"{key}~") for item in self.problems)
        self.problems.append(Item(f"{key}~{taken}" if taken else key, problem=problem))


def _fractions(box: Any, size: list[int], key: Any) -> tuple[float, float, float, float]:
    """COCO's `[x, y, width, height]` in pixels as `[x0, y0, x1, y1]` in 0..1; half a pixel outside is forgiven."""
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
        raise BadRecord(f"annotation {key!r}: bbox {box!r} is not [x, y, width, height]")
    x, y, width, height = (float(value) for value in box)
    if not all(map(math.isfinite, (x, y, width, height))):
        raise BadRecord(f"annotation {key!r}: bbox {box!r} is not finite")
    if width <= 0 or height <= 0:
        raise BadRecord(f"annotation {key!r}: bbox {box!r} has no area")
    if x < -0.5 or y < -0.5 or x + width > size[0] + 0.5 or y + height > size[1] + 0.5:
        raise BadRecord(f"annotation {key!r}: bbox {box!r} lies outside the {size[0]}×{size[1]} image")
    x0, y0 = max(x, 0.0) / size[0], max(y, 0.0) / size[1]
    return x0, y0, min((x + width) / size[0], 1.0), min((y + height) / size[1], 1.0)


def _record(image: Mapping[str, Any], regions: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": image["file_name"],
        "size": image["size"],
        "license": image["license"],
        "regions": [[region.label, list(region.box)] for region in regions],
        **{field: asked[field] for field in ("question", "choices", "answer", "skill", "query")},
    }


def _parse_question(line: str) -> dict[str, Any]:
    try:
        question = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error}") from error
    if not isinstance(question, dict):
        raise BadRecord("not a JSON object")
    for name, kind in (("id", str | int), ("image", str), ("question", str), ("answer", str), ("skill", str)):
        if not isinstance(question.get(name), kind):
            raise BadRecord(f"the field {name!r} is missing or of the wrong kind")
    for name in ("choices", "annotation_ids"):
        if not isinstance(question.get(name, []), list):
            raise BadRecord(f"the field {name!r} is not a list")
    question = {"choices": [], "annotation_ids": [], **question}
    if question["choices"] and question["answer"] not in question["choices"]:
        raise BadRecord(f"the answer {question['answer']!r} is not among the choices {question['choices']}")
    if question["skill"] not in WITH_ANSWER:
        raise BadRecord(f"the skill {question['skill']!r} is none of {', '.join(WITH_ANSWER)}")
    return question


def _lines(path: Path) -> Iterator[str]:
    """Lines, each decoded alone, so that invalid UTF-8 spoils one line only."""
    for raw in _bytes(path).splitlines():
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield json.dumps(f"invalid UTF-8: {error}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _load_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(_bytes(file))
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not valid UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise SourceError(
            f"{file} is not a COCO instances file: expected an object with images, annotations, categories"
        )
    return document


def _rows(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rows = document.get(name, [])
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _required(document: Mapping[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    if not isinstance(document.get(name), list):
        raise SourceError(f"{file} is not a COCO instances file: it has no list {name!r}")
    return _rows(document, name)
