"""Trajectories as Parquet: the Arrow schema with its `datasets` features, reading and writing.

One row a trajectory. The metadata under `huggingface` makes `load_dataset("parquet", …)` and the Hub's viewer decode
every image; the metadata under `pearl` says the schema's version and how the file was made.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pearl.errors import PearlError
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory

SCHEMA_VERSION = 1
ROWS_PER_GROUP = 64
"""The Hub's viewer refuses row groups of about 300 MB, and a reader holds at least one in memory."""
BYTES_PER_GROUP = 64_000_000
"""Large images end a row group before it has all its rows."""
MAX_NESTING = 64
SHARD_NAME = re.compile(r"(\w+)-(\d+)-of-(\d{1,6})\.parquet")
"""The split, the shard's number and how many there are: `train-00000-of-00003.parquet`."""

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_STEP = pa.struct(
    [
        ("thought", pa.string()),
        ("tool", pa.string()),
        ("arguments", pa.string()),
        ("text", pa.string()),
        ("image", _IMAGE),
    ]
)
_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("image", _IMAGE),
        ("question", pa.string()),
        ("choices", pa.list_(pa.field("item", pa.string()))),
        ("answer", pa.string()),
        ("steps", pa.list_(pa.field("item", _STEP))),
        ("conclusion", pa.string()),
        ("expert", pa.string()),
        ("skill", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("seed", pa.int64()),
    ]
)


class DataError(PearlError, ValueError):
    """Data that cannot be read as trajectories; the message names the file and the reason."""


def schema(made_by: Mapping[str, Any] | None = None) -> pa.Schema:
    """The Arrow schema with both metadata entries. `made_by`, JSON values, is kept for `read_metadata`."""
    features = {column.name: _feature(column.type) for column in _COLUMNS}
    pearl = {"schema_version": SCHEMA_VERSION, **(made_by or {})}
    return _COLUMNS.with_metadata(
        {
            "huggingface": json.dumps({"info": {"features": features}}),
            "pearl": json.dumps(pearl, sort_keys=True),
        }
    )


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The `datasets` feature of an Arrow type; written out so that workers need not import `datasets`."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {child.name: _feature(child.type) for child in kind}
    return {"dtype": str(kind), "_type": "Value"}


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as a row of the schema, arguments as JSON text; `from_row` undoes it."""
    return {
        "id": trajectory.id,
        "image": _image_row(trajectory.image),
        "question": trajectory.question,
        "choices": list(trajectory.choices),
        "answer": trajectory.answer,
        "steps": [
            {
                "thought": step.thought,
                "tool": step.call.tool,
                "arguments": json.dumps(step.call.arguments, ensure_ascii=False),
                "text": step.observation.text,
                "image": _image_row(step.observation.image),
            }
            for step in trajectory.steps
        ],
        "conclusion": trajectory.conclusion,
        "expert": trajectory.expert,
        "skill": trajectory.skill,
        "source": trajectory.source,
        "license": trajectory.license,
        "seed": trajectory.seed,
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """A row as it was read.

    Raises:
        DataError: it has no image, its id or a text that is shown is null, or a step's arguments are no JSON object.
    """
    image = _image_of(row["image"])
    if image is None:
        raise DataError(f"row {row['id']!r} has no image")
    _refuse_null(row, ("id", "question", "answer", "conclusion"), f"row {row['id']!r}")
    if None in (row["choices"] or ()):
        raise DataError(f"row {row['id']!r}: one of the choices is null")
    return Trajectory(
        id=row["id"],
        image=image,
        question=row["question"],
        choices=tuple(row["choices"] or ()),
        answer=row["answer"],
        steps=tuple(
            _step_of(step, f"row {row['id']!r} step {number}")
            for number, step in enumerate(row["steps"] or (), start=1)
        ),
        conclusion=row["conclusion"],
        expert=row["expert"] or "",
        skill=row["skill"] or "",
        source=row["source"] or "",
        license=row["license"] or "",
        seed=row["seed"] or 0,
    )


def _step_of(step: Mapping[str, Any] | None, where: str) -> Step:
    if step is None:
        raise DataError(f"{where} is null")
    _refuse_null(step, ("thought", "tool", "text"), where)
    return Step(
        thought=step["thought"],
        call=ToolCall(step["tool"], _arguments_of(step["arguments"], where)),
        observation=Observation(step["text"], _image_of(step["image"])),
    )


def _refuse_null(values: Mapping[str, Any], texts: Sequence[str], where: str) -> None:
    if null := [name for name in texts if values[name] is None]:
        raise DataError(f"{where}: {null[0]} is null")


def _arguments_of(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        raise DataError(f"{where}: the arguments are null, not a JSON object")
    try:
        arguments = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: the arguments are nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: the arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments are a JSON {type(arguments).__name__}, not a JSON object")
    if not _is_shallow(arguments, MAX_NESTING):
        raise DataError(f"{where}: the arguments are nested too deeply")
    return arguments


def _is_shallow(value: Any, levels: int) -> bool:
    """What is nested deeper would exhaust the stack of whoever walks through it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def _image_row(image: EncodedImage | None) -> dict[str, Any] | None:
    return None if image is None else {"bytes": image.data, "path": image.path}


def _image_of(row: Mapping[str, Any] | None) -> EncodedImage | None:
    return None if row is None or row["bytes"] is None else EncodedImage(row["bytes"], row["path"])


def open_writer(path: Path, file_schema: pa.Schema) -> pq.ParquetWriter:
    """The writer with which all files of trajectories are written."""
    repetitive = ["question", "answer", "expert", "skill", "source", "license"]
    return pq.ParquetWriter(path, file_schema, compression="zstd", use_dictionary=repetitive, write_page_index=True)


class TrajectoryWriter:
    """Writes one Parquet file in row groups of `ROWS_PER_GROUP`, or fewer when images are large; the same rows give the same bytes.

    The caller gives the name; to make a file appear whole, write under a temporary name and rename it.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
        self._schema = schema(made_by)
        self._file = open_writer(path, self._schema)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def write(self, trajectory: Trajectory) -> None:
        images = (trajectory.image, *(step.observation.image for step in trajectory.steps))
        self._pending.append(to_row(trajectory))
        self._pending_bytes += sum(len(image.data) for image in images if image is not None)
        if len(self._pending) == ROWS_PER_GROUP or self._pending_bytes > BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self._schema))
            self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._file.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        with suppress(OSError, pa.ArrowException):  # what went wrong before is what counts
            self._file.close()


def write_trajectories(
    path: Path, trajectories: Iterable[Trajectory], made_by: Mapping[str, Any] | None = None
) -> None:
    """Writes trajectories as one Parquet file; `made_by`, JSON values, is kept for `read_metadata`."""
    with TrajectoryWriter(path, made_by) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)


def concatenate(files: Sequence[Path], path: Path, made_by: Mapping[str, Any] | None = None) -> None:
    """Joins files of trajectories into one, row group by row group, without decoding a row into Python."""
    with open_writer(path, schema(made_by)) as writer:
        for file in files:
            source = open_parquet(file)
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group).replace_schema_metadata(writer.schema.metadata))


def resolve(data: str | Path) -> list[Path]:
    """The Parquet files of a file, a folder, a glob or a Hub dataset id (`org/name`, downloaded), in order; of
    `PLACE:train` those whose names (`train-00000-of-00003.parquet`) are of that split.

    Raises:
        DataError: when there are none.
    """
    place, wanted = place_and_split(data)
    files = _files_of(place)
    splits = _splits_of(files)
    if wanted and wanted not in splits.values():
        raise DataError(f"{place} has no split {wanted!r}; it has {_names(splits, 'no named one')}")
    return [file for file in files if not wanted or splits[file] == wanted]


def resolve_split(data: str | Path) -> list[Path]:
    """As `resolve`, of one split.

    Raises:
        DataError: there are several and none is named, or not the one that is.
    """
    files = resolve(data)
    splits = _splits_of(files)
    if len(set(splits.values())) > 1:
        raise DataError(f"{data} holds {_names(splits, 'other files')}: name one, {data}:{max(splits.values())}")
    return files


def _splits_of(files: Sequence[Path]) -> dict[Path, str]:
    return {file: found[1] if (found := SHARD_NAME.fullmatch(file.name)) else "" for file in files}


def _names(splits: Mapping[Path, str], nameless: str) -> str:
    return ", ".join(name or nameless for name in sorted(set(splits.values())))


def _files_of(place: str) -> list[Path]:
    """In order. Folders named `*.parquet`, as Spark writes them, are skipped."""
    path = Path(place)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.parquet") if not _hidden(p.relative_to(path)) and not _of_run(p, path))
    else:
        files = sorted(Path(match) for match in glob(place, recursive=True))
    files = [file for file in files if not file.is_dir()]
    if files:
        return files
    if not path.exists() and place.count("/") == 1 and not place.endswith(".parquet"):
        return _download(place)
    raise DataError(f"no Parquet file at {place}: expected a file, a folder, a glob or a Hub dataset id (org/name)")


def missing_shards(files: Iterable[Path]) -> list[str]:
    """The shards that the names of these promise (`train-00000-of-00003.parquet`) and that do not lie beside them."""
    there = defaultdict[tuple[Path, str, str], set[int]](set)
    for file in files:
        if found := SHARD_NAME.fullmatch(file.name):
            there[file.parent, found[1], found[3]].add(int(found[2]))
    promised = (
        folder / f"{name}-{number:0{len(total)}}-of-{total}.parquet"
        for (folder, name, total), numbers in there.items()
        for number in sorted(set(range(int(total))) - numbers)
    )
    return [str(shard) for shard in promised if not shard.exists()]


def place_and_split(data: str | Path) -> tuple[str, str]:
    """`PLACE:train` in its two parts; the split is empty where none is named."""
    place, _, wanted = str(data).rpartition(":")
    if not place or Path(data).exists() or not wanted.isidentifier():
        return str(data), ""
    return place, wanted


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _of_run(file: Path, root: Path) -> bool:
    """Whether a file belongs to the making of a single file that stands there too: `x.parquet.run` beside `x.parquet`."""
    folders = [folder for folder in file.parents if folder != root and folder.is_relative_to(root)]
    return any(f.name.endswith(".parquet.run") and f.with_name(f.name.removesuffix(".run")).is_file() for f in folders)


def _download(repo: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns="*.parquet")
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(f"{repo} is no local path, and the Hub does not give it: {error}") from error
    return sorted(file for file in Path(folder).rglob("*.parquet") if not file.is_dir())


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a file of trajectories, after checking that it is one and of this schema version.

    Raises:
        DataError: says what the file is instead.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    metadata = read_metadata(file.schema_arrow)
    if metadata is None:
        raise DataError(f"{path} holds no Pearl trajectories (its schema has no 'pearl' metadata)")
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade pearl-vlm" if newer else "make it again, or read it with the release that wrote it"
        raise DataError(
            f"{path} has trajectory schema version {version}; this release reads {SCHEMA_VERSION}: {advice}"
        )
    if not file.schema_arrow.equals(_COLUMNS, check_metadata=False):
        raise DataError(f"{path} claims schema version {version}, but its columns differ from that schema")
    return file


def holds_trajectories(path: Path) -> bool:
    """Whether a file was written as one of trajectories, of whatever schema version."""
    try:
        return read_metadata(pq.read_schema(path)) is not None
    except (pa.ArrowInvalid, OSError):
        return False


def read_metadata(file_schema: pa.Schema) -> dict[str, Any] | None:
    """What `made_by` and the schema version say in a file's schema; None when it was not written by Pearl."""
    raw = (file_schema.metadata or {}).get(b"pearl")
    if raw is None:
        return None
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_group(
    path: Path, file: pq.ParquetFile, group: int, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one row group of an opened file.

    Raises:
        DataError: the file is damaged there.
    """
    with _damage_told(path, group):
        rows: list[dict[str, Any]] = file.read_row_group(group, columns=columns).to_pylist()
    return rows


def read_table(path: Path, file: pq.ParquetFile, group: int) -> pa.Table:
    """One row group of an opened file, as it is stored.

    Raises:
        DataError: the file is damaged there.
    """
    with _damage_told(path, group):
        return file.read_row_group(group)


@contextmanager
def _damage_told(path: Path, group: int) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged in row group {group}: {' '.join(str(error).split())}") from error


def read_trajectories(data: str | Path, one_split: bool = False) -> Iterator[Trajectory]:
    """All trajectories of a file, folder, glob or Hub id, in order; one row group is in memory at a time.

    Args:
        one_split: Several splits are refused: what was trained on is not to be evaluated on.

    Raises:
        DataError: there is no file, or one or a row of it cannot be read.
    """
    for path in _chosen(data, one_split):
        file = open_parquet(path)
        for group in range(file.num_row_groups):
            yield from map(from_row, read_group(path, file, group))


def count_rows(data: str | Path, one_split: bool = False) -> int:
    """How many trajectories there are, without reading them.

    Raises:
        DataError: as `read_trajectories`, as far as the files' footers tell.
    """
    return sum(open_parquet(path).metadata.num_rows for path in _chosen(data, one_split))


def _chosen(data: str | Path, one_split: bool) -> list[Path]:
    return resolve_split(data) if one_split else resolve(data)
