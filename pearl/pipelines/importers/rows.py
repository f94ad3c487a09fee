"""The rows of a published dataset: JSON lists, JSON lines and Parquet, one row in memory at a time.

A JSON row travels in the plan, so no worker parses a file of gigabytes; of a Parquet row, which may hold images, the
plan knows only the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa

from pearl.pipelines.importers.images import check_images
from pearl.pipelines.sources.base import BadRecord, SourceError, refuse_faults_of_the_machine
from pearl.pipelines.sources.tables import MAX_GROUP_BYTES, open_table

Row = Mapping[str, Any]
SUFFIXES = (".json", ".jsonl", ".parquet")
MAX_ROW_CHARS = 4_000_000
"""Of a JSON row: conversations are some kilobytes; images do not stand in JSON."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
        name: What it is called in messages and keys; unique among the files of a dataset.
        images: The folder or zip archive that the paths in its rows start from, and may not leave.
    """

    path: Path
    name: str
    images: Path


@dataclass(frozen=True)
class Listed:
    """A row as it is planned: its number in the file, counted from 1, and its place or the row itself."""

    number: int
    record: Mapping[str, Any]
    problem: str | None = None


def data_files(place: str, images: str | None) -> list[DataFile]:
    """The files of rows at a file, a folder, a glob or a Hub dataset id, in an order that is the same everywhere.

    `images` is the folder or zip archive that their images lie in, of a Hub dataset one of its own unless the path is
    absolute; None: the data's folder.

    Raises:
        SourceError: there are none, or no such images.
    """
    path, given = Path(place), Path(images) if images else None
    matches = sorted(match for match in map(Path, glob(place, recursive=True)) if match.suffix in SUFFIXES)
    if not path.exists() and not matches:
        own = None if given is None or given.is_absolute() else given.as_posix()
        if given and not own:
            check_images(given)
        path = _download(place, own)
        given = path / own if own else given
    if given:
        check_images(given)
    if path.is_file():
        return [DataFile(path, path.name, given or path.parent)]
    if not path.is_dir():
        return [DataFile(file, file.as_posix(), given or file.parent) for file in matches]
    found = (file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    files = sorted(file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts))
    if not files:
        raise SourceError(f"no {', '.join(SUFFIXES)} file at {place}")
    return [DataFile(file, file.relative_to(path).as_posix(), given or path) for file in files]


def _download(place: str, images: str | None) -> Path:
    """The rows of a Hub dataset, and a folder or an archive of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if place.count("/") != 1 or place.endswith(SUFFIXES):
        raise SourceError(f"nothing is at {place}: expected a file, a folder, a glob or a Hub dataset id (org/name)")
    wanted = [f"*{end}" for end in SUFFIXES]
    if images:
        wanted += [images, f"{images}/*"]
    try:
        return Path(snapshot_download(place, repo_type="dataset", allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(f"{place} is no local path, and the Hub does not give it: {error}") from error


def listed(file: DataFile) -> Iterator[Listed]:
    """All rows of a file, in its order; a row that cannot be read has a problem.

    Raises:
        SourceError: the file as a whole cannot be read.
    """
    try:
        if file.path.suffix == ".parquet":
            yield from _parquet_places(file)
        else:
            with file.path.open("rb") as opened:
                yield from _json_lines(opened) if _is_lines(opened) else _json_items(file, opened)
    except OSError as error:
        raise SourceError(f"{file.path} cannot be read: {error.strerror or error}") from error


def fetch(file: DataFile, record: Mapping[str, Any], columns: tuple[str, ...]) -> Row:
    """The row that was listed as `record`; of Parquet only `columns` are read.

    Raises:
        BadRecord: the file is damaged there, or has changed since.
        SourceError: the machine or its file system is at fault.
    """
    if "row" in record:
        row: Row = record["row"]
        return row
    try:
        table = _row_group(str(file.path), record["group"], columns)
        return dict(table.slice(record["index"], 1).to_pylist()[0])
    except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        if isinstance(error, OSError):
            refuse_faults_of_the_machine(error, file.path.parent)
        reason = " ".join(str(error).split())
        raise BadRecord(f"{file.name} is damaged in row group {record['group']}: {reason}") from error


def _is_lines(opened: BinaryIO) -> bool:
    """Whether a file holds one JSON object a line rather than one list; whatever it is called."""
    head = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    return not head.startswith(b"[")


def _json_lines(opened: BinaryIO) -> Iterator[Listed]:
    for number, line in enumerate(opened, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Listed(number, {}, f"not JSON: {error}")
        else:
            yield _checked(number, row)


def _json_items(file: DataFile, opened: BinaryIO) -> Iterator[Listed]:
    if opened.read(3) != b"\xef\xbb\xbf":
        opened.seek(0)
    number = 0
    try:
        for number, row in enumerate(ijson.items(opened, "item", use_float=True), start=1):
            yield _checked(number, row)
    except (ijson.JSONError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{file.path} is no whole JSON list: after row {number}: {reason} (NaN is no JSON either; of a file with one "
            "row a line the other rows are taken)"
        ) from error


def _checked(number: int, row: Any) -> Listed:
    if not isinstance(row, dict):
        return Listed(number, {}, "not a JSON object")
    try:
        length = len(json.dumps(row))
    except RecursionError:
        return Listed(number, {}, "nested too deeply")
    if length > MAX_ROW_CHARS:
        return Listed(number, {}, f"{length:,} characters are more than the limit of {MAX_ROW_CHARS:,}")
    return Listed(number, {"row": row})


def _parquet_places(file: DataFile) -> Iterator[Listed]:
    number = 0
    parquet = open_table(str(file.path))
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        if metadata.total_byte_size > MAX_GROUP_BYTES:
            raise SourceError(
                f"{file.path}: row group {group} holds {metadata.total_byte_size:,} bytes, more than the limit of"
                f" {MAX_GROUP_BYTES:,}; rewrite the file with smaller row groups"
            )
        for index in range(metadata.num_rows):
            number += 1
            yield Listed(number, {"group": group, "index": index})


@lru_cache(maxsize=1)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    file = open_table(path)
    return file.read_row_group(group, columns=[name for name in columns if name in file.schema_arrow.names])
