"""Which trajectories of a dataset to keep: `pearl-gen filter`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pearl.images import HARD_MAX_PIXELS, ImageError, header
from pearl.parquet import DataError, read_trajectories, resolve
from pearl.pipelines.curation.rows import CurationError, lineage, refuse_existing, write_chosen
from pearl.records import Trajectory


@dataclass(frozen=True)
class Filter:
    """What a trajectory must be.

    Attributes:
        skills, tools: One of these skills; only these tools. Empty: any.
        min_steps, max_steps: Bounds on the number of steps.
        gains: A file of `pearl-eval gain`.
        min_gain, min_image_gain: Least log-odds gained by all steps, and by the best image beyond its words.
        min_width, min_height, min_pixels, max_pixels: Bounds on the original image, in pixels.
    """

    skills: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    min_steps: int | None = None
    max_steps: int | None = None
    gains: str | None = None
    min_gain: float | None = None
    min_image_gain: float | None = None
    min_width: int | None = None
    min_height: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.gains is None and (self.min_gain is not None or self.min_image_gain is not None):
            raise CurationError("--min-gain and --min-image-gain need --gains, a file of pearl-eval gain")
        if self.gains is not None and self.min_gain is None and self.min_image_gain is None:
            raise CurationError("--gains needs --min-gain or --min-image-gain")
        if all(value in (None, ()) for value in asdict(self).values()):
            raise CurationError("nothing to filter by: give --skill, --tool, a number of steps, a gain or a size")

    @property
    def by_size(self) -> bool:
        return any(bound is not None for bound in (self.min_width, self.min_height, self.min_pixels, self.max_pixels))


@dataclass(frozen=True)
class Filtered:
    """How many were kept, and how many fell out for which reason (the first that applies)."""

    kept: int
    dropped: Mapping[str, int]


def filter_data(data: str | Path, out: Path, wanted: Filter) -> Filtered:
    """Copies what passes into one file, which appears whole or not at all; memory holds one row group.

    Raises:
        CurationError: `out` exists, or nothing passes.
        DataError: the data cannot be read.
    """
    refuse_existing(out)
    made_by = lineage("filter", asdict(wanted), [data])
    gains = {} if wanted.gains is None else read_gains(Path(wanted.gains))
    reasons = [refusal(trajectory, wanted, gains) for trajectory in read_trajectories(data)]
    dropped = Counter(filter(None, reasons))
    if dropped.total() == len(reasons):
        raise CurationError(f"none of {len(reasons)} trajectories passes: {dict(dropped)}")
    write_chosen(resolve(data), np.array([reason is None for reason in reasons]), out, made_by)
    return Filtered(len(reasons) - dropped.total(), dict(dropped))


def refusal(trajectory: Trajectory, wanted: Filter, gains: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why a trajectory does not pass."""
    return next((reason for reason, bad in _tests(trajectory, wanted, gains) if bad), None)


def _tests(
    trajectory: Trajectory, wanted: Filter, gains: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, bool]]:
    count, used = len(trajectory.steps), {step.call.tool for step in trajectory.steps}
    yield "skill", _not_in([trajectory.skill], wanted.skills)
    yield "tool", _not_in(used, wanted.tools)
    yield "too few steps", wanted.min_steps is not None and count < wanted.min_steps
    yield "too many steps", wanted.max_steps is not None and count > wanted.max_steps
    if wanted.by_size:
        yield from _size_tests(trajectory, wanted)
    if wanted.gains is None:
        return
    gain = gains.get(trajectory.id)
    bounds = {"gain": wanted.min_gain, "image_gain": wanted.min_image_gain}
    least = {name: bound for name, bound in bounds.items() if bound is not None}
    yield "gain not measured", gain is None or not all(_measured(gain[name]) for name in least)
    assert gain is not None
    for name, bound in least.items():
        yield name.replace("_", " "), gain[name] < bound


def _size_tests(trajectory: Trajectory, wanted: Filter) -> Iterator[tuple[str, bool]]:
    try:
        width, height = header(trajectory.image.data, HARD_MAX_PIXELS)
    except ImageError:
        yield "unreadable image", True
        return
    yield "too narrow", wanted.min_width is not None and width < wanted.min_width
    yield "too low", wanted.min_height is not None and height < wanted.min_height
    yield "too few pixels", wanted.min_pixels is not None and width * height < wanted.min_pixels
    yield "too many pixels", wanted.max_pixels is not None and width * height > wanted.max_pixels


def _measured(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _not_in(values: Collection[str], allowed: Collection[str]) -> bool:
    return bool(allowed) and not set(values) <= set(allowed)


def read_gains(path: Path) -> dict[str, dict[str, Any]]:
    """By trajectory id, `gain` and `image_gain`.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        rows = pq.read_table(path, columns=["id", "gain", "image_gain"]).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} is no file of pearl-eval gain: {' '.join(str(error).split())}") from error
    return {row["id"]: row for row in rows}
