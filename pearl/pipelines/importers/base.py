"""What a format is: how one of its rows reads as a recorded trajectory."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pearl.boxed import last_boxed
from pearl.boxes import pixel_box
from pearl.images import HARD_MAX_PIXELS, ImageError, header
from pearl.pipelines.checks import states_answer
from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import DataFile, Row, data_files, fetch, listed
from pearl.pipelines.replay import RecordedSample, RecordedStep, texts
from pearl.pipelines.sources.base import BadRecord, Item, Source, SourceError, SourceOptions, content_hash
from pearl.records import Box, EncodedImage, Observation, ToolCall

LOOK_CLOSER = "I look closer at the part of the image that the question is about."
"""The thought of a step for which the data has none."""
IMAGE_FOLLOWS = "Here is the image."
"""The text of an observation for which the data has none."""
IMAGINE = "imagine"
"""The tool of an image that belongs to a thought, and that no known tool made."""


@dataclass(frozen=True)
class ImportOptions:
    """What a format may be told besides where its rows are.

    Attributes:
        source: The images' folder or zip archive (`images`) and the limit of pixels (`max_pixels`) are read.
        license: Recorded with each trajectory.
        reexecute: Carry out again the calls whose tool is known.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    license: str = "unknown"
    reexecute: bool = False


@dataclass(frozen=True)
class Dialogue:
    """What a row says: the question, the steps, the thought that concludes them, the answer.

    `origin` is the dataset that the image is from, where the row names it.
    """

    image: EncodedImage
    question: str
    steps: Sequence[RecordedStep]
    conclusion: str
    answer: str
    skill: str
    origin: str = ""


class Importer(Source):
    """A format: override `dialogue`.

    Attributes:
        columns: The columns of a Parquet file that are read.
        tools: The tools that carry out this format's calls.
    """

    columns: ClassVar[tuple[str, ...]]
    tools: ClassVar[tuple[str, ...]] = ("crop",)

    def __init__(self, place: str, options: ImportOptions) -> None:
        self.place, self.options = place, options

    @abstractmethod
    def dialogue(self, row: Row, images: Images) -> Dialogue:
        """Reads a row.

        Raises:
            Rejected: why the row gives no trajectory; what is counted.
            BadRecord: an image cannot be read; counted as "bad input".
        """

    @cached_property
    def files(self) -> list[DataFile]:
        """In an order that is the same on every machine; a record names a file by its place here."""
        return data_files(self.place, self.options.source.images)

    def items(self) -> Iterator[Item]:
        empty = True
        for number, file in enumerate(self.files):
            for row in listed(file):
                empty = False
                yield Item(f"{file.name}:{row.number}", {"file": number, **row.record}, row.problem)
        if empty:
            raise SourceError(f"{self.name}: {self.place} has no row")

    def read(self, item: Item) -> RecordedSample:
        try:
            file = self.files[item.record["file"]]
        except IndexError as error:
            raise BadRecord(f"{self.place} has only {len(self.files)} files now; it has changed") from error
        row = fetch(file, item.record, self.columns)
        said = self.dialogue(row, Images(file.images, self.options.source.max_pixels))
        sample = RecordedSample(
            key=item.key,
            image=said.image,
            question=_told(said.question, "the question is empty"),
            choices=(),
            answer=_told(said.answer, "the answer is empty"),
            regions=(),
            skill=said.skill,
            source=f"{self.name}:{said.origin}" if said.origin else self.name,
            license=self.options.license,
            steps=tuple(said.steps),
            conclusion=concluded(said.conclusion, said.answer),
        )
        for step in sample.steps:
            _told(step.thought, "a thought is empty")
        for text in texts(sample):
            _storable(text)
        return sample

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "license": self.options.license,
            "reexecute": self.options.reexecute,
            "files": [[file.name, content_hash(file.path)] for file in self.files],
        }

    def recorded(self, thought: str, call: ToolCall, observation: Observation | None, known: bool) -> RecordedStep:
        """A step that brings its observation. Where the tool is `known` it may be carried out again, or for the first
        time if nothing is recorded.

        Raises:
            Rejected: nothing is recorded, and it is not to be carried out.
        """
        if observation is None and not (known and self.options.reexecute):
            raise Rejected("a recorded image is missing", call.tool)
        return RecordedStep(thought, call, observation, again=known and self.options.reexecute)


class Numbering:
    """Which image of a trajectory a name of the data means, in our numbers: 0 is the original, i step i's output."""

    def __init__(self, original: Any, image: EncodedImage) -> None:
        self._known: dict[Any, tuple[int, EncodedImage | None]] = {original: (0, image)}

    def add(self, name: Any, step: int, image: EncodedImage | None) -> None:
        """`name` is the output of `step`; its image is None where it is still to be made."""
        self._known[name] = (step, image)

    @property
    def count(self) -> int:
        return len(self._known)

    def number(self, name: Any) -> int:
        """Raises Rejected: no such image."""
        return self._entry(name)[0]

    def size(self, name: Any) -> tuple[int, int] | None:
        """Width and height in pixels; None where the image is still to be made.

        Raises:
            Rejected: no such image.
        """
        image = self._entry(name)[1]
        return None if image is None else size_of(image)

    def _entry(self, name: Any) -> tuple[int, EncodedImage | None]:
        try:
            return self._known[name]
        except (KeyError, TypeError):
            raise Rejected("a call names an image that is not there", str(name)[:80]) from None


def size_of(image: EncodedImage) -> tuple[int, int]:
    """Width and height in pixels, as the image is seen.

    Raises:
        BadRecord
    """
    try:
        return header(image.data, HARD_MAX_PIXELS)
    except ImageError as error:
        raise BadRecord(f"{image.path}: {error}") from error


def numbers(value: Any, count: int = 4) -> list[float]:
    """Raises Rejected unless `value` is a list of `count` finite numbers."""
    good = isinstance(value, list | tuple) and len(value) == count
    if not good or not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value):
        raise Rejected("a box is not four numbers", str(value)[:80])
    return [float(n) for n in value]


def fractions(value: Any) -> Box:
    """A box that stands in fractions of the image's width and height.

    Raises:
        Rejected: it is not four numbers, inverted, empty, or outside the image.
    """
    x0, y0, x1, y1 = numbers(value)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise Rejected("a box is inverted, empty or outside the image", str(value))
    return x0, y0, x1, y1


def whole_pixels(value: Sequence[float], size: tuple[int, int]) -> Box:
    """The box in fractions of `size` whose crop is exactly the pixels left, top, right, bottom (exclusive).

    Raises:
        Rejected: it is inverted, empty, or outside the image.
    """
    left, top, right, bottom = map(int, value)
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise Rejected("a box is inverted, empty or outside the image", f"{list(value)} of {width}×{height} pixels")
    box = (left / width, top / height, right / width, bottom / height)
    if pixel_box(box, width, height) == (left, top, right, bottom):
        return box
    return (
        (left + 0.25) / width if left else 0.0,
        (top + 0.25) / height if top else 0.0,
        (right - 0.25) / width if right < width else 1.0,
        (bottom - 0.25) / height if bottom < height else 1.0,
    )


def looked_at(image: int, box: Box) -> ToolCall:
    return ToolCall("crop", {"image": image, "box": list(box)})


def text_of(value: Any, what: str) -> str:
    """Raises Rejected unless it is text."""
    if not isinstance(value, str):
        raise Rejected(f"{what} is no text", str(value)[:80])
    return value


def without_placeholders(text: str) -> str:
    return text.replace("<image>\n", "").replace("<image>", "").strip()


def conversation(value: Any) -> list[tuple[str, str]]:
    """Turns of `from` and `value`, or of `role` and `content`, as who speaks (`user`, `assistant`, `system`) and what.

    Raises:
        Rejected: it is no list of such turns.
    """
    speakers = {"human": "user", "gpt": "assistant"}
    if not isinstance(value, list) or not value:
        raise Rejected("there is no conversation")
    turns = []
    for turn in value:
        turn = turn if isinstance(turn, Mapping) else {}
        who, said = turn.get("from") or turn.get("role"), turn.get("value", turn.get("content"))
        if not isinstance(who, str) or not isinstance(said, str):
            raise Rejected("a turn is not somebody's text", json.dumps(turn)[:80])
        turns.append((speakers.get(who, who), said))
    return turns


def only_image(value: Any) -> Any:
    """The one image that a row is about; a list of several is refused.

    Raises:
        Rejected
    """
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise Rejected("no image" if not value else "more than one input image", str(len(value)))
    return value[0]


_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(text: str) -> tuple[str, str]:
    r"""The last text without its marks, and the answer: in `<answer>…</answer>`, or in `\boxed{…}`; the whole text where
    nothing is marked."""
    if found := _TAGGED.findall(text):
        return _TAGGED.sub(lambda match: match[1].strip(), text).strip(), found[-1].strip()
    if boxed := last_boxed(text):
        return "".join(boxed).strip(), boxed[1].strip()
    return text.strip(), text.strip()


def concluded(thought: str, answer: str) -> str:
    """The concluding thought, which names the answer."""
    return thought if states_answer(thought, answer) else f"{thought}\nThe answer is {answer}.".strip()


def _told(text: str, otherwise: str) -> str:
    if not text.strip():
        raise Rejected(otherwise)
    return text


def _storable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{text[:80]!r} is not valid Unicode: {error.reason}") from error
