"""`coco:FILE`: any COCO instances file, with a file of questions, or with questions made from its boxes."""

from __future__ import annotations

import codecs
import hashlib
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pearl.images import ImageError, header
from pearl.pipelines.sources.base import (
    BadRecord,
    Item,
    Source,
    SourceError,
    SourceOptions,
    listing_hash,
    read_image,
)
from pearl.pipelines.sources.box_questions import AnnotatedImage, questions_from_boxes
from pearl.records import Region, Sample

MOST_SIDE = 1_000_000
"""Pixels of an image's side."""
REGION_SKILLS = ("attribute", "fine detail", "counting", "spatial relation", "depth", "comparison", "existence", "text")
"""The skills that need nothing but regions: what question files and tables may name."""


class Coco(Source):
    """COCO instances.

    Boxes become fractions of the image's own size as the file states it. Crowd regions (`iscrowd`) stand for no single
    object: nothing is asked about their category in that image, nor about that of a refused annotation. Masks
    (polygons, RLE) are not read; their `area` is.
    """

    name = "coco"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if not argument:
            raise SourceError("coco needs the annotation file: --source coco:instances.json")
        self.file = Path(argument)
        self.images = Path(options.images) if options.images else self.file.parent
        self.questions = Path(options.questions) if options.questions else None
        self.options = options
        self.licenses: Mapping[str, str] = {}

    def items(self) -> Iterator[Item]:
        if not self.images.is_dir():
            raise SourceError(f"the images' folder {self.images} is not there; give it with --images")
        index = CocoIndex(self.file)
        empty = True
        for item in chain(index.problems, self._given(index) if self.questions else self._made(index)):
            empty = False
            yield item
        if empty:
            why = f"{self.questions} has no line" if self.questions else "no question can be made from its boxes"
            raise SourceError(f"{self.name}: nothing can be asked about {self.file}: {why}")

    def _made(self, index: CocoIndex) -> Iterator[Item]:
        names = sorted(set(index.categories.values()))
        for image_id, image in index.images.items():
            annotated = AnnotatedImage(tuple(index.regions(image_id).values()), frozenset(index.crowded[image_id]))
            for number, asked in enumerate(questions_from_boxes(annotated, names, self.options.seed, str(image_id))):
                yield Item(f"{image_id}-{number}", _record(image, annotated.regions, asked))

    def _given(self, index: CocoIndex) -> Iterator[Item]:
        assert self.questions is not None
        seen: Counter[str] = Counter()
        lines = _bytes(self.questions).removeprefix(codecs.BOM_UTF8).splitlines()
        for number, line in enumerate(lines, start=1):
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
            source=self.name,
            license=self.licenses.get(record["image"], record["license"]),
            query=record["query"],
        )

    def fingerprint(self) -> Mapping[str, Any]:
        files = [self.file, *([self.questions] if self.questions else [])]
        rows = _load_json(self.file).get("images")
        names = {row.get("file_name") for row in (rows if isinstance(rows, list) else ()) if isinstance(row, dict)}
        return {
            "seed": self.options.seed,
            "files": [hashlib.sha256(_bytes(file)).hexdigest() for file in files],
            "images": listing_hash(self.images, (name for name in names if isinstance(name, str))),
        }


class CocoIndex:
    """The parsed annotation file: images, categories, good boxes, crowds, and what is wrong with it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[Item] = []
        self._problem_keys: Counter[str] = Counter()
        self._left_out: dict[Any, str] = {}
        self._left_out_names: dict[str, str] = {}
        self._by_name: dict[str, dict[str, Any]] = {}
        self.images: dict[Any, dict[str, Any]] = {}
        self.categories: dict[Any, str] = {}
        self.crowded: dict[Any, set[str]] = defaultdict(set)
        self._regions: dict[Any, dict[Any, Region]] = defaultdict(dict)
        self._bad: dict[tuple[Any, Any], str] = {}
        document = _load_json(file)
        licenses = {
            _key(one.get("id")): str(one.get("name", "")) for one in self._rows(document.get("licenses"), "licenses")
        }
        for category in self._required(document, "categories"):
            self._add_category(category)
        for image in self._required(document, "images"):
            self._add_image(image, licenses)
        for key in self._left_out.keys() & self.images.keys():
            self._by_name.pop(posixpath.normpath(self.images.pop(key)["file_name"]), None)
        for annotation in self._required(document, "annotations"):
            self._add_annotation(annotation)

    def _required(self, document: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
        if not isinstance(document.get(name), list):
            raise SourceError(f"{self.file} is not a COCO instances file: it has no list {name!r}")
        return self._rows(document[name], name)

    def _rows(self, rows: Any, name: str) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            if isinstance(row, dict):
                yield row
            else:
                self._problem(f"{name}-{number}", f"{name}[{number}] is not a JSON object")

    def regions(self, image_id: Any) -> dict[Any, Region]:
        """The image's boxes by annotation id, in the file's order."""
        return self._regions[image_id]

    def resolve(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """A line of the questions file with its image and boxes.

        Raises:
            BadRecord: it names an image or annotation that is not there.
        """
        name = posixpath.normpath(question["image"])
        image = self._by_name.get(name)
        if image is None:
            missing = f"the image {question['image']!r} is not in the annotation file"
            raise BadRecord(self._left_out_names.get(name, missing))
        regions = self.regions(image["id"])
        for wanted in question["annotation_ids"]:
            if problem := self._bad.get((image["id"], wanted)):
                raise BadRecord(problem)
            if wanted not in regions:
                raise BadRecord(f"the annotation {wanted!r} is not one of image {question['image']!r}")
        targets = list(range(len(question["annotation_ids"])))
        chosen = [regions[wanted] for wanted in question["annotation_ids"]]
        return _record(image, chosen, {**question, "query": {"targets": targets}})

    def _add_category(self, category: Mapping[str, Any]) -> None:
        key, name = _key(category.get("id")), category.get("name")
        if key in self.categories:
            self._problem(f"category-{key}-again", f"the category id {key!r} stands there twice ({name})")
        elif key is None or not isinstance(name, str) or not name:
            self._problem(f"category-{key}", f"the category {key!r} lacks an id or a name")
        else:
            self.categories[key] = name

    def _add_image(self, image: Mapping[str, Any], licenses: Mapping[Any, str]) -> None:
        key, name, size = _key(image.get("id")), image.get("file_name"), (image.get("width"), image.get("height"))
        if key in self.images:
            problem = f"the image id {key!r} stands there twice ({name})"
            self._problem(f"image-{key}-again", problem)
            if name != self.images[key]["file_name"]:  # whose annotations are they?
                self._leave_out(problem, [key], [name, self.images[key]["file_name"]])
        elif (
            key is None
            or not isinstance(name, str)
            or not all(isinstance(side, int) and 0 < side < MOST_SIDE for side in size)
        ):
            problem = f"the image {key!r} lacks an id, a file_name, or a width and height in pixels"
            self._problem(f"image-{key}", problem)
            self._leave_out(problem, [key], [name])
        else:
            license_name = licenses.get(_key(image.get("license"))) or "unknown"
            self.images[key] = {"id": key, "file_name": name, "size": list(size), "license": license_name}
            self._left_out.pop(key, None)  # a spoilt record of this id
            other = self._by_name.setdefault(posixpath.normpath(name), self.images[key])
            if other["id"] != key:  # each id has but a part of what is to be seen
                problem = f"the file {name} stands there under two image ids: {other['id']!r}, {key!r}"
                self._problem(f"image-{key}", problem)
                self._leave_out(problem, [key, other["id"]], [name])

    def _leave_out(self, problem: str, keys: Iterable[Any], names: Iterable[Any]) -> None:
        """Who asks about these images or annotates them is told the same."""
        for key in keys:
            self._left_out.setdefault(key, problem)
        for name in names:
            if isinstance(name, str):
                self._left_out_names.setdefault(posixpath.normpath(name), problem)

    def _add_annotation(self, annotation: Mapping[str, Any]) -> None:
        key, image_id = _key(annotation.get("id")), _key(annotation.get("image_id"))
        category = _key(annotation.get("category_id"))
        try:
            if image_id not in self.images:
                missing = f"the image id {image_id!r} is not there"
                raise BadRecord(f"annotation {key!r}: {self._left_out.get(image_id, missing)}")
            if category not in self.categories:
                raise BadRecord(f"annotation {key!r} has an unknown category id: {category!r}")
            name = self.categories[category]
            if annotation.get("iscrowd"):
                self.crowded[image_id].add(name)
            elif key in self._regions[image_id]:
                raise BadRecord(f"the annotation id {key!r} stands there twice")
            else:
                box = _fractions(annotation.get("bbox"), self.images[image_id]["size"], key)
                self._regions[image_id][key] = Region(name, box, _area(annotation.get("area")))
        except BadRecord as error:
            self._bad[image_id, key] = str(error)
            if category in self.categories:
                self.crowded[image_id].add(self.categories[category])  # what is left would be counted wrongly
            self._problem(f"annotation-{key}", str(error))

    def _problem(self, key: str, problem: str) -> None:
        taken = self._problem_keys[key]
        self._problem_keys[key] += 1
        self.problems.append(Item(f"{key}~{taken}" if taken else key, problem=f"{self.file.name}: {problem}"))


def _key(value: Any) -> Any:
    """An id as a dictionary's key: numbers, text and nothing as they are, anything else (a list, …) as its text."""
    return value if isinstance(value, int | float | str | None) else repr(value)


def _area(pixels: Any) -> dict[str, str]:
    """How much of the picture a mask takes up, where the file says it."""
    known = isinstance(pixels, int | float) and not isinstance(pixels, bool) and 0 < pixels < 1e12
    return {"area": str(pixels)} if known else {}


def _fractions(box: Any, size: list[int], key: Any) -> tuple[float, float, float, float]:
    """COCO's `[x, y, width, height]` in pixels as `[x0, y0, x1, y1]` in 0..1; half a pixel outside is forgiven."""
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
        raise BadRecord(f"annotation {key!r}: bbox {box!r} is not [x, y, width, height]")
    if not all(-1e9 < value < 1e9 for value in box):
        raise BadRecord(f"annotation {key!r}: bbox {box!r} holds NaN, infinity or a number beyond any image")
    x, y, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        raise BadRecord(f"annotation {key!r}: bbox {box!r} has no area")
    if x < -0.5 or y < -0.5 or x + width > size[0] + 0.5 or y + height > size[1] + 0.5:
        raise BadRecord(f"annotation {key!r}: bbox {box!r} lies outside the {size[0]}×{size[1]} image")
    x0, y0 = max(x, 0.0) / size[0], max(y, 0.0) / size[1]
    x1, y1 = min((x + width) / size[0], 1.0), min((y + height) / size[1], 1.0)
    if x0 >= x1 or y0 >= y1:
        raise BadRecord(f"annotation {key!r}: bbox {box!r} lies outside the {size[0]}×{size[1]} image")
    return x0, y0, x1, y1


def _record(image: Mapping[str, Any], regions: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": image["file_name"],
        "size": image["size"],
        "license": image["license"],
        "regions": [[region.label, list(region.box)] for region in regions],
        **{field: asked[field] for field in ("question", "choices", "answer", "skill", "query")},
    }


def _parse_question(line: bytes) -> dict[str, Any]:
    """Each line is decoded alone, so that invalid UTF-8 spoils one line only."""
    try:
        question = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from error
    if not isinstance(question, dict):
        raise BadRecord("not a JSON object")
    for name, kind in (("id", str | int), ("image", str), ("question", str), ("answer", str), ("skill", str)):
        if not isinstance(question.get(name), kind):
            raise BadRecord(f"the field {name!r} is missing or of the wrong kind")
        if not str(question[name]).strip():
            raise BadRecord(f"the field {name!r} is empty")
    for name in ("choices", "annotation_ids"):
        if not isinstance(question.get(name, []), list):
            raise BadRecord(f"the field {name!r} is not a list")
    question = {"choices": [], "annotation_ids": [], **question}
    if not all(isinstance(choice, str) for choice in question["choices"]):
        raise BadRecord(f"the choices {question['choices']} are not all text")
    if not all(isinstance(wanted, int | str) for wanted in question["annotation_ids"]):
        raise BadRecord(f"the annotation ids {question['annotation_ids']} are not all numbers or text")
    if question["choices"] and question["answer"] not in question["choices"]:
        raise BadRecord(f"the answer {question['answer']!r} is not among the choices {question['choices']}")
    if question["skill"] not in REGION_SKILLS:
        raise BadRecord(f"the skill {question['skill']!r} is none of {', '.join(REGION_SKILLS)}")
    return question


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
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise SourceError(
            f"{file} is not a COCO instances file: expected an object with images, annotations, categories"
        )
    return document
