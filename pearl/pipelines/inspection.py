"""What is in a dataset: counts, sizes, and what was refused on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pearl.parquet import open_parquet, read_group, resolve
from pearl.pipelines.run_directory import RunDirectory, counted_as, read_json

_LIGHT = ["skill", "source", "license", "steps.list.element.tool"]


@dataclass
class Inspection:
    """Counts over a dataset; `manifest` and `refusals` where the run that made it is beside it."""

    files: int = 0
    rows: int = 0
    bytes: int = 0
    image_bytes: int = 0
    skills: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    combinations: Counter[str] = field(default_factory=Counter)
    manifest: dict[str, Any] | None = None
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)


def inspect_data(data: str) -> Inspection:
    """Reads the light columns of every file; images are not read.

    Raises:
        DataError: there is nothing to read, or it is no file of trajectories.
    """
    found = Inspection()
    for path in resolve(data):
        file = open_parquet(path)
        found.files += 1
        found.rows += file.metadata.num_rows
        found.bytes += path.stat().st_size
        _count_image_bytes(file, found)
        for group in range(file.num_row_groups):
            for row in read_group(path, file, group, _LIGHT):
                _count(row, found)
    _add_run(Path(data), found)
    return found


def _count(row: dict[str, Any], found: Inspection) -> None:
    tools = [str(step["tool"]) for step in row["steps"] or () if step]
    found.skills[row["skill"]] += 1
    found.sources[row["source"]] += 1
    found.licenses[row["license"]] += 1
    found.steps[len(tools)] += 1
    found.tools.update(tools)
    found.combinations[" + ".join(sorted(set(tools)))] += 1


def _count_image_bytes(file: Any, found: Inspection) -> None:
    for group in range(file.num_row_groups):
        columns = file.metadata.row_group(group)
        for index in range(columns.num_columns):
            if columns.column(index).path_in_schema.endswith("bytes"):
                found.image_bytes += columns.column(index).total_compressed_size


def _add_run(path: Path, found: Inspection) -> None:
    directory = RunDirectory(path)
    found.manifest = read_json(directory.manifest)
    if directory.run.is_dir():
        for refusal in directory.refusals():
            label = counted_as(refusal)
            count, example = found.refusals.get(label, (0, ""))
            where = f"{refusal['source']} {refusal['key']}"
            found.refusals[label] = (count + 1, example or f"{where}: {refusal['detail']}".strip(": "))
