"""What goes where: the splits of a dataset and their shards in the Hub's layout.

README.md, pictures/…                    the card and its pictures
data/<split>-00000-of-000NN.parquet      shards; those of a folder as they are, a single large file cut into several
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pearl.parquet import SHARD_NAME, open_parquet, open_writer, read_metadata, resolve
from pearl.pipelines.publishing.errors import PublishError

SHARD_BYTES = 500_000_000
"""A single file above this is cut; what the `datasets` library takes for its own shards."""

_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_NAMED = re.compile(r"(\w+)=(.+)")


@dataclass(frozen=True)
class Shard:
    """One data file of the repository.

    Attributes:
        path: Its name in the repository.
        file: The local file that has its rows.
        groups: The row groups of `file` that it holds; None: the file as it is.
        size: Bytes; of a part of a file about (its footer is not counted).
    """

    path: str
    file: Path
    groups: range | None
    size: int

    @contextmanager
    def on_disk(self, folder: Path) -> Iterator[Path]:
        """The shard as a file: its own, or one in `folder` that is deleted afterwards. The same rows give the same bytes."""
        if self.groups is None:
            yield self.file
            return
        part = folder / Path(self.path).name
        try:
            self._write(part, self.groups)
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _write(self, part: Path, groups: range) -> None:
        source = open_parquet(self.file)
        with open_writer(part, source.schema_arrow) as writer:
            for group in groups:
                writer.write_table(source.read_row_group(group))


@dataclass(frozen=True)
class Split:
    """A split: its data as the user named it, its files, and the shards that they become."""

    name: str
    data: str
    files: tuple[Path, ...]
    shards: tuple[Shard, ...]
    rows: int
    memory: int
    """Bytes uncompressed."""

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class Plan:
    """Everything that goes to the repository but the card."""

    splits: tuple[Split, ...]

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.splits for shard in split.shards]

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits)

    @property
    def size(self) -> int:
        return sum(split.size for split in self.splits)

    def makings(self) -> list[Mapping[str, Any]]:
        """What the files' metadata says of how they were made, each distinct answer once."""
        found: list[Mapping[str, Any]] = []
        for split in self.splits:
            for file in split.files:
                made = {**(read_metadata(open_parquet(file).schema_arrow) or {})}
                made.pop("schema_version", None)
                if made and made not in found:
                    found.append(made)
        return found


def make_plan(data: str, split: str | None = None, shard_bytes: int = SHARD_BYTES) -> Plan:
    """The splits and shards of what the user named.

    Args:
        data: A file, a folder, a glob or a Hub dataset id; or several splits: `train=DATA,test=DATA`.
        split: The name of the only split, unless the files' names say several. None: as they say
            (`test-00000-of-00003.parquet`), else `train`.
        shard_bytes: A single file above this is cut into shards of about that size.

    Raises:
        DataError: there is no file of trajectories.
        PublishError: the splits' names cannot be used or contradict the files', a split has no rows, or a trajectory
            stands in two splits.
    """
    if shard_bytes < 1:
        raise PublishError(f"a shard of {shard_bytes} bytes: at least 1")
    named = _named_splits(data)
    if named and split:
        raise PublishError("the data names its splits already; leave --split out")
    splits = [_make_split(name, place, resolve(place), shard_bytes) for name, place in named] or _split_by_names(
        data, split, shard_bytes
    )
    for one in splits:
        if not one.rows:
            raise PublishError(f"the split {one.name} ({one.data}) has no rows")
    _refuse_shared_rows(splits)
    return Plan(tuple(splits))


def _named_splits(data: str) -> list[tuple[str, str]]:
    """The pairs of `train=DATA,test=DATA`; none where the text is a path."""
    pairs = [_NAMED.fullmatch(part.strip()) for part in data.split(",")]
    if Path(data).exists() or pairs[0] is None:
        return []
    if any(pair is None for pair in pairs):
        raise PublishError(f"{data!r}: expected split=DATA,split=DATA")
    named = [(pair[1], pair[2]) for pair in pairs if pair is not None]
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise PublishError(f"the split {twice[0]} is named twice")
    return named


def _split_by_names(data: str, split: str | None, shard_bytes: int) -> list[Split]:
    files = resolve(data)
    matches = [SHARD_NAME.fullmatch(file.name) for file in files]
    if split is None and any(matches) and not all(matches):
        odd = next(file.name for file, match in zip(files, matches, strict=True) if match is None)
        raise PublishError(
            f"{data} holds files of splits and others, such as {odd}: move them, or say what is which:"
            " train=DATA,test=DATA"
        )
    names = [match[1] for match in matches if match is not None]
    ordered = sorted(set(names), key=lambda name: (name != "train", name))
    if split is not None and len(ordered) > 1:
        raise PublishError(
            f"{data} holds the splits {', '.join(ordered)}, which --split would make one: leave it out, or say what is"
            " which: train=DATA,test=DATA"
        )
    if split is not None or not all(matches):
        return [_make_split(split or "train", data, files, shard_bytes)]
    if len(ordered) == 1:
        return [_make_split(ordered[0], data, files, shard_bytes)]
    return [
        _make_split(name, data, [file for file, its in zip(files, names, strict=True) if its == name], shard_bytes)
        for name in ordered
    ]


def _make_split(name: str, data: str, files: Sequence[Path], shard_bytes: int) -> Split:
    if not _SPLIT_NAME.fullmatch(name):
        raise PublishError(f"{name!r} is no name of a split: letters, digits and _")
    parts: list[tuple[Path, range | None, int]] = [(file, None, file.stat().st_size) for file in files]
    rows = memory = 0
    for file in files:
        with open_parquet(file) as opened:  # one at a time: a process may not open thousands
            rows, memory = rows + opened.metadata.num_rows, memory + _memory(opened)
            if len(files) == 1 and parts[0][2] > shard_bytes:
                parts = [(file, groups, size) for groups, size in _cut(opened, shard_bytes)]
    total = len(parts)
    shards = tuple(
        Shard(f"data/{name}-{number:05d}-of-{total:05d}.parquet", file, groups, size)
        for number, (file, groups, size) in enumerate(parts)
    )
    return Split(name, data, tuple(files), shards, rows, memory)


def _cut(file: pq.ParquetFile, shard_bytes: int) -> list[tuple[range, int]]:
    """Consecutive row groups whose compressed sizes add up to at most `shard_bytes`, or one alone; with their sizes."""
    parts: list[tuple[range, int]] = []
    for group in range(file.num_row_groups):
        columns = file.metadata.row_group(group)
        size = sum(columns.column(index).total_compressed_size for index in range(columns.num_columns))
        if parts and parts[-1][1] + size <= shard_bytes:
            groups, before = parts.pop()
            parts.append((range(groups.start, group + 1), before + size))
        else:
            parts.append((range(group, group + 1), size))
    return parts


def _memory(file: pq.ParquetFile) -> int:
    return sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))


def _refuse_shared_rows(splits: Sequence[Split]) -> None:
    """A trajectory in two splits would make a test of what was trained on."""
    seen: dict[str, str] = {}
    for split in splits if len(splits) > 1 else ():
        ids = {str(one) for file in split.files for one in pq.read_table(file, columns=["id"])["id"].to_pylist()}
        shared = sorted(ids & seen.keys())
        if shared:
            raise PublishError(
                f"{len(shared)} trajectories stand in {seen[shared[0]]} and in {split.name}, such as {shared[0]}"
            )
        seen.update(dict.fromkeys(ids, split.name))
