"""Overlap of a dataset with benchmarks, by image and by question: `pearl-gen decontaminate`."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pearl.files import whole_file
from pearl.images import SUFFIXES
from pearl.pipelines.curation.hashing import MAX_DISTANCE, ImageIndex, nearest
from pearl.pipelines.curation.rows import (
    CurationError,
    files_of,
    image_bytes,
    lineage,
    refuse_existing,
    scan,
    write_chosen,
)

Cause = Literal["either", "image", "question", "both"]

TEXT_COLUMNS = ("question", "text")
"""Names of columns with questions, whatever their case."""
NEAR = 6
"""More than for duplicates: benchmarks are often cut or lit a little differently, and a row too few does no harm."""
MIN_WORDS = 4
"""Shorter questions are asked everywhere."""
SHOWN = 50
_MARK = re.compile(r"<image\s*\d*>", re.IGNORECASE)
_OPTIONS = re.compile(r"\n|\(A\)|\bA[.)]\s|\boptions?:|\bchoices:|\bselect from\b", re.IGNORECASE)


@dataclass(frozen=True)
class Decontamination:
    """What counts as overlap.

    Attributes:
        near: Bits of the perceptual hash in which an image may differ from a benchmark's.
        cause: What a row is left out for: its image, its question, either, or both being one benchmark's.
    """

    near: int = NEAR
    cause: Cause = "either"

    def __post_init__(self) -> None:
        if not 0 <= self.near <= MAX_DISTANCE:
            raise CurationError(f"--near {self.near}: 0 to {MAX_DISTANCE} bits")
        if self.cause not in get_args(Cause):
            raise CurationError(f"there is no cause {self.cause!r}; there are {', '.join(get_args(Cause))}")


class BenchmarkFolder:
    """What is in the folder of a benchmark, or any folder of images.

    Images are files and the image columns of Parquet files; questions are columns named question or text of Parquet,
    CSV, TSV, JSON and JSONL files.

    Attributes:
        images: Its distinct images; `places` says where each is.
        questions: Where each question (see `asked`) is.
        unreadable: What could not be read or decoded, and tables in which nothing could be compared.

    Raises:
        CurationError: it holds neither images nor questions.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if not folder.is_dir():
            raise CurationError(f"benchmark {name}: {folder} is no folder")
        self.name = name
        self.images, self.places = ImageIndex(perceptual=True), list[str]()
        self.questions = dict[str, str]()
        self.unreadable = list[str]()
        self._compared = 0
        for path in sorted(folder.rglob("*")):
            where = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in where.parts):
                self._read(path, where.as_posix())
        if not self.places and not self.questions:
            raise CurationError(
                f"benchmark {name}: {folder} holds no image and no column named {' or '.join(TEXT_COLUMNS)}"
            )

    def _read(self, path: Path, where: str) -> None:
        kind = path.suffix.lower()
        try:
            if kind in SUFFIXES:
                self._add_image(path.read_bytes(), where)
            elif kind == ".parquet" or kind in _TABLES:
                before = self._compared
                self._add_rows((_parquet_rows if kind == ".parquet" else _TABLES[kind])(path), where)
                if self._compared == before:
                    self.unreadable.append(f"{where}: no image and no column named {' or '.join(TEXT_COLUMNS)}")
        except (OSError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
            self.unreadable.append(f"{where}: {' '.join(str(error).split())}")

    def _add_image(self, data: bytes, where: str) -> None:
        self._compared += 1
        before = self.images.unreadable
        if self.images.add(data) == len(self.places):
            self.places.append(where)
        if self.images.unreadable > before:
            self.unreadable.append(f"{where}: cannot be decoded, and is compared by its bytes alone")

    def _add_rows(self, rows: Iterable[Mapping[str, Any]], file: str) -> None:
        for number, row in enumerate(rows, start=1):
            for name, value in row.items():
                self._add_value(str(name), value, f"{file} row {number}")

    def _add_value(self, name: str, value: Any, where: str) -> None:
        if isinstance(value, str):
            if name.strip().lower() in TEXT_COLUMNS and (question := asked(value)):
                self._compared += 1
                self.questions.setdefault(question, where)
            return
        for one in value if isinstance(value, list) else [value]:
            data = one.get("bytes") if isinstance(one, dict) else one
            if isinstance(data, bytes):
                self._add_image(data, f"{where} {name}")


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The columns that may hold images or questions, a few rows at a time."""
    file = pq.ParquetFile(path)
    wanted = [column.name for column in file.schema_arrow if _may_matter(column)]
    for batch in file.iter_batches(batch_size=16, columns=wanted):
        yield from batch.to_pylist()


def _may_matter(column: pa.Field) -> bool:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" for child in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or column.name.strip().lower() in TEXT_COLUMNS


def _csv_rows(path: Path, delimiter: str = ",") -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # tables of published benchmarks hold images as text
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def _tsv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    return _csv_rows(path, "\t")


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (row for line in file if line.strip() and isinstance(row := json.loads(line), dict))


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content if isinstance(content, list) else [content]
    yield from (row for row in rows if isinstance(row, dict))


_TABLES = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}


def asked(text: str) -> str | None:
    """A question without its options, placeholders, case and punctuation; None when that is too short to tell it."""
    pieces = _OPTIONS.split(_MARK.sub(" ", text).strip())
    words = re.findall(r"\w+", pieces[0].casefold())
    return " ".join(words) if len(words) >= MIN_WORDS else None


@dataclass(frozen=True)
class Match:
    """A row that overlaps with a benchmark: the image or the question there, or None. `bits`: the images' distance."""

    id: str
    benchmark: str
    image: str | None
    bits: int | None
    question: str | None
    left_out: bool


@dataclass
class Report:
    """What was compared and found.

    Attributes:
        benchmarks: Of each, how many images and questions were compared, and files that could not be read.
        unreadable: How many of the dataset's images could not be decoded; they are compared by bytes alone.
    """

    data: str
    settings: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]
    rows: int = 0
    kept: int = 0
    unreadable: int = 0
    matches: list[Match] = field(default_factory=list)


def decontaminate(
    data: str | Path, benchmarks: Mapping[str, Path], out: Path | None, wanted: Decontamination
) -> Report:
    """Compares every row with benchmarks, and writes those that do not overlap as one file, unless `out` is None.

    Args:
        benchmarks: Folders by name.

    Raises:
        CurationError: `out` exists, nothing is left, or a folder holds nothing to compare with.
        DataError: the data cannot be read.
    """
    if out is not None:
        refuse_existing(out)
    if not benchmarks:
        raise CurationError("there is no benchmark to compare with")
    [files] = files_of([data])
    folders = [BenchmarkFolder(name, folder) for name, folder in benchmarks.items()]
    compared = {
        one.name: {"images": len(one.places), "questions": len(one.questions), "unreadable": one.unreadable}
        for one in folders
    }
    report = Report(str(data), asdict(wanted), compared)
    index, ids, image_of, questions = ImageIndex(perceptual=True), list[str](), list[int](), list[str | None]()
    for row in scan(files, ["id", "image.bytes", "question"]):
        ids.append(row["id"])
        image_of.append(index.add(image_bytes(row)))
        questions.append(asked(row["question"]))
    chosen = np.ones(len(ids), bool)
    for folder in folders:
        seen = _seen(index, folder, wanted.near)
        for number, (image, question) in enumerate(zip(image_of, questions, strict=True)):
            shown, posed = seen[image], folder.questions.get(question) if question else None
            if shown is None and posed is None:
                continue
            hit = _overlaps(shown is not None, posed is not None, wanted.cause)
            chosen[number] &= not hit
            where, bits = (None, None) if shown is None else (folder.places[shown[0]], shown[1])
            report.matches.append(Match(ids[number], folder.name, where, bits, posed, hit))
    report.rows, report.kept, report.unreadable = len(ids), int(chosen.sum()), index.unreadable
    if out is not None and report.kept:
        settings = {**asdict(wanted), "benchmarks": compared}
        write_chosen(files, chosen, out, lineage("decontaminate", settings, [data]))
    return report


def _seen(index: ImageIndex, folder: BenchmarkFolder, near: int) -> list[tuple[int, int] | None]:
    """For each image the benchmark's nearest and their distance in bits; the same bytes come before a near one."""
    known = {key: number for number, key in enumerate(folder.images.digests)}
    close = nearest(index.hashes, folder.images.hashes, near)
    return [(known[key], 0) if key in known else found for key, found in zip(index.digests, close, strict=True)]


def _overlaps(image: bool, question: bool, cause: Cause) -> bool:
    return {"either": image or question, "both": image and question, "image": image, "question": question}[cause]


def write_report(report: Report, stem: Path) -> tuple[Path, Path]:
    """Writes `stem`.json with every match and `stem`.md with the first of them; their paths."""
    as_json, as_markdown = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    with whole_file(as_json) as partial:
        partial.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with whole_file(as_markdown) as partial:
        partial.write_text(markdown(report), encoding="utf-8")
    return as_json, as_markdown


def markdown(report: Report) -> str:
    by_image = Counter(match.benchmark for match in report.matches if match.image)
    by_question = Counter(match.benchmark for match in report.matches if match.question)
    summary = (
        f"{report.rows} trajectories, {report.rows - report.kept} left out, {report.kept} kept. A row is left out for"
        f" `{report.settings['cause']}`; images are near within {report.settings['near']} of 64 bits."
    )
    lines = [
        f"# Overlap of {report.data} with benchmarks",
        "",
        summary,
        "",
        "| benchmark | images | questions | rows with its image | rows with its question |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {one['images']} | {one['questions']} | {by_image[name]} | {by_question[name]} |"
            for name, one in report.benchmarks.items()
        ),
    ]
    unread = [f"- {name}: {file}" for name, one in report.benchmarks.items() for file in one["unreadable"]]
    if unread:
        lines += ["", "Not compared, because unreadable:", "", *unread]
    if report.unreadable:
        lines += ["", f"{report.unreadable} images of the data cannot be decoded and were compared by bytes alone."]
    if report.matches:
        lines += ["", "| row | benchmark | image | bits | question | left out |", "|---|---|---|--:|---|---|"]
        lines += [_markdown_row(match) for match in report.matches[:SHOWN]]
    if len(report.matches) > SHOWN:
        lines += ["", f"… and {len(report.matches) - SHOWN} more."]
    return "\n".join(lines) + "\n"


def _markdown_row(match: Match) -> str:
    bits = "" if match.bits is None else match.bits
    cells = [
        match.id,
        match.benchmark,
        match.image or "",
        bits,
        match.question or "",
        "yes" if match.left_out else "no",
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
