"""What the card says of the data, gathered in passes over its light columns; images are read for the samples alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pearl.parquet import from_row, open_parquet, read_group
from pearl.pipelines.inspection import Inspection, inspect_data
from pearl.pipelines.publishing.plan import Plan
from pearl.pipelines.run_directory import RunDirectory, counted_as, read_json
from pearl.records import Trajectory

MAX_SAMPLES = 6
_COUNTED = ("skills", "sources", "licenses", "steps", "tools", "combinations")
_SUMMED = ("files", "rows", "bytes", "image_bytes")


@dataclass(frozen=True)
class Run:
    """A run of the generator that lies beside the data."""

    manifest: Mapping[str, Any]
    refusals: Counter[str]
    """Rejected and quarantined samples by reason."""


@dataclass
class Facts:
    """Counts over all splits.

    Attributes:
        counts: As `pearl-gen inspect` counts, over all files.
        origins: Trajectories by (source, licence).
        experts: Trajectories by expert.
        runs: The runs that made the data, where they lie beside it.
        makings: What the files' metadata says, each distinct answer once.
        samples: A few trajectories of different skills, of the first split.
    """

    counts: Inspection = field(default_factory=Inspection)
    origins: Counter[tuple[str, str]] = field(default_factory=Counter)
    experts: Counter[str] = field(default_factory=Counter)
    runs: list[Run] = field(default_factory=list)
    makings: list[Mapping[str, Any]] = field(default_factory=list)
    samples: list[Trajectory] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    file: Path
    group: int
    row: int

    def read(self) -> Trajectory:
        return from_row(read_group(self.file, open_parquet(self.file), self.group)[self.row])


def gather(plan: Plan) -> Facts:
    """The facts of validated data; the same data gives the same facts, in the same order."""
    facts = Facts(makings=plan.makings())
    places: dict[str, list[_Place]] = {}
    for split in plan.splits:
        for file in split.files:
            _add(facts.counts, inspect_data(str(file)))
            _look_through(file, facts, places if split is plan.splits[0] else {})
    facts.runs = list(_runs(plan))
    facts.samples = [place.read() for place in _chosen(places)]
    return facts


def _add(total: Inspection, found: Inspection) -> None:
    for name in _COUNTED:
        getattr(total, name).update(getattr(found, name))
    for name in _SUMMED:
        setattr(total, name, getattr(total, name) + getattr(found, name))


def _look_through(file: Path, facts: Facts, places: dict[str, list[_Place]]) -> None:
    opened = open_parquet(file)
    for group in range(opened.num_row_groups):
        for number, row in enumerate(read_group(file, opened, group, ["skill", "source", "license", "expert"])):
            facts.origins[row["source"], row["license"] or ""] += 1
            facts.experts[row["expert"] or ""] += 1
            found = places.setdefault(row["skill"], [])
            if len(found) < MAX_SAMPLES:
                found.append(_Place(file, group, number))


def _chosen(places: Mapping[str, list[_Place]]) -> Iterator[_Place]:
    """The first trajectory of each skill, then the second of each, and so on, up to `MAX_SAMPLES`."""
    rounds = (found[turn : turn + 1] for turn in range(MAX_SAMPLES) for found in places.values())
    return islice(chain.from_iterable(rounds), MAX_SAMPLES)


def _runs(plan: Plan) -> Iterator[Run]:
    for data in dict.fromkeys(split.data for split in plan.splits):
        directory = RunDirectory(Path(data))
        manifest = read_json(directory.manifest)
        if manifest is None:
            continue
        yield Run(manifest, Counter(map(counted_as, directory.refusals())))
