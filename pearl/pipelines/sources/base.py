"""What a source is: a list of items in a fixed order, each of which can be read alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pearl.errors import PearlError
from pearl.files import file_hash
from pearl.images import MAX_PIXELS, ImageError, header
from pearl.records import EncodedImage, Sample
from pearl.scenes.layout import Split
from pearl.tools import Toolbox

MAX_FILE_BYTES = 1_000_000_000
_MACHINE_AT_FAULT = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ETIMEDOUT)
ANNOTATORS = ("detect", "segment", "ocr", "depth")


class SourceError(PearlError, ValueError):
    """The source as a whole cannot be used; said before any work."""


class BadRecord(ValueError):
    """One record cannot become a sample; it is counted, with this message, and the run goes on."""


@dataclass(frozen=True)
class Item:
    """One planned sample: a key that is unique within its source, and what `read` needs to make it (JSON values).

    `problem` is set when the listing already showed that the record is bad.
    """

    key: str
    record: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """What an annotator's scores in 0..1 mean: below `least` nothing was found, from `sure` on it counts as true, and
    what lies between is unsure."""

    least: float
    sure: float

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.sure <= 1:
            raise SourceError(f"the scores {self.least}, {self.sure}: expected 0 ≤ LEAST ≤ SURE ≤ 1")


@dataclass(frozen=True)
class AnnotationOptions:
    """Tools that annotate images which nobody annotated.

    Attributes:
        annotators: Some of `ANNOTATORS`; none, and nothing is annotated.
        labels: What `detect` looks for, in plain words.
        settings: The tools' constructor arguments, by tool.
        detect: What the scores of `detect` mean.
        ocr: What the scores of `ocr` mean.
    """

    annotators: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    detect: Thresholds = Thresholds(0.15, 0.4)
    ocr: Thresholds = Thresholds(0.5, 0.9)

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise SourceError(problem)

    def _problem(self) -> str | None:
        used, plain = set(self.annotators), [" ".join(label.casefold().split()) for label in self.labels]
        if unknown := used - set(ANNOTATORS):
            return f"--annotate: {', '.join(sorted(unknown))} is none of {', '.join(ANNOTATORS)}"
        if len(used) < len(self.annotators):
            return f"--annotate {','.join(self.annotators)}: a tool stands there twice"
        if used and not used & {"detect", "ocr"}:
            return f"--annotate {','.join(self.annotators)}: only detect and ocr find regions; add one of them"
        if "segment" in used and "detect" not in used:
            return "--annotate segment refines what detect finds: add detect"
        if "detect" in used and not all(plain or [""]):
            return 'detect has to be told what to look for: --labels "cat,cup"'
        if plain and "detect" not in used:
            return "--labels is what --annotate detect looks for"
        if twice := sorted({label for label in plain if plain.count(label) > 1}):
            return f"--labels: {', '.join(twice)} stands there twice"
        return None


@dataclass(frozen=True)
class SourceOptions:
    """What the sources may be told; each reads what concerns it.

    Attributes:
        count: scenes: how many samples.
        seed: scenes and made questions.
        split: `train`, `val` or `test`. scenes: they share no scene. hf: the files that are named so.
        size: scenes: pixels a side.
        skills: scenes: what is asked; the usual when empty.
        image_format: scenes: how their pictures are stored.
        images: coco: the images' folder; next to the annotations when not given.
        questions: coco: a JSONL file of questions; made from the boxes when not given.
        columns: parquet and hf: `ours=theirs` for columns of other names.
        tools: The tools that the experts may use (decides what is asked about images without annotation).
        annotation: folder: the tools that annotate its images.
        max_pixels: Larger images are refused.
    """

    count: int = 240
    seed: int = 0
    split: Split = "train"
    size: int = 384
    skills: tuple[str, ...] = ()
    image_format: str = "jpeg"
    images: str | None = None
    questions: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    annotation: AnnotationOptions = field(default_factory=AnnotationOptions)
    max_pixels: int = MAX_PIXELS


class Source(ABC):
    """A source of samples. Its constructor is cheap: every worker makes one, only the driver lists it."""

    name: ClassVar[str]

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All items, always in the same order, without opening an image.

        Raises:
            SourceError: there is nothing to list.
        """

    @abstractmethod
    def read(self, item: Item) -> Sample:
        """The sample of an item.

        Raises:
            BadRecord: the record cannot become one; counted as "bad input".
            Rejected: nothing can be asked or learned here; counted under its reason.
            SourceError, ToolUnavailable: it is not this item alone; the run stops.
        """

    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the samples: content hashes, options."""

    def adopt(self, toolbox: Toolbox) -> None:  # noqa: B027
        """Shares the run's tools, where the source needs the same ones itself."""


_BY_MACHINE = ":annotated-by-"


def annotated_source(name: str, annotators: Iterable[str]) -> str:
    """What a sample with machine-made annotations names as its source: `folder:annotated-by-detect+ocr`."""
    return f"{name}{_BY_MACHINE}{'+'.join(annotators)}"


def annotators_of(source: str) -> tuple[str, ...]:
    """The annotators that such a source names; none where the annotations are not machine-made."""
    return tuple(name for name in source.partition(_BY_MACHINE)[2].split("+") if name)


def read_image(root: Path, relative: str, max_pixels: int) -> EncodedImage:
    """An image file below `root`, untouched.

    Raises:
        BadRecord: it is missing, unreadable, too large, or lies outside `root`.
        SourceError: the machine or its file system is at fault, and not this image.
    """
    path = inside(root, relative)
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise BadRecord(f"{relative}: {size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        refuse_faults_of_the_machine(error, root)
        raise BadRecord(f"{relative}: cannot be read: {error.strerror or error}") from error
    try:
        header(data, max_pixels)
    except ImageError as error:
        raise BadRecord(f"{relative}: {error}") from error
    return EncodedImage(data, Path(relative).name)


def refuse_faults_of_the_machine(error: OSError, root: Path) -> None:
    """
    Raises:
        SourceError: it is not one file below `root` that cannot be read: nothing there can.
    """
    if error.errno in _MACHINE_AT_FAULT or not root.is_dir():
        raise SourceError(f"{root} cannot be read: {error.strerror or error}; --resume goes on") from error


def content_hash(path: Path) -> str:
    """Of a file's bytes.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        return file_hash(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def listing_hash(root: Path, names: Iterable[str]) -> str:
    """A hash of the files below `root` by name and size; those that are not there count by name alone."""
    digest = hashlib.sha256()
    for name in sorted(names):
        try:
            size = (root / name).stat().st_size
        except (OSError, ValueError):  # ValueError: a null character
            size = None
        digest.update(json.dumps([name, size]).encode() + b"\n")
    return digest.hexdigest()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused when it leaves `root`, by `..`, an absolute path or a link.

    Files of a Hub dataset are links into their repository's own store, which do not count as leaving.

    Raises:
        BadRecord
    """
    if "\0" in relative:
        raise BadRecord(f"{relative!r}: a path cannot hold a null character")
    try:
        path = (root / relative).resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise BadRecord(f"{relative}: {error}") from error
    named = Path(os.path.normpath(root / relative))
    stays = path.is_relative_to(root.resolve())
    if not stays and not (named.is_relative_to(os.path.normpath(root)) and _in_store(root, path)):
        raise BadRecord(f"{relative}: the path leaves the folder {root}")
    return path


def _in_store(root: Path, path: Path) -> bool:
    """Whether `path` is a file of the Hub repository in whose cached snapshot `root` lies."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).resolve()
    try:
        repository = cache / root.resolve().relative_to(cache).parts[0]
    except (ValueError, IndexError):
        return False
    return path.is_relative_to(repository / "blobs")
