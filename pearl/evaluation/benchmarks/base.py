"""What a benchmark is, and what those that were published as files share: finding, reading and refusing them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, ClassVar, get_args

from pearl.errors import PearlError
from pearl.evaluation.records import LETTERS, Question, Scoring
from pearl.images import ImageError, header
from pearl.records import EncodedImage

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
PROBLEMS_SHOWN = 5
_OPENINGS: Mapping[Scoring, str] = {"pearl-published": "<answer>"}
_MAX_NEW_TOKENS: Mapping[Scoring, int] = {"lvr": 512, "pearl-published": 4}


class BenchmarkError(PearlError, ValueError):
    """A benchmark that cannot be asked; the message says which file and record, and what was expected."""


class BadRecord(ValueError):
    """A record that is no question; the message says why."""


class Benchmark(ABC):
    """A fixed list of questions.

    Args:
        place: A folder or a Hub dataset id (`org/name`); None: where the benchmark usually is.
        scoring: Whose wording and limits the questions get.
        count: Only the first so many questions of each category.

    Raises:
        BenchmarkError: one of them cannot be.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Part of a result's identity: raise it with every change of the questions or of their wording."""

    def __init__(self, place: str | None = None, scoring: Scoring = "strict", count: int | None = None) -> None:
        if scoring not in get_args(Scoring):
            raise BenchmarkError(f"there is no scoring {scoring!r}; there are {', '.join(get_args(Scoring))}")
        if count is not None and count < 1:
            raise BenchmarkError(f"{count} questions a category: at least 1")
        self.place, self.scoring, self.count = place, scoring, count

    @abstractmethod
    def questions(self) -> tuple[Question, ...]:
        """All questions, always in the same order.

        Raises:
            BenchmarkError: one cannot be asked; the rest would give another number than the benchmark's.
        """

    def pairs(self, questions: Iterable[Question]) -> dict[str, str]:
        """By id, the pair that a question belongs to, where a benchmark counts pairs too."""
        return {}


class PublishedBenchmark(Benchmark):
    """A benchmark in the layout of its Hub repository.

    `files` are the patterns of what is needed of that repository, `layout` names them in messages.
    """

    hub_id: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    layout: ClassVar[str]

    def questions(self) -> tuple[Question, ...]:
        folder = local_folder(self.place or self.hub_id, self.files)
        questions: dict[str, Question] = {}
        problems = []
        for where, record in self.records(folder):
            try:
                question = self.question(folder, record)
                if question.id in questions:
                    raise BadRecord(f"the id {question.id!r} stands there twice")
                questions[question.id] = question
            except BadRecord as error:
                problems.append(f"{where}: {error}")
        if problems:
            shown = [*problems[:PROBLEMS_SHOWN], "…"] if len(problems) > PROBLEMS_SHOWN else problems
            total = len(problems) + len(questions)
            raise BenchmarkError(
                f"{self.name}: {len(problems)} of {total} records in {folder} are no questions, so none is asked:\n  "
                + "\n  ".join(shown)
            )
        if not questions:
            raise BenchmarkError(f"{self.name}: {folder} holds no question; expected {self.layout}")
        return tuple(first_of_each(questions.values(), self.count))

    @abstractmethod
    def records(self, folder: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Where each record stands, for messages, and its columns.

        Raises:
            BenchmarkError: a file cannot be read.
        """

    @abstractmethod
    def question(self, folder: Path, record: Mapping[str, Any]) -> Question:
        """Raises BadRecord."""

    def asked(
        self,
        id: str,
        category: str,
        images: tuple[EncodedImage, ...],
        prompt: str,
        options: tuple[str, ...],
        answer: int,
    ) -> Question:
        """A question with what the scoring adds to it."""
        opening, limit = _OPENINGS.get(self.scoring, ""), _MAX_NEW_TOKENS.get(self.scoring)
        return Question(id, self.name, category, images, prompt, options, answer, opening, limit)


def first_of_each(questions: Iterable[Question], count: int | None) -> Iterator[Question]:
    """The first `count` of each category, in order; all, when it is None."""
    had = Counter[str]()
    for question in questions:
        had[question.category] += 1
        if count is None or had[question.category] <= count:
            yield question


def local_folder(place: str, files: tuple[str, ...]) -> Path:
    """The folder itself, or where the Hub's files of that dataset are.

    Raises:
        BenchmarkError: it is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if path.exists() or place.count("/") != 1:
        raise BenchmarkError(f"{place} is neither a folder nor a Hub dataset id (org/name)")
    try:
        return Path(snapshot_download(place, repo_type="dataset", allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise BenchmarkError(f"{place} is no folder, and the Hub does not give it: {reason}") from error


def parquet_records(root: Path, paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of Parquet files below `root`.

    Raises:
        BenchmarkError: a file is no Parquet, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        number = 0
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.relative_to(root).as_posix()} row {number}", row
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{path} is no readable Parquet file: {' '.join(str(error).split())}") from error


def column(record: Mapping[str, Any], name: str) -> Any:
    """Raises BadRecord: it is not there."""
    if name not in record:
        raise BadRecord(f"there is no column {name!r}, but {', '.join(map(str, record)) or 'nothing'}")
    return record[name]


def text(record: Mapping[str, Any], name: str) -> str:
    """A column's text as it stands; a number as text.

    Raises:
        BadRecord: it is missing, empty or something else.
    """
    value = column(record, name)
    if not isinstance(value, str | int) or not str(value).strip():
        raise BadRecord(f"column {name!r} holds {value!r:.60}; expected a text")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"column {name!r} holds what is no Unicode: {error.reason}") from error
    return str(value)


def answer_index(label: str, options: tuple[str, ...]) -> int:
    """The option that `label` names: a letter, possibly in parentheses.

    Raises:
        BadRecord: it names none.
    """
    letter = re.fullmatch(r"\(?([A-Za-z])\)?", label.strip())
    index = LETTERS.find(letter[1].upper()) if letter else -1
    if not 0 <= index < len(options):
        raise BadRecord(f"the answer {label!r} is none of the options A to {LETTERS[len(options) - 1]}")
    return index


def image(folder: Path, record: Mapping[str, Any], name: str) -> EncodedImage:
    """A column's image: its bytes, or a path below `folder`.

    Raises:
        BadRecord: it is missing or no image.
    """
    value = column(record, name)
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else EncodedImage(value["bytes"], value.get("path"))
    if isinstance(value, EncodedImage):
        return _checked(value, f"column {name!r}")
    if isinstance(value, str):
        return image_file(folder, value)
    raise BadRecord(f"column {name!r} holds {type(value).__name__}; expected an image or the path of one")


def image_file(folder: Path, relative: str) -> EncodedImage:
    """An image file below `folder`, untouched.

    Links are followed: the Hub's own cache consists of them.

    Raises:
        BadRecord: it is missing, no image, or its path leaves the folder.
    """
    path = PurePath(relative)
    if path.is_absolute() or ".." in path.parts or "\0" in relative:
        raise BadRecord(f"the image path {relative!r} leaves the folder")
    try:
        data = (folder / path).read_bytes()
    except (OSError, UnicodeEncodeError) as error:
        raise BadRecord(f"the image {relative!r} cannot be read: {getattr(error, 'strerror', '') or error}") from error
    return _checked(EncodedImage(data, path.name), repr(relative))


def _checked(encoded: EncodedImage, where: str) -> EncodedImage:
    try:
        header(encoded.data)
    except ImageError as error:
        raise BadRecord(f"the image in {where}: {error}") from error
    return encoded
