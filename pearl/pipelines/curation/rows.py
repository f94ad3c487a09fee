"""Rows of datasets by their place: looked through by a few columns, then copied without being touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from pearl.errors import PearlError
from pearl.files import whole_file
from pearl.parquet import (
    BYTES_PER_GROUP,
    ROWS_PER_GROUP,
    DataError,
    open_parquet,
    open_writer,
    read_group,
    read_metadata,
    read_table,
    resolve,
    schema,
)


class CurationError(PearlError, ValueError):
    """Rows cannot be chosen or written as asked; the message says why."""


NOWHERE = -1


def files_of(inputs: Sequence[str | Path]) -> list[list[Path]]:
    """The files of each dataset, in order.

    Raises:
        DataError: a dataset has none.
        CurationError: there is no dataset, or a file belongs to two of them.
    """
    found = [resolve(data) for data in inputs]
    resolved = [path.resolve() for paths in found for path in paths]
    if not found or len(set(resolved)) < len(resolved):
        twice = sorted({str(path) for path in resolved if resolved.count(path) > 1})
        raise CurationError(f"a file is given twice: {', '.join(twice[:3])}" if twice else "there is no dataset")
    return found


def scan(files: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """These columns of every row, in order; one row group of them is in memory at a time."""
    for path in files:
        file = open_parquet(path)
        for group in range(file.num_row_groups):
            yield from read_group(path, file, group, columns)


def image_bytes(row: Mapping[str, Any]) -> bytes:
    """Of a row that was scanned with `image.bytes`.

    Raises:
        DataError: it has no image.
    """
    data = (row["image"] or {}).get("bytes")
    if data is None:
        raise DataError(f"row {row.get('id')!r} has no image")
    return bytes(data)


def lineage(command: str, settings: Mapping[str, Any], inputs: Sequence[str | Path]) -> dict[str, Any]:
    """What an output's schema says of how it was made; of each input, what its first file says of itself."""
    made_from = [
        {"data": str(data), "made_by": read_metadata(open_parquet(resolve(data)[0]).schema_arrow)} for data in inputs
    ]
    return {command: dict(settings), "made_from": made_from}


class RowWriter:
    """Writes rows of Arrow tables as one file of trajectories, in groups of `ROWS_PER_GROUP`, fewer when images are
    large; a name for the file is the caller's affair."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self._file = open_writer(path, schema(made_by))
        self._pending = list[pa.Table]()
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self.rows += table.num_rows
        self._pending.append(table.replace_schema_metadata(self._file.schema.metadata))
        while sum(one.num_rows for one in self._pending) >= ROWS_PER_GROUP:
            self._flush()
        if sum(one.nbytes for one in self._pending) > BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        joined = pa.concat_tables(self._pending)
        self._file.write_table(joined.slice(0, ROWS_PER_GROUP))
        rest = joined.slice(ROWS_PER_GROUP)
        self._pending = [rest] if rest.num_rows else []

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._file.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        with suppress(OSError, pa.ArrowException):  # what went wrong before is what counts
            self._file.close()


def copy_rows(files: Sequence[Path], part_of: np.ndarray, writers: Sequence[RowWriter]) -> None:
    """Copies each row to the writer whose number `part_of` (one a row, in order) gives, or `NOWHERE`.

    Raises:
        DataError: a file is damaged, or is another one than when the rows were chosen.
    """
    begin = 0
    for path in files:
        file = open_parquet(path)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            parts = part_of[begin : begin + rows]
            begin += rows
            if len(parts) < rows:
                raise DataError(f"{path} has changed since its rows were chosen")
            if (parts == NOWHERE).all():
                continue
            table = read_table(path, file, group)
            for number, writer in enumerate(writers):
                writer.write(table.filter(pa.array(parts == number)))


def write_chosen(files: Sequence[Path], chosen: np.ndarray, out: Path, made_by: Mapping[str, Any]) -> None:
    """Writes the rows where `chosen` (bool, one a row) as one file, which appears whole or not at all.

    Raises:
        CurationError: none is chosen.
    """
    if not chosen.any():
        raise CurationError(f"none of {len(chosen)} trajectories is left, so {out} is not written")
    with whole_file(out) as partial, RowWriter(partial, made_by) as writer:
        copy_rows(files, np.where(chosen, 0, NOWHERE), [writer])


def refuse_existing(out: Path) -> None:
    """
    Raises:
        CurationError: it exists.
    """
    if out.exists():
        raise CurationError(f"{out} exists already")
