"""`parquet:PATH` and `hf:ORG/NAME`: rows of any Parquet dataset, by a small mapping of columns.

The columns and their meaning stand in `docs/sources.md`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pearl.images import ImageError, decode_depth, header
from pearl.parquet import DataError, resolve
from pearl.pipelines.sources.base import BadRecord, Item, Source, SourceError, SourceOptions, content_hash
from pearl.pipelines.sources.coco import REGION_SKILLS
from pearl.records import EncodedImage, Region, Sample
from pearl.scenes.layout import SPLITS

COLUMNS = ("image", "question", "answer", "choices", "boxes", "labels", "skill", "id", "license", "depth")
NEEDED = ("image", "question", "answer")
MOST_FRACTION = 1.01
"""Above 1 this much is rounding; a row with a greater number is in pixels."""
MAX_GROUP_BYTES = 1_000_000_000
"""Of the columns that are read, uncompressed: every worker holds one row group in memory."""
_SPLIT_NAMES = {"train": "train(ing)?", "val": "val(id(ation)?)?", "test": "test(ing)?"}


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
        seen: set[str] = set()
        for number, path in enumerate(self._files):
            file = open_table(str(path))
            self._check(path, file)
            before = 0
            for group in range(file.num_row_groups):
                for row, given in enumerate(self._ids(path, file, group)):
                    record = {"file": number, "group": group, "row": row, "number": before + row}
                    key, problem = f"{number}/{group}/{row}" if given is None else given, None
                    if key in seen:
                        problem = f"{path.name} row {before + row}: the id {key!r} stands there already"
                        key = f"{number}/{group}/{row}"
                        while key in seen:
                            key += "~"
                    seen.add(key)
                    yield Item(key, record, problem)
                before += file.metadata.row_group(group).num_rows
        if not seen:
            raise SourceError(f"{self.name}:{self.place} has no row")

    def _check(self, path: Path, file: pq.ParquetFile) -> None:
        """Raises SourceError: a column is missing, or a row group is too large to be held in memory."""
        if absent := [self.columns[c] for c in NEEDED if self.columns[c] not in file.schema_arrow.names]:
            names = ", ".join(file.schema_arrow.names)
            raise SourceError(f"{path} has no column {', '.join(absent)} (it has {names}); map them with --columns")
        prefixes = tuple(f"{name}." for name in self._mapped(file))
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            chunks = [metadata.column(index) for index in range(metadata.num_columns)]
            size = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(prefixes))
            if size > MAX_GROUP_BYTES:
                raise SourceError(
                    f"{path}: row group {group} holds {size:,} bytes, more than the limit of {MAX_GROUP_BYTES:,};"
                    " rewrite the file with smaller row groups (row_group_size of pyarrow.parquet.write_table)"
                )

    def _mapped(self, file: pq.ParquetFile) -> list[str]:
        """The file's columns that are read."""
        return [name for name in dict.fromkeys(self.columns.values()) if name in file.schema_arrow.names]

    def _ids(self, path: Path, file: pq.ParquetFile, group: int) -> Sequence[str | None]:
        """The ids of a row group's rows; None where a row has none."""
        name = self.columns["id"]
        if name not in file.schema_arrow.names:
            return [None] * file.metadata.row_group(group).num_rows
        try:
            values = file.read_row_group(group, columns=[name]).column(name).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} is damaged in row group {group}: {' '.join(str(error).split())}") from error
        return [None if value is None or value == "" else str(value) for value in values]

    @cached_property
    def _files(self) -> list[Path]:
        """In an order that is the same on every machine; a record names a file by its place here."""
        return self._find()

    def _find(self) -> list[Path]:
        try:
            return resolve(self.place)
        except DataError as error:
            raise SourceError(str(error)) from error

    def read(self, item: Item) -> Sample:
        record = item.record
        try:
            path = self._files[record["file"]]
        except IndexError as error:
            raise BadRecord(f"{self.place} has only {len(self._files)} files now; it has changed") from error
        try:
            table = _row_group(str(path), record["group"], tuple(self._mapped(open_table(str(path)))))
            row = table.slice(record["row"], 1).to_pylist()[0]
            return self._sample(item.key, {ours: row.get(theirs) for ours, theirs in self.columns.items()})
        except (BadRecord, ImageError) as error:
            raise BadRecord(f"{path.name} row {record['number']}: {error}") from error

    def _sample(self, key: str, values: Mapping[str, Any]) -> Sample:
        image = _image(values["image"])
        size = header(image.data, self.options.max_pixels)
        choices = tuple(str(choice) for choice in _without_null(_listed(values["choices"], "choices"), "choice"))
        if not values["question"] or values["answer"] in (None, ""):
            raise BadRecord("the question or the answer is empty")
        answer = str(values["answer"])
        if choices and answer not in choices:
            raise BadRecord(f"the answer {answer!r} is not among the choices {list(choices)}")
        skill = str(values["skill"] or "attribute")
        if skill not in REGION_SKILLS:
            raise BadRecord(f"the skill {skill!r} is none of {', '.join(REGION_SKILLS)}")
        regions = _regions(values["boxes"], values["labels"], size)
        query = {"targets": list(range(len(regions)))}
        return Sample(
            key, image, str(values["question"]), choices, answer, regions, skill,
            f"{self.name}:{Path(self.place).name}", str(values["license"] or "unknown"), query,
            _depth(values["depth"], size, self.options.max_pixels),
        )  # fmt: skip

    def fingerprint(self) -> Mapping[str, Any]:
        return {"columns": self.columns, "files": [content_hash(path) for path in self._files]}


class HubRows(ParquetRows):
    """The same from the Hub: a dataset whose files are Parquet."""

    name = "hf"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if options.split not in SPLITS:
            raise SourceError(f"--split {options.split}: there are {', '.join(SPLITS)}")
        super().__init__(argument, options)

    def _find(self) -> list[Path]:
        """
        Raises:
            SourceError: files are named after splits, and none after this one.
        """
        files = super()._find()
        root = self._root(files)

        def of(split: str) -> list[Path]:
            named = re.compile(rf"{_SPLIT_NAMES[split]}(?![a-z])", re.IGNORECASE)
            return [file for file in files if any(map(named.match, file.relative_to(root).parts))]

        there = [split for split in SPLITS if of(split)]
        if there and self.options.split not in there:
            raise SourceError(f"{self.place} has no split {self.options.split}; it has {', '.join(there)}: say --split")
        return of(self.options.split) or files

    def _root(self, files: Sequence[Path]) -> Path:
        """The dataset's: of a folder it, of the Hub's cache (`datasets--ORG--NAME/snapshots/REVISION`) the revision's."""
        if Path(self.place).is_dir():
            return Path(self.place)
        for folder in files[0].parents:
            if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("datasets--"):
                return folder
        return Path(os.path.commonpath(files))


@lru_cache(maxsize=4)
def open_table(path: str) -> pq.ParquetFile:
    """Any Parquet file; the latest ones stay open.

    Raises:
        SourceError: it is none.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a readable Parquet file: {error}") from error


@lru_cache(maxsize=1)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return open_table(path).read_row_group(group, columns=list(columns))


def _image(value: Any, column: str = "image") -> EncodedImage:
    if isinstance(value, bytes):
        return EncodedImage(value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return EncodedImage(value["bytes"], value.get("path"))
    raise BadRecord(f"the {column} column holds no image bytes (a path alone is not followed)")


def _depth(value: Any, size: tuple[int, int], max_pixels: int) -> np.ndarray | None:
    if value is None:
        return None
    try:
        depth = decode_depth(_image(value, "depth").data, max_pixels)
    except ImageError as error:
        raise BadRecord(f"the depth: {error}") from error
    if depth.shape != size[::-1]:
        found = f"{depth.shape[1]}×{depth.shape[0]}"
        raise BadRecord(f"the depth is {found} pixels, but the image is {size[0]}×{size[1]}")
    return depth


def _listed(values: Any, column: str) -> list[Any]:
    """
    Raises:
        BadRecord: a text, say, which would be taken letter by letter.
    """
    if values is None:
        return []
    if not isinstance(values, list):
        raise BadRecord(f"the column {column} holds {str(values)[:40]!r}, which is no list")
    return values


def _without_null(values: list[Any], what: str) -> list[Any]:
    """
    Raises:
        BadRecord: one is null.
    """
    if None in values:
        raise BadRecord(f"a {what} is null")
    return values


def _regions(boxes: Any, labels: Any, size: tuple[int, int]) -> tuple[Region, ...]:
    boxes = _listed(boxes, "boxes")
    names = ["region"] * len(boxes) if labels is None else _listed(labels, "labels")
    if len(names) != len(boxes):
        raise BadRecord(f"{len(boxes)} boxes but {len(names)} labels")
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)):
            raise BadRecord(f"the box {box} has not four numbers")
    in_pixels = any(max(box) > MOST_FRACTION for box in boxes)
    regions = []
    for box, name in zip(boxes, _without_null(names, "label"), strict=True):
        x0, y0, x1, y1 = (
            float(value) / side if in_pixels else min(float(value), 1.0)
            for value, side in zip(box, (*size, *size), strict=True)
        )
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise BadRecord(f"the box {box} is inverted, empty or outside the image")
        regions.append(Region(str(name), (x0, y0, x1, y1)))
    return tuple(regions)
