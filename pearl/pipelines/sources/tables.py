"""`parquet:PATH` and `hf:ORG/NAME`: rows of any Parquet dataset, by a small mapping of columns.

| ours | what it holds | when it is missing |
|---|---|---|
| `image` | HF Image (struct of bytes and path) or binary | the row is refused |
| `question`, `answer` | text | the row is refused |
| `choices` | list of text | an open question |
| `boxes` | list of `[x0, y0, x1, y1]`, in 0..1, or in pixels if any number is above 1 | no regions |
| `labels` | list of text, one a box | "the region" |
| `skill` | one of the skills that a question file may name (`coco.WITH_ANSWER`) | `attribute` |
| `id` | text or number | file and row number |
| `license` | text | `unknown` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pearl.images import ImageError, header
from pearl.parquet import DataError, resolve
from pearl.pipelines.sources.base import BadRecord, Item, Source, SourceError, SourceOptions
from pearl.pipelines.sources.coco import WITH_ANSWER
from pearl.records import EncodedImage, Region, Sample

COLUMNS = ("image", "question", "answer", "choices", "boxes", "labels", "skill", "id", "license")
NEEDED = ("image", "question", "answer")


class ParquetRows(Source):
    name = "parquet"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if not argument:
            raise SourceError(f"{self.name} needs a place: --source parquet:DATA.parquet or hf:ORG/NAME")
        if unknown := set(options.columns) - set(COLUMNS):
            raise SourceError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(COLUMNS)}")
        self.place, self.options = argument, options
        self.columns = {ours: options.columns.get(ours, ours) for ours in COLUMNS}

    def items(self) -> Iterator[Item]:
        for number, path in enumerate(self._files()):
            file = _open(str(path))
            if absent := [self.columns[c] for c in NEEDED if self.columns[c] not in file.schema_arrow.names]:
                names = ", ".join(file.schema_arrow.names)
                raise SourceError(f"{path} has no column {', '.join(absent)} (it has {names}); map them with --columns")
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                for row in range(rows):
                    record = {"file": str(path), "group": group, "row": row, "number": before + row}
                    yield Item(f"{number}/{group}/{row}", record)
                before += rows

    def _files(self) -> list[Path]:
        try:
            return resolve(self.place)
        except DataError as error:
            raise SourceError(str(error)) from error

    def read(self, item: Item) -> Sample:
        record = item.record
        row = _row_group(record["file"], record["group"]).slice(record["row"], 1).to_pylist()[0]
        values = {ours: row.get(theirs) for ours, theirs in self.columns.items()}
        try:
            return self._sample(item.key if values["id"] is None else str(values["id"]), values)
        except (BadRecord, ImageError) as error:
            raise BadRecord(f"{Path(record['file']).name} row {record['number']}: {error}") from error

    def _sample(self, key: str, values: Mapping[str, Any]) -> Sample:
        image = _image(values["image"])
        size = header(image.data, self.options.max_pixels)
        choices = tuple(str(choice) for choice in values["choices"] or ())
        if not values["question"] or values["answer"] in (None, ""):
            raise BadRecord("the question or the answer is empty")
        answer = str(values["answer"])
        if choices and answer not in choices:
            raise BadRecord(f"the answer {answer!r} is not among the choices {list(choices)}")
        skill = str(values["skill"] or "attribute")
        if skill not in WITH_ANSWER:
            raise BadRecord(f"the skill {skill!r} is none of {', '.join(WITH_ANSWER)}")
        regions = _regions(values["boxes"], values["labels"], size)
        query = {"targets": list(range(len(regions)))}
        return Sample(
            key, image, str(values["question"]), choices, answer, regions, skill,
            f"{self.name}:{Path(self.place).name}", str(values["license"] or "unknown"), query,
        )  # fmt: skip

    def fingerprint(self) -> Mapping[str, Any]:
        footers = [str(_open(str(path)).metadata.to_dict()) for path in self._files()]
        return {"columns": self.columns, "files": [str(hash_text(footer)) for footer in footers]}


class HubRows(ParquetRows):
    """The same from the Hub: a dataset whose files are Parquet."""

    name = "hf"


def hash_text(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4)
def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a readable Parquet file: {error}") from error


@lru_cache(maxsize=1)
def _row_group(path: str, group: int) -> pa.Table:
    return _open(path).read_row_group(group)


def _image(value: Any) -> EncodedImage:
    if isinstance(value, bytes):
        return EncodedImage(value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return EncodedImage(value["bytes"], value.get("path"))
    raise BadRecord("the image column holds no image bytes (a path alone is not followed)")


def _regions(boxes: Any, labels: Any, size: tuple[int, int]) -> tuple[Region, ...]:
    if boxes is None:
        return ()
    names = ["region"] * len(boxes) if labels is None else labels
    if len(names) != len(boxes):
        raise BadRecord(f"{len(boxes)} boxes but {len(names)} labels")
    regions = []
    for box, name in zip(boxes, names, strict=True):
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)):
            raise BadRecord(f"the box {box} has not four numbers")
        scale = (*size, *size) if max(box) > 1 else (1, 1, 1, 1)
        x0, y0, x1, y1 = (float(value) / side for value, side in zip(box, scale, strict=True))
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise BadRecord(f"the box {box} is inverted, empty or outside the image")
        regions.append(Region(str(name), (x0, y0, x1, y1)))
    return tuple(regions)
